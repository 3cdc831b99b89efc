"""A small graph builder: ONNX nodes under paths.

Nodes and initializers are recorded on an onnx-ir tape. A path (`with g.at("layers.0"): …`) prefixes the names
of nodes, so that a profile of the graph reads like the model: `/layers.0/atoms/synthesis/MatMul`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array: TypeAlias = npt.NDArray[Any]
Input: TypeAlias = "ir.Value | Array | np.generic | None"

CONTRIB = "com.microsoft"
OPSETS = {"": 23, CONTRIB: 1}
IR_VERSION = 11
ATOMS = "atoms"
"""Key of the metadata that tells the runtime where atoms lie (docs/bundle.md)."""


class Builder:
    """Records nodes; arrays given as inputs become initializers, shared where they are equal."""

    def __init__(self, parent: Builder | None = None) -> None:
        self._parent = parent
        self._tape = ir.tape.Tape()
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []
        self._path: list[str] = [] if parent is None else parent._path
        self._names: Counter[str] = Counter() if parent is None else parent._names
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []

    @contextmanager
    def at(self, *parts: str) -> Iterator[None]:
        """Put what is built inside under this path."""
        self._path.extend(parts)
        try:
            yield
        finally:
            del self._path[len(self._path) - len(parts) :]

    def op(self, op_type: str, /, *inputs: Input, domain: str = "", **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self.ops(1, op_type, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, count: int, op_type: str, /, *inputs: Input, domain: str = "", **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        name = self._unique("/" + "/".join([*self._path, op_type]))
        values = [x if x is None or isinstance(x, ir.Value) else self.constant(x) for x in inputs]
        outputs = [ir.Value(name=f"{name}:{i}") for i in range(count)]
        return self._tape.op_multi_out(op_type, values, attributes, outputs=outputs, domain=domain, name=name)

    def scan(self, body: Builder, *inputs: Input, axes: Sequence[int]) -> ir.Value:
        """Run a body on one position after another of inputs along their axes; its outputs along axis 1."""
        return self.op(
            "Scan",
            *inputs,
            body=body.graph("position"),
            num_scan_inputs=len(inputs),
            scan_input_axes=tuple(axes),
            scan_output_axes=(1,),
        )

    def constant(self, array: Array | np.generic, name: str = "", *, atoms: tuple[int, ...] = ()) -> ir.Value:
        """Return an initializer, the same one for the same small numbers where it bears no name.

        `atoms`, of one that has a name: the axis along which all atoms lie, how many times, and how many in
        each place.
        """
        if self._parent is not None:
            return self._parent.constant(array, name, atoms=atoms)
        array = np.asarray(array)
        key = (array.dtype.str, array.shape, b"" if name else array.tobytes())
        if not name and key in self._constants:
            return self._constants[key]
        tensor = ir.tensor(array)
        mark_atoms(tensor, atoms)
        value = self._tape.initializer(tensor, self._unique(name or f"constant.{len(self._constants)}"))
        if not name:
            self._constants[key] = value
        return value

    def input(
        self,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int | str],
        default: Array | None = None,
        *,
        atoms: tuple[int, ...] = (),
    ) -> ir.Value:
        """Declare a graph input, with a value for callers who leave it out; `atoms` as of a constant."""
        value = ir.val(name, dtype, shape)
        if default is not None:
            value.const_value = tensor = ir.tensor(default, name=name)
            mark_atoms(tensor, atoms)
        self.inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declare a graph output."""
        value.name, value.dtype, value.shape = name, dtype, ir.Shape(shape)
        self.outputs.append(value)

    def branch(self) -> Builder:
        """Return a builder for the body of a control-flow node, which shares names and initializers."""
        return Builder(self)

    def reserve(self, names: Iterable[str]) -> None:
        """Give no value or node one of these names."""
        self._names.update(names)

    def take(self, nodes: Iterable[ir.Node], initializers: Iterable[ir.Value]) -> None:
        """Add nodes that were recorded elsewhere, and initializers of this graph's own."""
        self._nodes += [*self._tape.nodes, *nodes]
        self._initializers += [*self._tape.initializers, *initializers]
        self._tape = ir.tape.Tape()

    def graph(self, name: str) -> ir.Graph:
        """Return what was recorded as a graph."""
        defaults = [value for value in self.inputs if value.const_value is not None]
        return ir.Graph(
            self.inputs,
            self.outputs,
            nodes=[*self._nodes, *self._tape.nodes],
            initializers=[*self._initializers, *self._tape.initializers, *defaults],
            opset_imports=OPSETS if self._parent is None else {},
            name=name,
        )

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}_{count}"


def mark_atoms(part: ir.TensorProtocol | ir.Node, where: Sequence[int | str]) -> None:
    """Write on a tensor or a node where atoms lie, if it has any: the runtime can then leave some out."""
    if where:
        part.metadata_props[ATOMS] = " ".join(map(str, where))


def ints(*values: int) -> Array:
    """Return a vector of int64, which is how ONNX takes shapes and axes."""
    return np.array(values, dtype=np.int64)


def floats(value: float) -> np.float32:
    """Return a float32 scalar."""
    return np.float32(value)
