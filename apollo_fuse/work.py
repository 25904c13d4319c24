"""What one run of a kernel does, counted from its IR at given extents: items, loops, operations, traffic.

Counts are those of the loops as they stand, with what compilers take out of them left out; `traffic` counts
the bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from apollo_fuse.codegen.expressions import compute_bytes
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Constant, Load, Op, Position
from apollo_fuse.index import Index, Indirect, Iterator, Maximum, Quotient
from apollo_fuse.kernel import Compute, Copy, Initialise, Kernel, Loop, LoopKind, Scope, Step, Target
from apollo_fuse.kernel import work as operations
from apollo_fuse.machine import ACROSS, UNITS, Machine, Unit, is_vectorised
from apollo_fuse.passes.overlap_tails import is_covered
from apollo_fuse.passes.phases import items_together, phases, through_a_phase
from apollo_fuse.strides import Numbers, Sizes
from apollo_fuse.traffic import Access, Footprints, Traffic

_UNROLLED = 8  # turns of a loop up to which a compiler writes them out
_SHUFFLED = 4  # elements from one read to the next, up to which compilers shuffle them out of vectors
_READS = (Unit.LOAD, Unit.GATHER, Unit.FAR_GATHER)
_WRITES = (Unit.STORE, Unit.SCATTER, Unit.FAR_SCATTER)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Statements that run one after the other: the body of an innermost loop, or what stands outside of one.

    starts: how often the loop begins, or how often the statements run where there is no loop.
    turns: its iterations, all starts together.
    operations: operations of one iteration by unit and bytes of the element; chains: those of them that wait
        for the iteration before.
    is_ragged: whether each run of the loop may end within a vector, and not the last of many tiles alone.
    is_known: whether a compiler sees how often the loop turns.
    is_covered: whether a last vector that starts early does what whole ones leave (passes/overlap_tails.py).
    is_awaited: whether a later loop of the item waits for what the chains come to, and nothing else is done.
    """

    starts: float
    turns: float
    is_loop: bool
    is_vector: bool
    operations: Mapping[tuple[Unit, int], float]
    chains: Mapping[tuple[Unit, int], int]
    is_ragged: bool = True
    is_known: bool = False
    is_covered: bool = False
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class Work:
    """One run of a kernel. item_bytes: on-chip memory of an item.

    cheap: operations of an item, as the generated code counts them to part the items among threads.
    """

    items: int
    cheap: int
    stretches: tuple[Stretch, ...]
    traffic: tuple[Traffic, ...]
    item_bytes: int

    @property
    def compulsory(self) -> int:
        """Distinct bytes of tensors: what has to be moved whatever the caches hold."""
        return sum(t.touched for t in self.traffic if t.scope is Scope.GLOBAL)


def work_of(kernel: Kernel, sizes: Sizes, machine: Machine) -> Work:
    """Counts one run of the kernel with these extents."""
    return _Counting(kernel, Numbers(sizes), machine).work()


