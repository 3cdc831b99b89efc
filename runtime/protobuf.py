"""Protobuf messages, as far as it takes to change some fields and to copy the others as they stand.

A message is a row of fields: a key, which tells the field's number and its kind, and a content, which is a
whole number or a run of bytes, often a message itself. What cannot be read is a ValueError.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

Content: TypeAlias = int | bytes | memoryview
_NUMBER, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
"""Bytes of the kinds that are always as long."""


def fields(message: Content) -> Iterator[tuple[int, Content, memoryview]]:
    """Number, content and whole of each field in turn."""
    if isinstance(message, int):
        raise ValueError("a number in the place of a message")
    message, at, end = memoryview(message), 0, len(message)
    while at < end:
        begin = at
        key, at = _decoded(message, at)
        content: Content
        if (kind := key & 7) == _NUMBER:
            content, at = _decoded(message, at)
        else:
            if kind == _BYTES:
                size, at = _decoded(message, at)
            elif kind in _FIXED:
                size = _FIXED[kind]
            else:
                raise ValueError(f"a field of the unknown kind {kind}")
            if size > end - at:
                raise ValueError("a field that is longer than its message")
            content, at = message[at : at + size], at + size
        yield key >> 3, content, message[begin:at]


def field(number: int, content: Content) -> bytes:
    """A field as it is written."""
    if isinstance(content, int):
        return _encoded(number << 3 | _NUMBER) + _encoded(content)
    return b"".join((_encoded(number << 3 | _BYTES), _encoded(len(content)), content))


def changed(message: Content, changes: Mapping[int, Callable[[Content], Content | None]]) -> bytes:
    """The message with the contents of some fields, by their numbers, replaced by what a function makes.

    Where that is None, the field is left out.
    """
    parts: list[bytes | memoryview] = []
    for number, content, whole in fields(message):
        if number not in changes:
            parts.append(whole)
        elif (new := changes[number](content)) is not None:
            parts.append(field(number, new))
    return b"".join(parts)


def _decoded(message: memoryview, at: int) -> tuple[int, int]:
    """A whole number, seven bits in each byte, and the place after it."""
    value = 0
    for shift in range(0, 64, 7):
        if at == len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number that does not end")


def _encoded(value: int) -> bytes:
    """A whole number from 0."""
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    data.append(value)
    return bytes(data)
