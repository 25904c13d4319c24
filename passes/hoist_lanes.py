"""Computes what is alike in all turns of a loop once a lane, before the loop.

A mean and a deviation that each lane has for itself are used by every row that the lanes go over.  A compiler
moves out of a loop what is alike for all of it, yet not what differs from lane to lane of a loop inside: that
takes a place for each lane.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from dataclasses import dataclass, field, replace

from apollo_fuse.expressions import Apply, Block, Constant, Load, Position
from apollo_fuse.index import ZERO, Atom, Index, Indirect, Iterator
from apollo_fuse.kernel import Buffer, Compute, Kernel, Loop, LoopKind, Scope, Step, Target, written_by

_DEAR = 4  # cheap operations from which on a read of what is kept costs less
_FEWEST_TURNS = 4
_MOST_LANES = 1024
_MOST_BYTES = 16 * 1024  # of what one loop's lanes keep, to stay in the nearest cache


def hoist_lanes(kernel: Kernel) -> Kernel:
    hoisting = _Hoisting()
    body = hoisting.steps(kernel.body)
    return replace(kernel, buffers=(*kernel.buffers, *hoisting.buffers), body=body)


@dataclass(slots=True)
class _Hoisting:
    """`buffers` have a place for each lane of what was moved."""

    buffers: list[Buffer] = field(default_factory=list)

    def steps(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(done for step in steps for done in self._hoisted(step))

    def _hoisted(self, step: Step) -> list[Step]:
        if not isinstance(step, Loop) or step.kind is LoopKind.LANE:
            return [step]
        turns = step.iterator.extent.constant
        if step.kind is not LoopKind.SEQUENTIAL or turns is not None and turns < _FEWEST_TURNS:
            return [replace(step, body=self.steps(step.body))]
        moving = _Moving(written_by(step.body), len(self.buffers))
        body = moving.out_of(step.body, frozenset({step.iterator}))
        self.buffers += moving.buffers
        return [*moving.before, replace(step, body=self.steps(body))]


@dataclass(slots=True)
class _Moving:
    """What moves before a loop, which writes the buffers `written`; those made are numbered from `first`."""

    written: set[str]
    first: int
    buffers: list[Buffer] = field(default_factory=list)
    before: list[Loop] = field(default_factory=list)

    def out_of(self, steps: tuple[Step, ...], turning: frozenset[Atom]) -> tuple[Step, ...]:
        """The steps of loops over `turning`, reading what moved."""
        return tuple(self._read(step, turning) if isinstance(step, Loop) else step for step in steps)

    def _read(self, loop: Loop, turning: frozenset[Atom]) -> Loop:
        if loop.kind is not LoopKind.LANE:
            return replace(loop, body=self.out_of(loop.body, turning | {loop.iterator}))
        lanes = loop.iterator.extent.constant
        bounded = loop.limit is not None and not turning.isdisjoint(loop.limit.atoms())
        if lanes is None or lanes > _MOST_LANES or bounded:
            return loop
        moved: dict[Block, Buffer] = {}
        body = tuple(
            self._with_reads(step, loop.iterator, turning, moved) if isinstance(step, Compute) else step
            for step in loop.body
        )
        if moved:
            lane = Index.of(loop.iterator)
            kept = (Compute(own.name, block, (Target(own.name, lane),)) for block, own in moved.items())
            self.before.append(replace(loop, body=tuple(kept)))
        return replace(loop, body=body)

    def _with_reads(
        self, compute: Compute, lane: Iterator, turning: frozenset[Atom], moved: dict[Block, Buffer]
    ) -> Compute:
        """The statement with reads of `moved` in the place of what is dear and alike in all turns."""
        reads: dict[int, Load] = {}
        for place in _alike(compute.block, lane, turning, self.written):
            block = compute.block.part(place)
            own = moved.get(block)
            if own is None:
                own = Buffer(f"lane{self.first + len(self.buffers)}", block.dtype, lane.extent, Scope.SHARED)
                bytes_ = sum((b.bytes for b in (*self.buffers, own)), ZERO).constant
                if bytes_ is None or bytes_ > _MOST_BYTES:
                    continue
                self.buffers.append(own)
                moved[block] = own
            reads[place] = Load(own.name, (Index.of(lane),), block.dtype)
        return replace(compute, block=compute.block.part(-1, reads)) if reads else compute


def _alike(block: Block, lane: Iterator, turning: frozenset[Atom], written: set[str]) -> Generator[int]:
    """The places of what differs from lane to lane alone, and is dear: the largest of such expressions."""
    items = block.instructions
    alike: set[int] = set()  # in all turns
    varying: set[int] = set()  # from lane to lane
    for place, item in enumerate(items):
        match item:
            case Constant():
                alike.add(place)
            case Position(index, _):
                if turning.isdisjoint(index.atoms()):
                    alike.add(place)
                if lane in index.atoms():
                    varying.add(place)
            case Load(tensor, indices, _):
                atoms = {atom for index in indices for atom in index.atoms()}
                if tensor not in written and turning.isdisjoint(atoms) and not _has_indirect(atoms):
                    alike.add(place)
                if lane in atoms:
                    varying.add(place)
            case Apply(_, operands, _):
                if alike.issuperset(operands):
                    alike.add(place)
                if not varying.isdisjoint(operands):
                    varying.add(place)
    wanted = {len(items) - 1}
    for place, item in enumerate(items):
        if isinstance(item, Apply) and place not in alike:
            wanted.update(item.operands)
    for place in sorted(wanted & alike & varying):
        if block.part(place).cost > _DEAR:
            yield place


def _has_indirect(atoms: set[Atom]) -> bool:
    return any(isinstance(atom, Indirect) for atom in atoms)
