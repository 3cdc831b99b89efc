"""A graph of its strongest atoms alone.

The exporter lays the atoms of every layer in the order of their strength, which leaves a model what it is:
the strongest N of K are the first N. In the graph, metadata with the key `atoms` tell where they lie:

    of a tensor   "axis times each"   along this axis lie all atoms, `times` times, `each` of them in a place
    of a node     "attribute times"   this attribute is `times` the number of atoms

What else depends on K, a graph makes of the shapes of its tensors. So to leave out weak atoms is to copy the
file with shorter tensors, and nothing is computed. What comes of it is what the exporter writes of a model
of these atoms, but for the scales of int8, which were found with all of them.

Several atoms share a place where weights lie in blocks with one scale: such blocks are kept whole. Codes of
int8 are bounded in pairs of neighbours (`export/matrices.py`), which are kept together too.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .container import AGAIN, invalid, shown
from .errors import BundleError, ParameterError
from .manifest import BundleConfig
from .protobuf import Content, changed, field, fields

if TYPE_CHECKING:
    from .bundle import Bundle

_KEY = b"atoms"
# Numbers of fields in onnx.proto.
_GRAPH, _NODES, _TENSORS, _INPUTS, _OUTPUTS, _VALUES = 7, 1, 5, 11, 12, 13
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_DATA, _TENSOR_METADATA = 1, 2, 9, 16
_INT8, _PAIR = 3, 2
_NODE_ATTRIBUTES, _NODE_METADATA, _ATTRIBUTE_NAME, _ATTRIBUTE_NUMBER = 5, 9, 1, 3
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TYPE_SHAPE, _SHAPE_DIMS, _DIM_SIZE = 1, 2, 1, 2, 1, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


def with_atoms(bundle: "Bundle", count: int, variant: str | None = None) -> "Bundle":
    """One variant with the strongest `count` atoms of each layer; the bundle itself where it has no more.

    Rounded up where weights lie in blocks. What is returned stands for another model, with an id of its own,
    and reads its graph from the same files, which hold all atoms.

    Raises:
        ParameterError: that is no number of atoms.
        BundleError: the atoms are in no order, or those of the variant cannot be parted.
    """
    if type(count) is not int or count < 1:
        raise ParameterError(f"atoms: expected a number from 1, got {shown(count)}; leave it out for all")
    chosen, told = bundle.variant(variant), bundle.manifest.atoms
    if told is None:
        what = "ringing atoms in the order of their strength"
        remedy = "export it again with this version, or leave atoms out"
        raise invalid(bundle.path, "atoms", what, "a bundle that tells no order", remedy)
    if count < told.num_atoms and chosen.name not in told.steps:
        what, remedy = "a variant whose atoms can be parted", "choose another, or export with --atoms"
        got = f"{chosen.name}, where blocks or pairs of weights forbid it"
        raise invalid(bundle.path, "atoms", what, got, remedy)
    step = told.steps.get(chosen.name, 1)
    kept = -(-count // step) * step
    if kept >= told.num_atoms:
        return bundle
    config, mixture = bundle.config, bundle.mixture
    model_id = hashlib.sha256(f"{bundle.manifest.model_id} {kept} atoms".encode()).hexdigest()
    return replace(
        bundle,
        config=config._replace(
            state_size=config.state_size - (told.num_atoms - kept) * told.state,
            mixing_size=config.mixing_size // told.num_atoms * kept,
        ),
        manifest=bundle.manifest._replace(
            default=chosen.name,
            variants={chosen.name: chosen},
            model_id=model_id,
            num_parameters=None,
            atoms=told._replace(num_atoms=kept),
        ),
        mixture=None if mixture is None else mixture.with_atoms(told.num_atoms, kept),
        atoms_of=told.num_atoms,
    )


def atoms_step(graph: bytes, num_atoms: int) -> int | None:
    """What the number of atoms that are kept must be a multiple of; None where none can be left out.

    Raises:
        BundleError: it is no graph.
    """
    try:
        (whole,) = _contents(graph, _GRAPH)
        steps = [step for tensor in _contents(whole, _TENSORS) if (step := _step(tensor))]
    except ValueError as e:
        raise BundleError(f"the graph cannot be read: {e}; {AGAIN}") from None
    step = math.lcm(*steps)
    return step if steps and num_atoms % step == 0 else None


def cut(graph: bytes, num_atoms: int, kept: int, config: BundleConfig, where: object) -> bytes:
    """The graph with the first `kept` of its `num_atoms` atoms, a multiple of `atoms_step`.

    `config` has the sizes of what is made.

    Raises:
        BundleError: it is no graph, or one of other atoms.
    """
    sizes = dict.fromkeys(("state", "next_state"), config.state_size)
    sizes |= dict.fromkeys(("drawn", "mixing"), config.mixing_size)
    changes: dict[int, Callable[[Content], Content | None]] = {
        _NODES: lambda node: _cut_node(node, kept),
        _TENSORS: lambda tensor: _cut_tensor(tensor, num_atoms, kept),
        _INPUTS: lambda value: _resized(value, sizes),
        _OUTPUTS: lambda value: _resized(value, sizes),
        _VALUES: lambda value: None,  # shapes of tensors and the like, which are inferred on loading
    }
    try:
        return changed(graph, {_GRAPH: lambda whole: changed(whole, changes)})
    except ValueError as e:
        raise BundleError(f"{where}: its atoms cannot be parted: {e}; {AGAIN}") from None


def _cut_tensor(tensor: Content, num_atoms: int, kept: int) -> Content:
    if not (mark := _place(tensor)):
        return tensor
    axis, times, each = mark
    dims = [int(dim) for dim in _contents(tensor, _TENSOR_DIMS)]
    (data,) = _contents(tensor, _TENSOR_DATA)
    if len(dims) <= axis or dims[axis] * each != times * num_atoms or kept % each:
        raise ValueError(f"{kept} of {num_atoms} atoms of a tensor {dims} with the mark {mark}")
    places = np.frombuffer(_bytes(data), np.uint8).reshape(
        math.prod(dims[:axis]), times, num_atoms // each, -1
    )
    dims[axis] = times * kept // each
    rest = [whole for n, _, whole in fields(tensor) if n not in (_TENSOR_DIMS, _TENSOR_DATA)]
    shape = [field(_TENSOR_DIMS, dim) for dim in dims]
    return b"".join((*shape, *rest, field(_TENSOR_DATA, places[:, :, : kept // each].tobytes())))


def _cut_node(node: Content, kept: int) -> Content:
    if not (mark := _mark(node, _NODE_METADATA)):
        return node
    attribute, times = mark

    def set_number(content: Content) -> Content:
        (name,) = _contents(content, _ATTRIBUTE_NAME)
        if _text(name) != attribute:
            return content
        return changed(content, {_ATTRIBUTE_NUMBER: lambda _: int(times) * kept})

    return changed(node, {_NODE_ATTRIBUTES: set_number})


def _resized(value: Content, sizes: Mapping[str, int]) -> Content:
    """An input or output with another last dimension, where one is told for its name."""
    (name,) = _contents(value, _VALUE_NAME)
    if (size := sizes.get(_text(name))) is None:
        return value

    def shape(content: Content) -> Content:
        *others, _ = (whole for _, _, whole in fields(content))
        return b"".join((*others, field(_SHAPE_DIMS, field(_DIM_SIZE, size))))

    def tensor(content: Content) -> Content:
        return changed(content, {_TYPE_SHAPE: shape})

    return changed(value, {_VALUE_TYPE: lambda kind: changed(kind, {_TYPE_TENSOR: tensor})})


def _step(tensor: Content) -> int:
    """Of how many atoms of a tensor none can be left out alone; 0: it has none."""
    if not (mark := _place(tensor)):
        return 0
    return mark[-1] * (_PAIR if _INT8 in _contents(tensor, _TENSOR_TYPE) else 1)


def _place(tensor: Content) -> tuple[int, int, int] | None:
    """Along which axis of a tensor atoms lie, how many times, how many in each place; None: it has none."""
    if not (mark := _mark(tensor, _TENSOR_METADATA)):
        return None
    axis, times, each = map(int, mark)
    if axis < 0 or times < 1 or each < 1:
        raise ValueError(f"a tensor with the mark {mark}")
    return axis, times, each


def _mark(part: Content, metadata: int) -> list[str]:
    """What the metadata say of the atoms; nothing where they say nothing."""
    for entry in _contents(part, metadata):
        told = {number: content for number, content, _ in fields(entry)}
        if told.get(_ENTRY_KEY) == _KEY:
            return _text(told.get(_ENTRY_VALUE, b"")).split()
    return []


def _contents(message: Content, number: int) -> Iterator[Content]:
    """The contents of all fields with a number."""
    return (content for n, content, _ in fields(message) if n == number)


def _text(content: Content) -> str:
    return str(_bytes(content), "utf-8")


def _bytes(content: Content) -> bytes | memoryview:
    if isinstance(content, int):
        raise ValueError("a number in the place of bytes")
    return content
