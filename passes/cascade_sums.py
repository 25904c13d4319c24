"""Adds up long columns in blocks, so that rounding grows with the length of a block and not of the column.

Where each lane keeps a sum of its own, a loop over the rows adds all of them one after the other, and the
error of the result grows with their number.  Sums of blocks that are added up in turn err as the length of a
block and the number of blocks do (Higham, "The accuracy of floating point summation", 1993), for one more
addition a block.  In C, sums that lanes share become such (`sum_in_lanes`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace

from apollo_fuse.expressions import Block, Load, Op
from apollo_fuse.index import Index, linearise, product
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
    in_blocks_of,
    walk,
)

BLOCK = 32  # rows
_SHORT = 4 * BLOCK  # rows up to which a column is added up as it is


def cascade_sums(kernel: Kernel) -> Kernel:
    cascading = _Cascading(kernel)
    body = cascading.steps(kernel.body)
    return replace(kernel, buffers=(*kernel.buffers, *cascading.sums.values()), body=body)


class _Cascading:
    """`sums` are the buffers for the sums of blocks, by the accumulator that they are added to."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sums: dict[str, Buffer] = {}

    def steps(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(self._cascaded(step) if isinstance(step, Loop) else step for step in steps)

    def _cascaded(self, loop: Loop) -> Loop:
        """The innermost long loop around a sum becomes two, over blocks of rows and over the rows of one."""
        loop = replace(loop, body=self.steps(loop.body))
        if loop.kind is not LoopKind.SEQUENTIAL or not _is_long(loop):
            return loop
        started = {s.target.buffer for s in walk(loop.body) if isinstance(s, Initialise)}
        own: dict[str, Target] = {}
        starts: dict[tuple[Loop, ...], list[Step]] = {}  # by the lanes that keep the sums
        ends: dict[tuple[Loop, ...], list[Step]] = {}
        for fold, around in _folds(loop.body, ()):
            (target,) = fold.targets
            inside = target.offset.iterators()
            lanes = tuple(replace(lane, body=()) for lane in around if lane.iterator in inside)
            if not lanes or target.buffer in started | self.sums.keys() or not self._adds_floats(fold):
                continue
            sums = self._buffer(target.buffer, lanes)
            own[target.buffer] = Target(sums.name, linearise(_places(lanes), _extents(lanes)))
            read = Block((Load(sums.name, (own[target.buffer].offset,), sums.dtype),))
            starts.setdefault(lanes, []).append(Initialise(own[target.buffer], Op.ADD))
            ends.setdefault(lanes, []).append(Compute(fold.statement, read, (target,), Op.ADD))
        if not own:
            return loop
        block, inner = in_blocks_of(loop, BLOCK)
        inner = replace(inner, body=tuple(folded_into(own, step) for step in inner.body))
        return Loop(block, LoopKind.SEQUENTIAL, (*_in_lanes(starts), inner, *_in_lanes(ends)))

    def _adds_floats(self, fold: Compute) -> bool:
        return fold.combine is Op.ADD and self.kernel.buffer(fold.targets[0].buffer).dtype.is_float

    def _buffer(self, accumulator: str, lanes: tuple[Loop, ...]) -> Buffer:
        dtype, size = self.kernel.buffer(accumulator).dtype, product(_extents(lanes))
        self.sums[accumulator] = Buffer(f"{accumulator}_block", dtype, size, Scope.REGISTER)
        return self.sums[accumulator]


def _is_long(loop: Loop) -> bool:
    known = loop.iterator.extent.constant
    return known is None or known > _SHORT


def _folds(steps: tuple[Step, ...], around: tuple[Loop, ...]) -> Generator[tuple[Compute, tuple[Loop, ...]]]:
    """What folds into an accumulator, with the loops around it."""
    for step in steps:
        if isinstance(step, Loop):
            yield from _folds(step.body, (*around, step))
        elif isinstance(step, Compute) and step.combine is not None:
            yield step, around


def _places(lanes: tuple[Loop, ...]) -> tuple[Index, ...]:
    return tuple(Index.of(lane.iterator) for lane in lanes)


def _extents(lanes: tuple[Loop, ...]) -> tuple[Index, ...]:
    return tuple(lane.iterator.extent for lane in lanes)


def _in_lanes(steps: Mapping[tuple[Loop, ...], list[Step]]) -> Generator[Step]:
    for lanes, run in steps.items():
        body = tuple(run)
        for lane in reversed(lanes):
            body = (replace(lane, body=body),)
        yield from body


def folded_into(own: Mapping[str, Target], step: Step) -> Step:
    """The step with its folds going to these sums in the place of the accumulators named."""
    match step:
        case Loop():
            return replace(step, body=tuple(folded_into(own, child) for child in step.body))
        case Compute() if step.combine is not None and step.targets[0].buffer in own:
            return replace(step, targets=(own[step.targets[0].buffer],))
        case _:
            return step
