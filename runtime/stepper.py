"""One sequence through any graph whose state goes in by name and comes out as `next_` and that name.

The graph of a bundle has one such piece, `state`; that of a baseline may have many. They are kept in two sets
of buffers, and a step reads one and writes the other, so that nothing is allocated or copied. A piece with a
dimension `capacity` (or `capacity/4`) is a cache, as long as it must be; one with a dimension `ring:128` is a
ring of so many places. Both sets share these, and a graph writes to them in place.

This is the shortest loop around a graph, with no way back, for measuring one graph against another. A
`Session` is what generates text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Floats
from .providers import onnxruntime, open_graph

_NEXT, _IN_PLACE = "next_", ("capacity", "ring")
_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Stepper:
    """A graph and the state of one sequence in it, on the CPU and one thread."""

    def __init__(self, graph: Path | bytes, *, chunk: int, block: int = 0, capacity: int = 1) -> None:
        """Open a graph, with a state of zeros.

        `chunk`: most tokens of a call. `block`: no call crosses a multiple of it; 0 where any may be crossed.
        `capacity`: tokens that fit into the caches.
        """
        self._session = open_graph(
            graph, graph if isinstance(graph, Path) else "graph", providers="cpu"
        ).session
        self._chunk, self._block, self.capacity = chunk, block, capacity
        self._sets: list[dict[str, tuple[NDArray[Any], Any]]] = [{}, {}]
        for value in self._session.get_inputs():
            if value.name == "ids":
                continue
            shape = [_size(dim, capacity) for dim in value.shape]
            buffer = _buffer(shape, _DTYPES[value.type])
            self._sets[0][value.name] = buffer
            if not any(str(dim).startswith(_IN_PLACE) for dim in value.shape):
                buffer = _buffer(shape, _DTYPES[value.type])
            self._sets[1][value.name] = buffer
        logits = next(value for value in self._session.get_outputs() if value.name == "logits")
        self._logits, self._token = _buffer((1, 1, logits.shape[-1])), _buffer((1, 1), np.int64)
        self._steps = [self._bound(self._token[1], turn, self._logits[1]) for turn in (0, 1)]
        self._turn = self.position = 0

    def reset(self) -> None:
        """Begin another text."""
        for array, _ in self._sets[self._turn].values():
            array[:] = 0
        self.position = 0

    def piece(self, name: str) -> NDArray[Any]:
        """A piece of the state as it is now."""
        return self._sets[self._turn][name][0]

    def step(self, token: int) -> Floats:
        """Feed one token; the logits after it, (V,), which the next call overwrites."""
        self._token[0][0, 0] = token
        self._session.run_with_iobinding(self._steps[self._turn])
        self._turn = 1 - self._turn
        self.position += 1
        logits_V: Floats = self._logits[0][0, 0]
        return logits_V

    def read(self, ids: Sequence[int]) -> Floats:
        """Feed tokens in few calls; the logits after the last, which the next call overwrites."""
        for piece in self._pieces(ids):
            if len(piece) == 1:
                self.step(piece[0])
            else:
                self._run(piece, len(piece) - 1, self._logits[1])
        logits_V: Floats = self._logits[0][0, 0]
        return logits_V

    def read_all(self, ids: Sequence[int]) -> Floats:
        """Feed tokens likewise; the logits after each, (T, V)."""
        logits_TV = np.empty((len(ids), self._logits[0].shape[-1]), np.float32)
        at = 0
        for piece in self._pieces(ids):
            self._run(piece, 0, _value(logits_TV[None, at : at + len(piece)]))
            at += len(piece)
        return logits_TV

    def _run(self, ids: Sequence[int], start: int, logits: Any) -> None:
        arrays = np.array([ids], np.int64), np.array(start, np.int64)
        binding = self._bound(_value(arrays[0]), self._turn, logits)
        binding.bind_ortvalue_input("start", _value(arrays[1]))
        self._session.run_with_iobinding(binding)
        self._turn = 1 - self._turn
        self.position += len(ids)

    def _pieces(self, ids: Sequence[int]) -> Iterator[Sequence[int]]:
        at, begun = 0, self.position
        while at < len(ids):
            room = self._block - (begun + at) % self._block if self._block else self._chunk
            yield ids[at : at + min(room, self._chunk)]
            at += min(room, self._chunk)

    def _bound(self, ids: Any, turn: int, logits: Any) -> Any:
        """Bind tokens and logits, one set of the state as what goes in and the other as what comes out."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("ids", ids)
        binding.bind_ortvalue_output("logits", logits)
        for name, (_, value) in self._sets[turn].items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(_NEXT + name, self._sets[1 - turn][name][1])
        return binding


def _size(dim: int | str, capacity: int) -> int:
    """A dimension of one sequence."""
    if isinstance(dim, int):
        return dim
    name, _, number = dim.replace(":", "/").partition("/")
    if name == "capacity":
        return -(-capacity // int(number or 1))
    return int(number) if name == "ring" else 1


def _value(array: NDArray[Any]) -> Any:
    """An OrtValue over the memory of an array, which must live as long."""
    return onnxruntime().OrtValue.ortvalue_from_numpy(array)


def _buffer(shape: Sequence[int], dtype: Any = np.float32) -> tuple[NDArray[Any], Any]:
    array = np.zeros(shape, dtype)
    return array, _value(array)