@dataclass(slots=True)
class _Counting:
    kernel: Kernel
    numbers: Numbers
    machine: Machine
    accesses: list[Access] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    _turns: dict[Iterator, float] = field(default_factory=dict)  # of tiles that end early

    def work(self) -> Work:
        extent = self.numbers.extent
        items = math.prod(extent(axis) for axis in self.kernel.grid)
        self._steps(self.kernel.body, self.kernel.grid, float(items))
        line = self.machine.line
        footprints = Footprints(self.kernel, self.numbers, line, self.accesses, self._turns)
        traffic = [footprints.of(buffer.name) for buffer in self.kernel.buffers]
        local = sum(
            self.numbers.number(b.size) * compute_bytes(b.dtype)
            for b in self.kernel.buffers
            if b.scope is not Scope.GLOBAL
        )
        cheap = self.numbers.number(operations(self.kernel.body))
        last = max((place for place, s in enumerate(self.stretches) if s.is_loop), default=0)
        waits = any(s.chains for s in self.stretches) and not self._is_in_phases()
        stretches = (
            replace(s, is_awaited=waits and bool(s.chains) and place < last)
            for place, s in enumerate(self.stretches)
        )
        return Work(
            items,
            1 + cheap,
            tuple(stretches),
            tuple(found for pair in traffic for found in pair),
            local,
        )

    def _is_in_phases(self) -> bool:
        """Whether other items fill the time in which one waits for a reduction, as C alone is written."""
        if self.machine.gpu is not None:
            return False
        parts = phases(self.kernel)
        turns = int(self.numbers.number(through_a_phase(self.kernel, parts)))
        return len(parts) > 1 and items_together(turns, self.machine.vector) > 1

    # -- loops ------------------------------------------------------------------------------

    def _steps(self, steps: tuple[Step, ...], around: tuple[Iterator, ...], runs: float) -> None:
        flat = [step for step in steps if not isinstance(step, Loop)]
        if flat:
            self._stretch(flat, around, runs, runs, None)
        for step in steps:
            if isinstance(step, Loop):
                self._loop(step, around, runs)

    def _loop(self, loop: Loop, around: tuple[Iterator, ...], runs: float) -> None:
        each = self._mean_turns(loop)
        turns = runs * each
        self._turns[loop.iterator] = each
        ragged = loop.limit is None or each == self.numbers.number(loop.limit)
        inside = (*around, loop.iterator)
        body = [step for step in loop.body if not isinstance(step, Loop)]
        unrolled = [step for step in loop.body if isinstance(step, Loop) and step.kind is LoopKind.UNROLLED]
        known = loop.iterator.extent.constant
        if known is not None and known <= _UNROLLED and len(body) == len(loop.body):
            self._stretch(loop.body, inside, turns, turns, None, written_out=True)
        elif loop.kind is LoopKind.LANE or len(body) + len(unrolled) == len(loop.body):
            known = loop.turns.constant is not None
            covered = self.machine.gpu is None and is_covered(self.kernel, loop)  # as C alone is lowered
            self._stretch(loop.body, inside, runs, turns, loop.iterator, ragged, known, covered)
        else:
            self._steps(loop.body, inside, turns)

    def _mean_turns(self, loop: Loop) -> float:
        """Iterations of one run of the loop; of a tile that ends at the end of an axis, in the mean."""
        extent = self.numbers.extent(loop.iterator)
        if loop.limit is None:
            return extent
        whole = self.numbers.number(loop.limit)  # with the first block, all that is left
        blocks = -(-whole // extent) if extent else 0
        return min(extent, whole / blocks) if blocks else 0

    def _stretch(
        self,
        steps: Sequence[Step],
        around: tuple[Iterator, ...],
        starts: float,
        turns: float,
        lane: Iterator | None,
        ragged: bool = True,
        known: bool = False,
        covered: bool = False,
        written_out: bool = False,
    ) -> None:
        body = _Body(self, lane, written_out)
        body.steps(steps, around, 1)
        is_vector = lane is not None and body.is_vector
        is_loop = lane is not None
        self.stretches.append(
            Stretch(starts, turns, is_loop, is_vector, body.operations, body.chains, ragged, known, covered)
        )

    # -- traffic ----------------------------------------------------------------------------

    def access(self, target: Target, around: tuple[Iterator, ...], is_write: bool) -> None:
        buffer = self.kernel.buffer(target.buffer)
        size = buffer.dtype.size if buffer.scope is Scope.GLOBAL else compute_bytes(buffer.dtype)
        strides = self.numbers.strides(target.offset)
        depends = target.offset.iterators()
        start = self.numbers.number(target.offset)
        self.accesses.append(Access(target.buffer, size, strides, start, around, depends, is_write))


@dataclass(slots=True)
class _Body:
    """The operations of one iteration of an innermost loop; equal reads of it are one.

    is_written_out: a loop of few turns, in which positions are constants to the compiler.
    """

    counting: _Counting
    lane: Iterator | None
    is_written_out: bool = False
    operations: dict[tuple[Unit, int], float] = field(default_factory=dict)
    chains: Counter[tuple[Unit, int]] = field(default_factory=Counter)
    is_vector: bool = True
    _read: set[tuple[str, Index]] = field(default_factory=set)
    _made: set[str] = field(default_factory=set)  # buffers that the loop itself writes

    def steps(self, steps: Sequence[Step], around: tuple[Iterator, ...], times: int) -> None:
        for step in steps:
            match step:
                case Loop(iterator, _, body, _):
                    turns = self.counting.numbers.extent(iterator)
                    self.steps(body, (*around, iterator), times * turns)
                case Compute():
                    self._compute(step, around, times)
                case Initialise(target, _):
                    self._write(target, around, times)
                case Copy(source, target):
                    self._load(source, around, times)
                    self._write(target, around, times)

    def _compute(self, step: Compute, around: tuple[Iterator, ...], times: int) -> None:
        block = step.block
        moving: list[bool] = []  # whether the value changes along the lanes; what does not is computed before
        for item in block.instructions:
            match item:
                case Load(tensor, indices, _):
                    self._load(Target(tensor, indices[0]), around, times)
                    moves = self.lane is None or self._moves(indices[0]) or tensor in self._made
                case Apply(op, operands, dtype):
                    moves = any(moving[operand] for operand in operands)
                    if moves:
                        bounded = isinstance(block.instructions[operands[-1]], Constant)
                        self._apply(op, block.instructions[operands[0]].dtype, dtype, bounded, times)
                case Position(index, dtype):
                    moves = self._moves(index) if self.lane is not None else not self.is_written_out
                    if moves:
                        self._count(Unit.CONVERT if dtype.is_float else Unit.SIMPLE, 8, times)
                case Constant():
                    moves = False
            moving.append(moves)
        if moving[-1]:
            self._made |= {target.buffer for target in step.targets}
        for target in step.targets:
            if step.combine is None:
                self._write(target, around, times)
                continue
            width = compute_bytes(block.dtype)
            unit = Unit.CHAIN_ADD if step.combine in (Op.ADD, Op.MUL) else Unit.CHAIN_MAX
            if self._moves(target.offset):  # each lane has an accumulator of its own, in memory
                self._count(Unit.SIMPLE, width, times)
                self._load(target, around, times)
                self._write(target, around, times)
            elif self.lane is not None:
                self.chains[unit, width] += times
                self._count(Unit.SIMPLE, width, times)
            else:
                self._count(Unit.SIMPLE, width, times)

    def _apply(self, op: Op, source: DType, dtype: DType, bounded: bool, times: int) -> None:
        width = max(compute_bytes(source), compute_bytes(dtype))
        if op is Op.CAST and source.compute is dtype.compute and dtype.compute is dtype:
            return
        unit = UNITS[op]
        if unit is Unit.EXTREME and (bounded or not source.is_float):
            unit = Unit.BOUND if source.is_float else Unit.SIMPLE
        self._count(unit, width, times)
        self.is_vector &= is_vectorised(op, source.compute)

    def _load(self, target: Target, around: tuple[Iterator, ...], times: int) -> None:
        if (target.buffer, target.offset) in self._read:
            return
        self._read.add((target.buffer, target.offset))
        buffer = self.counting.kernel.buffer(target.buffer)
        if buffer.is_register:
            return
        self.counting.access(target, around, False)
        if self.lane is None or self._moves(target.offset):
            self._move(target, False, times)
            self._widen(buffer.dtype, times)

    def _write(self, target: Target, around: tuple[Iterator, ...], times: int) -> None:
        buffer = self.counting.kernel.buffer(target.buffer)
        if buffer.is_register:
            return
        self.counting.access(target, around, True)
        self._move(target, True, times)
        self._widen(buffer.dtype, times)

    def _move(self, target: Target, is_write: bool, times: int) -> None:
        size = self.counting.kernel.buffer(target.buffer).dtype.size
        unit = self._unit(target, size, is_write)
        across = self._across(target.offset, size) if unit in ACROSS else 0.0
        if across:
            self._count(ACROSS[unit], size, times * across)
        if across < 1:
            self._count(unit, size, times * (1 - across))
        for atom in target.offset.atoms():
            match atom:
                case Quotient(numerator, _) if self.lane in numerator.iterators():
                    self._count(Unit.REMAINDER, 8, times)
                    self.is_vector = False
                case Indirect(_, indices, _) if self.lane is None or self.lane in indices[0].iterators():
                    self._count(Unit.LOAD, 8, times)
                case _:
                    pass

    def _unit(self, target: Target, size: int, is_write: bool) -> Unit:
        """By how far apart neighbouring lanes reach."""
        together, near, far = _WRITES if is_write else _READS
        if self.lane is None:
            return together
        factor = target.offset.coefficient(self.lane)
        if factor is None:
            clamped = any(
                isinstance(a, Maximum) and self.lane in a.left.iterators() | a.right.iterators()
                for a in target.offset.atoms()
            )
            return Unit.CLAMPED if clamped else near
        numbers = self.counting.numbers
        apart = abs(numbers.number(factor))
        if apart <= 1:
            return together
        if not is_write and apart <= _SHUFFLED and factor.constant is not None:
            return Unit.STRIDED
        crowded = self.counting.machine.is_crowded(apart * size, numbers.extent(self.lane))
        return far if crowded else near

    def _across(self, offset: Index, size: int) -> float:
        """The share of rows that do not begin where a vector would lie within a line."""
        if self.lane is None:
            return 0.0
        numbers, vector = self.counting.numbers, self.counting.machine.vector
        apart = [stride * size for atom, stride in numbers.strides(offset).items() if atom != self.lane]
        divisor = math.gcd(vector, *apart)
        return 1.0 if numbers.number(offset) * size % divisor else 1 - divisor / vector

    def _widen(self, dtype: DType, times: int) -> None:
        if dtype.compute is not dtype:
            self._count(Unit.CONVERT, dtype.size, times)

    def _moves(self, offset: Index) -> bool:
        return self.lane is not None and self.lane in offset.iterators()

    def _count(self, unit: Unit, size: int, times: float) -> None:
        self.operations[unit, size] = self.operations.get((unit, size), 0) + times
