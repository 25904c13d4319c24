"""Writes a result that is another shape of a tensor in the order in which that tensor is made.

A view whose shape has no axes in common with its source's (blocks of channels, shown as the image that
onnxruntime takes them for) reads its source through quotients of sums, along which no loop runs well. The
elements are the same and lie alike: so the loops become those of the source, and the quotients stand in the
place that is written, where they cancel out as soon as it is an offset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from apollo_fuse.expressions import Block, Instruction, Load
from apollo_fuse.graph import Pattern, Primitive, Value
from apollo_fuse.index import delinearise, linearise, mixes_axes
from apollo_fuse.passes.access_composition import point_of


def write_as_made(primitives: Sequence[Primitive], results: frozenset[str]) -> tuple[Primitive, ...]:
    """The primitives with each such result written so, where nothing else here has to read it.

    What reads it through the opposite view, a pool in blocks say, reads the source instead.
    """
    primitives = _seen_through(primitives)
    readers = Counter(name for p in primitives for name in {load.tensor for load in p.block.loads})
    for view in primitives:
        if view.output.name in results and not readers[view.output.name]:
            primitives = _written(view, primitives, results, readers)
    return tuple(primitives)


def _seen_through(primitives: Sequence[Primitive]) -> Sequence[Primitive]:
    made = {p.output.name for p in primitives}
    views = {p.output.name: p for p in primitives if _mixes(p) and p.block.loads[0].tensor in made}

    def source(item: Instruction) -> Instruction:
        if not isinstance(item, Load) or item.tensor not in views:
            return item
        view = views[item.tensor]
        at, load = point_of(view, item.indices), view.block.loads[0]
        indices = tuple(index.substitute(at) for index in load.indices)
        return item if any(map(mixes_axes, indices)) else source(replace(load, indices=indices))

    return [replace(p, block=Block(tuple(map(source, p.block.instructions)))) for p in primitives]


def _written(
    view: Primitive, primitives: Sequence[Primitive], results: frozenset[str], readers: Counter[str]
) -> Sequence[Primitive]:
    source, shared = view, False
    made: list[Primitive] = [view]
    while len(made) == 1 and _mixes(source):
        name = source.block.loads[0].tensor
        above = [p for p in primitives if p.output.name == name]
        if not above:  # an operand
            break
        shared |= readers[name] > 1 or name in results
        made, source = above, above[0]
    if source is view or (shared and len(made) > 1):
        return primitives
    written = [_through(p, view.output, shared) for p in made]
    dropped = [view] if shared else [view, *made]
    return [p for p in primitives if not any(p is d for d in dropped)] + written


def _mixes(view: Primitive) -> bool:
    """Whether it is a view that no splitting of loops, or only that of most, makes one along its source's."""
    indices = (index for load in view.block.loads for index in load.indices)
    return view.pattern is Pattern.RESHAPE and any(map(mixes_axes, indices))


def _through(made: Primitive, result: Value, shared: bool) -> Primitive:
    """The primitive with its elements in `result`; where others need them too, read from where they are."""
    at = delinearise(linearise(made.indices, made.output.shape), result.shape)
    if not shared:
        return replace(made, output=result, indices=at)
    load = Load(made.output.name, made.indices, made.output.dtype)
    return replace(made, output=result, indices=at, reduction=None, block=Block((load,)))
