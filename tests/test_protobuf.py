"""Protobuf as far as it is read and written here, held to what onnx reads and writes."""

import onnx
import pytest
import tiny
from sdgm_edge.runtime.protobuf import changed, field, fields

GRAPH, NODE, PRODUCER, OPSET = 7, 1, 2, 8


def model() -> bytes:
    made = tiny.graph()
    made.producer_name = "someone"
    return made.SerializeToString()


def test_what_is_not_changed_stays_as_it_is():
    assert changed(model(), {}) == model()
    assert b"".join(bytes(whole) for _, _, whole in fields(model())) == model()


def test_fields_are_replaced_and_left_out():
    new = changed(model(), {PRODUCER: lambda name: bytes(name).upper(), OPSET: lambda opset: None})
    read = onnx.load_from_string(new)
    assert read.producer_name == "SOMEONE"
    assert not read.opset_import
    assert read.graph == tiny.graph().graph


def test_messages_inside_are_changed_too():
    def first(graph):
        return changed(graph, {NODE: lambda node: node if b"Scan" in bytes(node) else None})

    nodes = onnx.load_from_string(changed(model(), {GRAPH: first})).graph.node
    assert [node.op_type for node in nodes] == ["Scan"]


@pytest.mark.parametrize("number", [0, 1, 127, 128, 300, 2**31, 2**63 - 1])
def test_numbers_of_any_length(number):
    written = onnx.ModelProto(model_version=number).SerializeToString() or field(5, 0)
    assert field(5, number) == written
    assert [(n, content) for n, content, _ in fields(written)] == [(5, number)]


def test_kinds_of_a_fixed_length_are_passed_over():
    written = onnx.AttributeProto(name="a", f=0.5).SerializeToString() + b"\x11" + bytes(8)
    assert [n for n, _, _ in fields(written)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"\x08", "a number that does not end"),
        (b"\x08" + b"\x80" * 12, "a number that does not end"),
        (b"\x0a\x05abc", "longer than its message"),
        (b"\x0d\x00", "longer than its message"),
        (b"\x0b\x00", "the unknown kind 3"),
        (7, "a number in the place of a message"),
    ],
)
def test_what_is_no_message_is_refused(message, told):
    with pytest.raises(ValueError, match=told):
        list(fields(message))
