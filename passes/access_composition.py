"""Composes accesses: what a reader wants of a producer, in the producer's own terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from apollo_fuse.expressions import Apply, Block, Constant, Instruction, Load, Position
from apollo_fuse.graph import Primitive
from apollo_fuse.index import Atom, Index, Indirect
from apollo_fuse.scop import Statement


def point_of(producer: Primitive | Statement, indices: tuple[Index, ...]) -> Mapping[Atom, Index]:
    """The producer's iterators when its element at `indices` is wanted."""
    values: dict[Atom, Index] = {}
    for own, wanted in zip(producer.indices, indices, strict=True):
        for iterator in own.iterators():
            values[iterator] = wanted
    return values


def without_index_views(primitives: Sequence[Primitive]) -> tuple[Primitive, ...]:
    """The primitives with index tensors that are views (an Unsqueeze of labels) read where they lie."""
    made = [p.output.name for p in primitives]
    views = {
        p.output.name: p
        for p in primitives
        if len(p.block.instructions) == 1 and p.reduction is None and made.count(p.output.name) == 1
    }

    def source(atom: Atom) -> Index | None:
        if not isinstance(atom, Indirect) or atom.tensor not in views:
            return None
        view = views[atom.tensor]
        at = point_of(view, tuple(i.rewrite(source) for i in atom.indices))
        (item,) = view.block.instructions
        if not isinstance(item, Load):
            return None
        within = tuple(i.substitute(at) for i in item.indices)
        return Index.of(Indirect(item.tensor, within, atom.extent)).rewrite(source)

    def instruction(item: Instruction) -> Instruction:
        match item:
            case Load(tensor, indices, dtype):
                return Load(tensor, tuple(i.rewrite(source) for i in indices), dtype)
            case Position(index, dtype):
                return Position(index.rewrite(source), dtype)
            case Constant() | Apply():
                return item

    return tuple(replace(p, block=Block(tuple(map(instruction, p.block.instructions)))) for p in primitives)
