"""The shapes of what a Loop carries from one iteration to the next, proved by induction.

Inference guesses that a carried value keeps the shape of its initial value. A dimension holds in every
iteration if the body, given the guess, makes it again; each one that it does not make again becomes a symbol
of its own, and inference runs once more, until all that is guessed is proved.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY

from apollo_fuse.bodies import bodies

Dim: TypeAlias = int | ir.SymbolicDim


@dataclass(frozen=True, slots=True)
class _Entry:
    """An input of a body, and the input of the node that it comes from.

    `sources` are what a Loop carries into it: the initial value, and what an iteration makes. `declared`
    holds the extents that the body's type states, None for one that it leaves open.
    """

    node: ir.Node
    place: int
    inside: ir.Value
    sources: tuple[ir.Value | None, ...]
    declared: tuple[int | None, ...] | None


@dataclass(slots=True)
class _Symbols:
    """Extents of which nothing is known, each with a name of its own: ``b0, b1, ...``."""

    minted: set[str] = field(default_factory=set)

    def new(self) -> ir.SymbolicDim:
        name = f"b{len(self.minted)}"
        self.minted.add(name)
        return ir.SymbolicDim(name)

    def has(self, dim: Dim) -> bool:
        return isinstance(dim, ir.SymbolicDim) and dim.value in self.minted


def infer_with_loops(graphs: Sequence[ir.Graph], infer: Callable[[], None]) -> None:
    """Runs `infer` until the shapes that it gives the inputs of bodies hold in every iteration."""
    entries = [entry for graph in graphs for node in graph for entry in _entries(node)]
    for entry in entries:
        if entry.inside.shape is not None and not entry.inside.shape.is_static():
            entry.inside.shape = None  # inference finds the extents that the type leaves open
    symbols = _Symbols()
    known: dict[_Entry, ir.Shape | None] = {}  # where a guess was not proved
    before = _Claims.of(graphs)
    while True:
        try:
            with _hidden(entry for entry, shape in known.items() if shape is None):
                infer()
        except ValueError:  # a guess does not fit the body
            found = {e: _without_guess(e, symbols) for e in entries if e.sources and e not in known}
            if not found:
                raise
        else:
            found = {e: _proved(e, symbols) for e in entries}
            found = {e: shape for e, shape in found.items() if not _same(shape, e.inside.shape)}
            if not found:
                return
        known |= found
        before.restore()
        for entry, shape in known.items():
            entry.inside.shape = shape


def _entries(node: ir.Node) -> Iterator[_Entry]:
    if node.op_type == "If":
        return
    for body in bodies(node):
        for place, inside in enumerate(body.inputs):
            carried = node.op_type == "Loop" and place >= 2
            sources = (node.inputs[place], body.outputs[place - 1]) if carried else ()
            declared = None
            if inside.shape is not None:
                declared = tuple(dim if isinstance(dim, int) else None for dim in inside.shape)
            yield _Entry(node, place, inside, sources, declared)


def _proved(entry: _Entry, symbols: _Symbols) -> ir.Shape | None:
    """What holds in every iteration, if what inference started from holds in the one before."""
    claim, declared = entry.inside.shape, entry.declared
    sources = [None if source is None else source.shape for source in entry.sources]
    rank = len(declared) if declared is not None else None if claim is None else len(claim)
    if rank is None or any(shape is not None and len(shape) != rank for shape in (claim, *sources)):
        return None
    if declared is None and None in sources:
        return None
    dims: list[Dim] = []
    for axis in range(rank):
        claimed = None if claim is None else claim[axis]
        stated = None if declared is None else declared[axis]
        made = [None if shape is None else shape[axis] for shape in sources]
        if claimed is not None and symbols.has(claimed):
            dims.append(claimed)
        elif stated is not None and all(dim == stated for dim in made if isinstance(dim, int)):
            dims.append(stated)
        elif claimed is not None and all(dim == claimed for dim in made):
            dims.append(claimed)
        else:
            dims.append(symbols.new())
    return ir.Shape(dims)


def _without_guess(entry: _Entry, symbols: _Symbols) -> ir.Shape | None:
    """What the body's type says alone."""
    if entry.declared is None:
        return None
    return ir.Shape([symbols.new() if extent is None else extent for extent in entry.declared])


def _same(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    return (None if a is None else list(a)) == (None if b is None else list(b))


@contextmanager
def _hidden(entries: Iterable[_Entry]) -> Generator[None]:
    """Keeps inference from giving these inputs of bodies the shapes that the node's inputs have."""
    changed: list[tuple[_Entry, ir.Value]] = []
    for entry in entries:
        source = entry.node.inputs[entry.place]
        if source is not None:
            entry.node.replace_input_with(entry.place, ir.Value(name=source.name, type=source.type))
            changed.append((entry, source))
    try:
        yield
    finally:
        for entry, source in changed:
            entry.node.replace_input_with(entry.place, source)


@dataclass(frozen=True, slots=True)
class _Claims:
    """What was known of each value before inference."""

    values: tuple[tuple[ir.Value, ir.Shape | None, ir.TensorProtocol | None], ...]

    @staticmethod
    def of(graphs: Sequence[ir.Graph]) -> _Claims:
        made = [value for graph in graphs for node in graph for value in node.outputs]
        taken = [value for graph in graphs for value in graph.inputs]
        return _Claims(tuple((value, value.shape, value.const_value) for value in (*made, *taken)))

    def restore(self) -> None:
        for value, shape, constant in self.values:
            value.shape, value.const_value = shape, constant
            value.metadata_props.pop(SYM_DATA_KEY, None)
