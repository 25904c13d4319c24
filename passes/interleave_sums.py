"""Adds up cheap sums at several places of a row at a time, so that additions seldom wait for each other.

A compiler gives a sum that lanes share one vector of partial sums.  Where little is done to each element, the
loop then takes as long as its additions take one after the other.  With the row in four parts, side by side,
there are four that do not need each other.  That is for rows that an earlier loop has brought near: out of
memory a row comes fastest when it is read from one end to the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from apollo_fuse.expressions import Apply, Block, Load, Op, cost_of
from apollo_fuse.index import ZERO, Index, Iterator
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Initialise,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
    part_of,
    substituted,
    walk,
    with_lane_loops,
)

_PARTS = 4
_CHEAP = 4  # operations an element, from which on they take as long as an addition does
_LONG = 256  # elements; a shorter row is over before it matters


def interleave_sums(kernel: Kernel) -> Kernel:
    interleaving = _Interleaving(kernel)
    body = with_lane_loops(kernel.body, interleaving.instead)
    return replace(kernel, buffers=(*kernel.buffers, *interleaving.partial), body=body)


@dataclass(slots=True)
class _Interleaving:
    """`partial` are the accumulators of the parts behind the first, `near` the rows that loops went over."""

    kernel: Kernel
    partial: list[Buffer] = field(default_factory=list)
    near: set[Target] = field(default_factory=set)

    def instead(self, loop: Loop) -> list[Step]:
        interleaved = self._interleaved(loop)
        self.near |= _rows(loop)
        return interleaved

    def _interleaved(self, loop: Loop) -> list[Step]:
        folds = self._folds(loop)
        if not folds:
            return [loop]
        lane, extent = loop.iterator, loop.iterator.extent
        part = Iterator(lane.name, extent // _PARTS)
        starts: list[Step] = []
        body: list[Step] = []
        ends: list[Step] = []
        for number in range(_PARTS):
            for fold in folds:
                (target,) = fold.targets
                if number:
                    statement = f"{fold.statement}_{number}"
                    own = own_sum(self.kernel, fold, f"{target.buffer}_{number}", statement)
                    self.partial.append(own.buffer)
                    starts.append(own.start)
                    ends.append(own.end)
                    fold = replace(own.fold, statement=statement)
                body.append(substituted(fold, {lane: Index.of(part) + part.extent * number}))
        steps = [*starts, Loop(part, LoopKind.LANE, tuple(body)), *ends]
        done = part.extent * _PARTS
        if not (extent - done).is_zero:
            steps.append(part_of(replace(loop, kind=LoopKind.SEQUENTIAL), done, extent - done))
        return steps

    def _folds(self, loop: Loop) -> list[Compute]:
        """The statements of a loop that does little else than to add up, and for long."""
        folds = sums_of(self.kernel, loop)
        known = loop.iterator.extent.constant
        short = known is not None and known < _LONG
        if len(folds) < len(loop.body) or short or loop.limit is not None or not _rows(loop) <= self.near:
            return []
        return folds if sum(_cost(fold.block, loop.iterator) for fold in folds) <= _CHEAP else []


@dataclass(frozen=True, slots=True)
class OwnSum:
    """A sum apart from the one that a fold adds to: its start, the fold into it, and what adds it there."""

    buffer: Buffer
    start: Initialise
    fold: Compute
    end: Compute


def own_sum(kernel: Kernel, fold: Compute, name: str, statement: str) -> OwnSum:
    """One of this name; `statement` is that of its end."""
    (target,) = fold.targets
    buffer, own = replace(kernel.buffer(target.buffer), name=name), Target(name, ZERO)
    read = Block((Load(name, (ZERO,), buffer.dtype),))
    end = Compute(statement, read, (target,), Op.ADD)
    return OwnSum(buffer, Initialise(own, Op.ADD), replace(fold, targets=(own,)), end)


def sums_of(kernel: Kernel, loop: Loop) -> list[Compute]:
    """The statements of a lane loop that add up floating-point numbers in a register that its lanes share."""

    def is_sum(step: Compute) -> bool:
        buffer = kernel.buffer(step.targets[0].buffer)
        return buffer.scope is Scope.REGISTER and buffer.size.is_one and buffer.dtype.is_float

    computes = (step for step in loop.body if isinstance(step, Compute))
    return [step for step in computes if step.combine is Op.ADD and is_sum(step)]


def _rows(loop: Loop) -> set[Target]:
    """What the lanes read and write, by the first one's place."""
    computes = [step for step in walk(loop.body) if isinstance(step, Compute)]
    reads = (Target(x.tensor, x.indices[0]) for step in computes for x in step.block.loads)
    places = (place for places in (reads, (t for step in computes for t in step.targets)) for place in places)
    return {
        Target(place.buffer, place.offset.substitute({loop.iterator: ZERO}))
        for place in places
        if loop.iterator in place.offset.atoms()
    }


def _cost(block: Block, lane: Iterator) -> int:
    """Cheap operations of a lane; what is alike for all of them a compiler does before the loop."""
    varying: set[int] = set()
    cost = 0
    for place, item in enumerate(block.instructions):
        match item:
            case Apply(_, operands, _) if not varying.isdisjoint(operands):
                varying.add(place)
                cost += cost_of(item)
            case Load(_, indices, _) if lane in indices[0].atoms():
                varying.add(place)
    return cost
