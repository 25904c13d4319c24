"""Splits the long loops of a kernel with few work items over many, with partial results in temporaries.

A kernel of one row has one work item, and one thread computes it.  Cut behind each long loop it becomes
several kernels, which run one after the other: the items of the first fold a part of the row each and
leave what they found in memory; those of the next combine all that was found, in order, and go on with
parts of their own.  How many parts there are follows from the lengths alone, so that a result does not depend
on the threads that computed it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from apollo_fuse.expressions import Block, Load, Op
from apollo_fuse.graph import Value
from apollo_fuse.index import ZERO, Atom, Index, Iterator, maximum, product
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Copy,
    Initialise,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
    buffers_of,
    substituted,
    walk,
    work,
    written_by,
)

FEW = 15  # work items up to which there may be fewer than threads
LONG = 1 << 21  # cheap operations of a work item from which splitting it pays for more launches
PARTS = 64  # most parts of a loop
LEAST = 1 << 18  # cheap operations in a part
_LINE = 64  # elements that parts of a lane loop are a multiple of, so that they start where cache lines do


@dataclass(frozen=True, slots=True)
class Split:
    """The kernels that take the place of one, in order, and what they pass to each other through memory."""

    kernels: tuple[Kernel, ...]
    temporaries: tuple[Value, ...]


def split_reductions(kernel: Kernel) -> Split | None:
    """The kernel with each of its long loops split; None where it has none, or passes whole rows along."""
    splitting = _Splitting(kernel)
    for place, step in enumerate(kernel.body):
        if isinstance(step, Loop) and _is_long(step):
            elsewhere = (*kernel.body[:place], *kernel.body[place + 1 :])
            if not splitting.split(step, buffers_of(elsewhere)):
                return None
        else:
            splitting.keep(step)
    splitting.finish()
    return Split(tuple(splitting.kernels), tuple(splitting.temporaries)) if splitting.temporaries else None


class _Splitting:
    """The kernels so far, and how each local buffer is had in the next one."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.local = {b.name: b for b in kernel.buffers if b.scope is not Scope.GLOBAL}
        self.item = ZERO
        for axis in kernel.grid:
            self.item = self.item * axis.extent + Index.of(axis)
        self.recipes: list[Step] = []  # what makes local buffers anew, in order
        self.pending: list[Step] = []  # what writes memory and was run by no kernel yet
        self.kernels: list[Kernel] = []
        self.temporaries: list[Value] = []

    def keep(self, step: Step) -> None:
        """A short step runs anew in each kernel that needs what it leaves, and once for what it writes."""
        local = self._targeting(step, local=True)
        if local is not None:
            self.recipes.append(local)
        written = step if isinstance(step, Loop) else self._targeting(step, local=False)
        if written is not None and written_by((written,)) - self.local.keys():
            self.pending.append(written)

    def split(self, loop: Loop, elsewhere: set[str]) -> bool:
        """Runs the loop in parts; False where it leaves more than accumulators for the steps elsewhere."""
        operations = _folded(loop)
        if any(self.local[name].size.constant is None for name in operations):
            return False
        if (written_by((loop,)) - operations.keys()) & self.local.keys() & elsewhere:
            return False
        self.finish()  # the loop may read what the steps before it write
        part, inner, limit = _part(loop)
        values: dict[Atom, Index] = {loop.iterator: Index.of(part) * inner.extent + Index.of(inner)}
        body = tuple(substituted(step, values) for step in loop.body)
        place = self.item * part.extent + Index.of(part)
        starts: list[Step] = []
        stores: list[Step] = []
        combined: list[Step] = []
        for name, op in operations.items():
            accumulator = self.local[name]
            size = accumulator.size
            items = self.kernel.items  # where they are open, only few are ever split
            shape = (items if items.constant is not None else Index.of(FEW), part.extent, size)
            partial = Value(f"{name}_parts", accumulator.dtype.compute, shape)
            self.temporaries.append(partial)
            lane = Iterator(f"{name}_lane", size)
            at = ZERO if size.is_one else Index.of(lane)
            own = Target(name, at)
            starts.append(_each(lane, Initialise(own, op)))
            stores.append(_each(lane, Copy(own, Target(partial.name, place * size + at))))
            before = Iterator(f"{name}_part", part.extent)
            found = (self.item * part.extent + Index.of(before)) * size + at
            block = Block((Load(partial.name, (found,), partial.dtype),))
            fold = _each(lane, Compute("P", block, (own,), op))
            combined += [_each(lane, Initialise(own, op)), Loop(before, LoopKind.SEQUENTIAL, (fold,))]
        self._emit((*starts, Loop(inner, loop.kind, body, limit), *stores), (*self.kernel.grid, part))
        self.recipes = [r for r in self.recipes if not written_by((r,)) & operations.keys()] + combined
        return True

    def finish(self) -> None:
        """A kernel over the grid as it was for the short steps that write memory."""
        if self.pending:
            self._emit(tuple(self.pending), self.kernel.grid)
            self.pending = []

    def _emit(self, steps: tuple[Step, ...], grid: tuple[Iterator, ...]) -> None:
        started = {s.target.buffer for s in walk(steps) if isinstance(s, Initialise)}
        needed = (buffers_of(steps) & self.local.keys()) - started
        prologue: list[Step] = []
        for recipe in reversed(self.recipes):
            if written_by((recipe,)) & needed:
                prologue.insert(0, recipe)
                needed |= (buffers_of((recipe,)) & self.local.keys()) - started
        body = (*prologue, *steps)
        used = buffers_of(body)
        memory = [Buffer(v.name, v.dtype, product(v.shape), Scope.GLOBAL) for v in self.temporaries]
        buffers = tuple(b for b in (*self.kernel.buffers, *memory) if b.name in used)
        name = f"{self.kernel.name}_{len(self.kernels)}"
        self.kernels.append(Kernel(name, buffers, grid, body))

    def _targeting(self, step: Step, local: bool) -> Step | None:
        """The step with the targets alone that are local, or that are not; None where it has no such."""
        match step:
            case Loop(iterator, kind, body, limit):
                inner = [s for child in body if (s := self._targeting(child, local)) is not None]
                return Loop(iterator, kind, tuple(inner), limit) if inner else None
            case Compute():
                targets = tuple(t for t in step.targets if (t.buffer in self.local) == local)
                again = local and targets != step.targets  # beside the one that writes memory
                name = f"{step.statement}_again" if again else step.statement
                return replace(step, statement=name, targets=targets) if targets else None
            case Initialise(target, _) | Copy(_, target):
                return step if (target.buffer in self.local) == local else None


