"""Computes four rows at a time where windows slide over rows, which have most of what they read in common.

A window of three rows reads each row of a tensor three times.  With four rows of results in one lane loop
(unroll and jam), six rows are read for all of them, and the weights of the window once instead of four times.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from apollo_fuse.expressions import Block, Load
from apollo_fuse.index import ONE, ZERO, Atom, Index, Iterator
from apollo_fuse.kernel import Buffer, Compute, Kernel, Loop, LoopKind, Scope, Step, substituted

_ROWS = 4


def jam_rows(kernel: Kernel) -> Kernel:
    jam = _Jam(kernel)
    body = jam.steps(kernel.body)
    return replace(kernel, buffers=(*kernel.buffers, *jam.registers.values()), body=body)


@dataclass(slots=True)
class _Jam:
    """`registers` are those of rows other than the first, by name."""

    kernel: Kernel
    registers: dict[str, Buffer] = field(default_factory=dict)

    def steps(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        result: list[Step] = []
        for step in steps:
            if not isinstance(step, Loop) or step.kind is not LoopKind.SEQUENTIAL:
                result.append(step)
            elif (lanes := _windowed_lanes(step)) is None:
                result.append(replace(step, body=self.steps(step.body)))
            else:
                result += self._in_fours(step, lanes)
        return tuple(result)

    def _in_fours(self, rows: Loop, lanes: Loop) -> list[Step]:
        extent = rows.iterator.extent

        def part(start: Index, count: Index, together: int) -> Loop:
            row = Iterator(rows.iterator.name, count)
            body: list[Step] = []
            for number in range(together):
                place: dict[Atom, Index] = {rows.iterator: Index.of(row) * together + start + number}
                moved = tuple(substituted(step, place) for step in lanes.body)
                body += self._renamed(moved, f"_{number}") if number else moved
            return Loop(row, LoopKind.SEQUENTIAL, (replace(lanes, body=tuple(body)),))

        fours = extent // _ROWS
        rest = extent - fours * _ROWS
        left = (ONE, rest.constant) if rest.constant else (rest, 1)  # one by one where their number is open
        parts = ((ZERO, fours, _ROWS), (fours * _ROWS, *left))
        return [part(start, count, together) for start, count, together in parts if not count.is_zero]

    def _renamed(self, steps: tuple[Step, ...], suffix: str) -> list[Step]:
        """The steps of a row with names of their own for what they compute and pass on in registers."""
        computes = [step for step in steps if isinstance(step, Compute)]
        passed = (self.kernel.buffer(t.buffer) for s in computes if s.combine is None for t in s.targets)
        own = {b.name: replace(b, name=f"{b.name}{suffix}") for b in passed if b.scope is Scope.REGISTER}
        self.registers |= {buffer.name: buffer for buffer in own.values()}

        def name(old: str) -> str:
            return own[old].name if old in own else old

        def block(old: Block) -> Block:
            items = (
                replace(x, tensor=name(x.tensor)) if isinstance(x, Load) else x for x in old.instructions
            )
            return Block(tuple(items))

        return [
            Compute(
                f"{step.statement}{suffix}",
                block(step.block),
                tuple(replace(t, buffer=name(t.buffer)) for t in step.targets),
                step.combine,
            )
            for step in computes
        ]


def _windowed_lanes(rows: Loop) -> Loop | None:
    """The lane loop that is all of a row, where neighbouring rows read the same elements."""
    if len(rows.body) != 1 or rows.limit is not None or rows.iterator.extent.is_one:
        return None
    (lanes,) = rows.body
    if not isinstance(lanes, Loop) or lanes.kind is not LoopKind.LANE or lanes.limit is not None:
        return None
    if not all(isinstance(step, Compute) for step in lanes.body):
        return None
    return lanes if any(_overlaps(step, rows.iterator) for step in lanes.body) else None


def _overlaps(step: Step, row: Iterator) -> bool:
    """Whether the step of a row reads an element that the step of the next row reads, too."""
    if not isinstance(step, Compute):
        return False
    offsets = {(load.tensor, load.indices[0]) for load in step.block.loads if row in load.indices[0].atoms()}
    following: dict[Atom, Index] = {row: Index.of(row) + ONE}
    return any((tensor, offset.substitute(following)) in offsets for tensor, offset in offsets)
