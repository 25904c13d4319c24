"""Covers short lane loops with whole vectors: the last one starts early enough to end where the loop does.

Where a loop's length is no multiple of a vector's, a compiler does the rest of it in halves, in quarters and
at last one by one, which for the rows of a small image takes longer than all before.  Here some of the last
vector's lanes are computed a second time instead, to the same result; to what is added up they add nothing.
Rows whose length a run decides have such a vector where their lanes take long: the windows of a convolution
over rows of 20 take two thirds of the time then, those over rows of 24, which leave nothing, 3 % more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, BlockBuilder, Constant, Op, Position, identity
from apollo_fuse.index import ONE, ZERO, Index, Iterator, minimum
from apollo_fuse.kernel import (
    Compute,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    part_of,
    read_by,
    with_lane_loops,
    written_by,
)

SHORTEST = 8
"""Lanes of the shortest vector that is worth it, which covers what is left of a row."""
_LANES = 16  # of a vector; that of 4-byte elements with AVX-512
_DEAR = 8  # cheap operations of a lane from which on a row of open length is covered too
_LONG = 1024  # lanes from which on the rest does not matter
_MANY_READS = 16
"""Of a body; gcc keeps a pointer for each in a loop over vectors, and those in memory."""


def overlap_tails(kernel: Kernel) -> Kernel:
    return replace(kernel, body=with_lane_loops(kernel.body, lambda loop: _covered(kernel, loop)))


def is_covered(kernel: Kernel, loop: Loop) -> bool:
    """Whether whole vectors do the loop, where it is `SHORTEST` lanes long or longer."""
    extent = loop.iterator.extent.constant
    if loop.limit is not None:
        return False
    if extent is None:
        return _is_dear(loop) and may_repeat(kernel, loop)
    short = SHORTEST <= extent < _LONG and extent % _lanes(extent)
    return bool(short) and not _compares(loop) and may_repeat(kernel, loop)


def _lanes(extent: int) -> int:
    """Of the widest vector that a row of this length fills."""
    return min(_LANES, 1 << (extent.bit_length() - 1))


def _is_dear(loop: Loop) -> bool:
    """Whether what is left of a row takes long enough to matter, and is not added up."""
    computes = [step for step in loop.body if isinstance(step, Compute)]
    return all(step.combine is None for step in computes) and _is_costly(computes)


def _is_costly(computes: Sequence[Compute]) -> bool:
    return sum(step.block.cost for step in computes) >= _DEAR


def _compares(loop: Loop) -> bool:
    """Whether it looks for a maximum or minimum of what is there: two loops would end so twice."""
    computes = [step for step in loop.body if isinstance(step, Compute)]
    return not _is_costly(computes) and all(step.combine in (Op.MAX, Op.MIN) for step in computes)


def _covered(kernel: Kernel, loop: Loop) -> list[Step]:
    if not is_covered(kernel, loop):
        return [loop]
    extent = loop.iterator.extent.constant
    if extent is None:
        return _open_vectors(loop, loop.iterator.extent)
    lanes = _lanes(extent)
    count, left = divmod(extent, lanes)
    width = SHORTEST if left <= SHORTEST else lanes
    return [_vectors(loop, count, lanes), last_lanes(loop, extent, width, left)]


def _open_vectors(loop: Loop, extent: Index) -> list[Step]:
    """Whole vectors, and where these leave some lanes, one more that ends where the row does.

    A row that is no vector long is done as it is.
    """
    name, count = loop.iterator.name, extent // SHORTEST
    some = minimum(count, ONE)
    left = (extent + (SHORTEST - 1)) // SHORTEST - count

    def where(suffix: str, holds: Index, *parts: Loop) -> Loop:
        return Loop(Iterator(f"{name}_{suffix}", holds), LoopKind.SEQUENTIAL, parts)

    last = where("last", some, part_of(loop, extent - SHORTEST, Index.of(SHORTEST)))
    short = where("short", ONE - some, part_of(loop, ZERO, extent))
    return [part_of(loop, ZERO, count * SHORTEST), where("left", left, last, short)]


def last_lanes(loop: Loop, extent: int, lanes: int, left: int) -> Loop:
    """So many lanes, which end where the loop does and of which only so many are left to do."""
    last = part_of(loop, Index.of(extent - lanes), Index.of(lanes))
    return replace(last, body=tuple(_from(lanes - left, last.iterator, step) for step in last.body))


def _vectors(loop: Loop, count: int, lanes: int) -> Loop:
    """The loop over so many vectors; one by one where each reads so much that a compiler loses track."""
    computes = [step for step in loop.body if isinstance(step, Compute)]
    reads = {load for step in computes for load in step.block.loads}
    if count == 1 or len(reads) < _MANY_READS:
        return part_of(loop, ZERO, Index.of(count * lanes))
    vector = Iterator(f"{loop.iterator.name}_vector", Index.of(count))
    return Loop(vector, LoopKind.SEQUENTIAL, (part_of(loop, Index.of(vector) * lanes, Index.of(lanes)),))


def may_repeat(kernel: Kernel, loop: Loop) -> bool:
    """Whether lanes lie side by side, and may be written twice: by what does not overwrite what is read."""
    computes = [step for step in loop.body if isinstance(step, Compute)]
    if len(computes) < len(loop.body) or not all(_side_by_side(step, loop.iterator) for step in computes):
        return False
    return not overwrites(kernel, tuple(step for step in computes if step.combine is None), loop.body)


def overwrites(kernel: Kernel, writers: tuple[Step, ...], readers: tuple[Step, ...]) -> bool:
    """Whether these write to memory that those read, by whatever name."""
    return not _memory(kernel, written_by(writers)).isdisjoint(_memory(kernel, read_by(readers)))


def _side_by_side(step: Compute, lane: Iterator) -> bool:
    """Whether nothing jumps from lane to lane, to be moved in tiles (codegen/transposed.py)."""
    offsets = (*(load.indices[0] for load in step.block.loads), *(target.offset for target in step.targets))
    along = (offset.coefficient(lane) for offset in offsets)
    return all(factor is not None and (factor.is_zero or factor.is_one) for factor in along)


def _memory(kernel: Kernel, names: set[str]) -> set[str]:
    """The buffers whose memory is meant; what a lane has in registers is its own."""
    buffers = [kernel.buffer(name) for name in names]
    return {b.host or b.name for b in buffers if b.scope is not Scope.REGISTER}


def _from(first: int, lane: Iterator, step: Step) -> Step:
    """The step, of which the lanes before the first one combine nothing."""
    if not isinstance(step, Compute) or step.combine is None:
        return step
    builder = BlockBuilder()
    value = builder.append(step.block, {})
    here = builder.add(Position(Index.of(lane), DType.INT64))
    counts = builder.add(Apply(Op.LE, (builder.add(Constant(first, DType.INT64)), here), DType.BOOL))
    dtype = step.block.dtype
    nothing = builder.add(identity(step.combine, dtype))
    builder.add(Apply(Op.SELECT, (counts, value, nothing), dtype))
    return replace(step, block=builder.build())