def _is_long(loop: Loop) -> bool:
    cost = work((loop,)).constant
    return cost is None or cost > LEAST


def _part(loop: Loop) -> tuple[Iterator, Iterator, Index | None]:
    """The axis of the parts, the loop within one, and where the last part ends early."""
    extent, each = loop.iterator.extent, work(loop.body).constant
    least = max(1, LEAST // max(1, each)) if each is not None else 1
    length = maximum((extent + (PARTS - 1)) // PARTS, Index.of(least))
    known, whole = length.constant, extent.constant
    if known is not None and loop.kind is LoopKind.LANE:
        length = Index.of((known + _LINE - 1) // _LINE * _LINE)
    part = Iterator(f"{loop.iterator.name}_part", (extent + length - 1) // length)
    even = whole is not None and length.constant is not None and whole % length.constant == 0
    limit = None if even else extent - Index.of(part) * length
    return part, Iterator(loop.iterator.name, length), limit


def _folded(loop: Loop) -> dict[str, Op]:
    """The accumulators that the loop as a whole folds into, with the operation of each."""
    inside = {s.target.buffer for s in walk(loop.body) if isinstance(s, Initialise)}
    computes = (s for s in walk(loop.body) if isinstance(s, Compute))
    return {
        s.targets[0].buffer: s.combine
        for s in computes
        if s.combine is not None and s.targets[0].buffer not in inside
    }


def _each(lane: Iterator, step: Step) -> Step:
    """The step for each lane that has an accumulator."""
    return step if lane.extent.is_one else Loop(lane, LoopKind.LANE, (step,))
