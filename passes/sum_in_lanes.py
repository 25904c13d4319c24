"""Adds up a row in 32 sums side by side, and those in halves at the end.

A compiler gives a sum that lanes share one vector of partial sums.  A loop that does little else then takes
as long as its additions one after the other, and so does the end, where the lanes of that vector are added up
in order.  32 sums are two vectors or more, that do not wait for each other, and in the end one half is added
to the other until one sum is left.  The result depends on the length of the row, and not on how wide vectors
are.  Long rows are added up in blocks, as columns are in `cascade_sums`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from apollo_fuse.expressions import Apply, Block, Load, Op
from apollo_fuse.index import ONE, ZERO, Index, Iterator
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
    with_lane_loops,
)
from apollo_fuse.passes.cascade_sums import cascade_sums, folded_into
from apollo_fuse.passes.overlap_tails import last_lanes, may_repeat

SUMS = 32
VECTOR = 16  # sums of a row that is shorter than twice the others, and lanes that may cover the end of one


def sum_in_lanes(kernel: Kernel) -> Kernel:
    rows = _Rows(kernel)
    body = with_lane_loops(kernel.body, rows.instead)
    return replace(kernel, buffers=(*kernel.buffers, *rows.buffers), body=body)


@dataclass(slots=True)
class _Rows:
    """`buffers` are those of the sums side by side."""

    kernel: Kernel
    buffers: list[Buffer] = field(default_factory=list)

    def instead(self, loop: Loop) -> list[Step]:
        folds = _folds(self.kernel, loop)
        known = loop.iterator.extent.constant
        if not folds or (known is not None and known < VECTOR):
            return [loop]
        width = VECTOR if known is not None and known < 2 * SUMS else SUMS
        sums = {fold.targets[0].buffer: self._sums(fold, width) for fold in folds}
        name = loop.iterator.name
        lane = Iterator(name, Index.of(width))
        start = [Initialise(Target(own.name, Index.of(lane)), Op.ADD) for own in sums.values()]
        end = [step for total, own in sums.items() for step in _added_up(own, width, total, name)]
        return [Loop(lane, LoopKind.LANE, tuple(start)), *self._row(loop, sums, width), *end]

    def _sums(self, fold: Compute, width: int) -> Buffer:
        """Of the name of the total, with a number, as several loops may add to it."""
        total = self.kernel.buffer(fold.targets[0].buffer)
        name = f"{total.name}_lanes{len(self.buffers)}"
        self.buffers.append(Buffer(name, total.dtype, Index.of(width), Scope.REGISTER))
        return self.buffers[-1]

    def _row(self, loop: Loop, sums: dict[str, Buffer], width: int) -> list[Step]:
        """The loop in steps of so many lanes, and what is left of it."""
        step = Iterator(f"{loop.iterator.name}_step", loop.turns // width)
        lanes = _folding_into(sums, part_of(loop, Index.of(step) * width, Index.of(width)))
        steps = Loop(step, LoopKind.SEQUENTIAL, (lanes,))
        known = (*self.kernel.buffers, *self.buffers)
        cascaded = cascade_sums(replace(self.kernel, buffers=known, body=(steps,)))
        self.buffers += cascaded.buffers[len(known) :]
        rest = loop.turns - step.extent * width
        if rest.is_zero:
            return [*cascaded.body]
        return [*cascaded.body, _folding_into(sums, _tail(self.kernel, loop, rest))]


def _folds(kernel: Kernel, loop: Loop) -> list[Compute]:
    """The sums of floating-point numbers that the lanes share, if these share nothing else."""
    computes = [step for step in loop.body if isinstance(step, Compute)]
    shared = [
        step
        for step in computes
        if step.combine is not None and kernel.buffer(step.targets[0].buffer).is_register
    ]
    floats = all(step.combine is Op.ADD and step.block.dtype.is_float for step in shared)
    return shared if floats and len(computes) == len(loop.body) else []


def _tail(kernel: Kernel, loop: Loop, rest: Index) -> Loop:
    """The last turns of the loop: where their number is known, in whole vectors that begin before them."""
    extent, left = loop.turns.constant, rest.constant
    if extent is None or left is None or not may_repeat(kernel, loop):
        return part_of(loop, loop.turns - rest, rest)
    return last_lanes(loop, extent, VECTOR if left <= VECTOR else SUMS, left)


def _folding_into(sums: dict[str, Buffer], loop: Loop) -> Loop:
    """The loop with what it adds to totals going to the sums of its lanes."""
    own = {total: Target(lanes.name, Index.of(loop.iterator)) for total, lanes in sums.items()}
    return replace(loop, body=tuple(folded_into(own, step) for step in loop.body))


def _added_up(sums: Buffer, width: int, total: str, name: str) -> list[Step]:
    """Adds the second half of the sums to the first, and so on, and the last two of them to the total."""
    steps: list[Step] = []
    half = width // 2
    while half > 1:
        lane = Iterator(name, Index.of(half))
        here, there = Index.of(lane), Index.of(lane) + half
        read = Block((Load(sums.name, (there,), sums.dtype),))
        add = Compute(f"{total}_{half}", read, (Target(sums.name, here),), Op.ADD)
        steps.append(Loop(lane, LoopKind.LANE, (add,)))
        half //= 2
    first, second = (Load(sums.name, (place,), sums.dtype) for place in (ZERO, ONE))
    both = Block((first, second, Apply(Op.ADD, (0, 1), sums.dtype)))
    return [*steps, Compute(f"{total}_1", both, (Target(total, ZERO),), Op.ADD)]
