"""Gives each tensor that a lane loop writes rows of a loop of its own, where rows begin within a cache line.

A vector is stored across two lines then. Stores of one row after the other a processor puts together line by
line; where two rows take turns, it may not: copying rows of 196 floats and computing others from them takes
an Intel Xeon (Sapphire Rapids) twice as long in one loop as in two. What is read again is in the nearest
cache. An AMD EPYC takes as long either way.
"""

from __future__ import annotations

from dataclasses import replace

from apollo_fuse.expressions import Apply, Block, cost_of
from apollo_fuse.index import Atom, Iterator
from apollo_fuse.kernel import Buffer, Compute, Kernel, Loop, Scope, Step, Target, with_lane_loops
from apollo_fuse.passes.distribute_lanes import one_each

_LINE = 64  # bytes
_FEWEST = 16  # lanes, a vector of 4-byte elements with AVX-512
_MOST_BYTES = 16 * 1024  # of the rows that a loop reads, to be in the nearest cache for the next
_DEAR = 4  # cheap operations that are not to be computed twice


def part_streams(kernel: Kernel) -> Kernel:
    return replace(kernel, body=with_lane_loops(kernel.body, lambda loop: _parts(kernel, loop)))


def _parts(kernel: Kernel, loop: Loop) -> list[Step]:
    steps = [step for step in loop.body if isinstance(step, Compute)]
    if not _is_short(steps, loop.iterator):
        return [loop]
    written = [target for step in steps for target in step.targets]
    streams = {t.buffer for t in written if _crosses_lines(kernel.buffer(t.buffer), t, loop.iterator)}
    return one_each(loop) if len(streams) > 1 and _shared(steps, loop.iterator) < _DEAR else [loop]


def _is_short(steps: list[Compute], lane: Iterator) -> bool:
    lanes = lane.extent.constant
    if lanes is None or lanes < _FEWEST:
        return False
    rows = {load for step in steps for load in step.block.loads if lane in load.indices[0].iterators()}
    return lanes * sum(load.dtype.size for load in rows) <= _MOST_BYTES


def _crosses_lines(buffer: Buffer, target: Target, lane: Iterator) -> bool:
    """Whether vectors are stored to memory, and rows begin at places that are no multiple of a line apart."""
    along = target.offset.coefficient(lane)
    if buffer.scope is not Scope.GLOBAL or along is None or not along.is_one:
        return False
    apart = (target.offset.coefficient(other) for other in target.offset.iterators() - {lane})
    known = [factor.constant for factor in apart if factor is not None]
    return any(factor is not None and factor * buffer.dtype.size % _LINE for factor in known)


def _shared(steps: list[Compute], lane: Atom) -> int:
    """Cheap operations of each lane that several of the statements have in common."""
    found: set[Block] = set()
    shared: set[Block] = set()
    for step in steps:
        places = [n for n, item in enumerate(step.block.instructions) if isinstance(item, Apply)]
        own = {step.block.part(place) for place in places}
        shared |= own & found
        found |= own
    moving = [b for b in shared if any(lane in load.indices[0].atoms() for load in b.loads)]
    return sum(cost_of(block.instructions[-1]) for block in moving)
