"""What one run of a kernel does, counted from its IR at given extents: items, loops, operations, traffic.

Counts are those of the loops as they stand.  Bytes are counted for each buffer from the strides of its
accesses: how many elements are distinct, how many cache lines they lie in, and how often an outer loop comes
back to them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from apollo_fuse.codegen.c import GRAIN
from apollo_fuse.codegen.expressions import compute_bytes
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Constant, Load, Op, Position
from apollo_fuse.extents import evaluate
from apollo_fuse.index import Atom, Index, Indirect, Iterator, Maximum, Quotient, Symbol
from apollo_fuse.kernel import Compute, Copy, Initialise, Kernel, Loop, LoopKind, Scope, Step, Target
from apollo_fuse.machine import UNITS, Machine, Unit, is_vectorised

_UNROLLED = 8  # turns of a loop up to which a compiler writes them out
_READS = (Unit.LOAD, Unit.GATHER, Unit.FAR_GATHER)
_WRITES = (Unit.STORE, Unit.SCATTER, Unit.FAR_SCATTER)

Sizes = Mapping[Symbol, int]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Statements that run one after the other: the body of an innermost loop, or what stands outside of one.

    starts: how often the loop begins, or how often the statements run where there is no loop.
    turns: its iterations, all starts together.
    operations: operations of one iteration by unit and bytes of the element; chains: those of them that wait
        for the iteration before.
    is_ragged: whether each run of the loop may end within a vector, and not the last of many tiles alone.
    is_awaited: whether a later loop of the item waits for what the chains come to.
    """

    starts: float
    turns: float
    is_loop: bool
    is_vector: bool
    operations: Mapping[tuple[Unit, int], float]
    chains: Mapping[tuple[Unit, int], int]
    is_ragged: bool = True
    is_awaited: bool = False


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a kernel does to one buffer, in bytes.

    touched: distinct bytes. lines: of the cache lines that they lie in. accessed: all reads or writes.
    again: for each loop that comes back to the same lines, bytes touched between two of its turns and bytes
        that are then read once more, the outermost first.
    """

    buffer: str
    scope: Scope
    is_write: bool
    touched: int
    lines: int
    accessed: int
    again: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Work:
    """One run of a kernel. grain: items that are worth a thread. item_bytes: on-chip memory of an item."""

    items: int
    grain: int
    stretches: tuple[Stretch, ...]
    traffic: tuple[Traffic, ...]
    item_bytes: int

    @property
    def compulsory(self) -> int:
        """Distinct bytes of tensors: what has to be moved whatever the caches hold."""
        return sum(t.touched for t in self.traffic if t.scope is Scope.GLOBAL)


def work_of(kernel: Kernel, sizes: Sizes, machine: Machine) -> Work:
    """Counts one run of the kernel with these extents."""
    return _Counting(kernel, _Numbers(sizes), machine).work()


@dataclass(slots=True)
class _Numbers:
    """Indices as numbers: extents are known, iterators are not."""

    sizes: Sizes
    _extents: dict[Iterator, int] = field(default_factory=dict)
    _values: dict[Symbol, int] = field(default_factory=dict)

    def symbol(self, symbol: Symbol) -> int:
        found = self._values.get(symbol)
        if found is None:
            known = self.sizes.get(symbol)
            found = known if known is not None else evaluate(Index.of(symbol), self.sizes)
            self._values[symbol] = found = 1 if found is None else found
        return found

    def extent(self, iterator: Iterator) -> int:
        found = self._extents.get(iterator)
        if found is None:
            found = self._extents[iterator] = max(0, self.number(iterator.extent))
        return found

    def number(self, index: Index, iterator: int = 0) -> int:
        """The index with every iterator at `iterator`."""
        total = 0
        for monomial, coefficient in index.terms:
            product = coefficient
            for atom in monomial:
                product *= self._atom(atom, iterator)
            total += product
        return total

    def _atom(self, atom: Atom, iterator: int) -> int:
        match atom:
            case Symbol():
                return self.symbol(atom)
            case Iterator():
                return iterator
            case Quotient(numerator, divisor):
                by = self.number(divisor, iterator)
                return self.number(numerator, iterator) // by if by else 0
            case Maximum(left, right):
                return max(self.number(left, iterator), self.number(right, iterator))
            case Indirect():
                return 0

    def strides(self, index: Index) -> dict[Atom, int]:
        """The distance that a step of each atom other than an extent makes."""
        found: dict[Atom, int] = {}
        for monomial, coefficient in index.terms:
            moving = [atom for atom in monomial if not isinstance(atom, Symbol)]
            if not moving:
                continue
            for atom in monomial:
                if isinstance(atom, Symbol):
                    coefficient *= self.symbol(atom)
            for atom in moving:
                found[atom] = found.get(atom, 0) + coefficient
        return {atom: stride for atom, stride in found.items() if stride}

    def values(self, atom: Atom, loops: frozenset[Iterator]) -> int:
        """How many values the atom takes in these loops."""
        match atom:
            case Symbol():
                return 1
            case Iterator():
                return max(1, self.extent(atom)) if atom in loops else 1
            case Quotient(numerator, divisor):
                by = max(1, self.number(divisor))
                return 1 + (self.span(self.strides(numerator), loops) - 1) // by
            case Maximum(left, right):
                return max(self.span(self.strides(x), loops) for x in (left, right))
            case Indirect(_, indices, extent):
                reads = math.prod(max(1, self.extent(i)) for x in indices for i in x.iterators() & loops)
                return max(1, min(reads, self.number(extent)))

    def span(self, strides: Mapping[Atom, int], loops: frozenset[Iterator]) -> int:
        """Elements from the first to the last that is touched."""
        return 1 + sum(abs(stride) * (self.values(atom, loops) - 1) for atom, stride in strides.items())


@dataclass(frozen=True, slots=True)
class _Access:
    """A read or write with the loops around it, the outermost first."""

    buffer: str
    size: int  # bytes of an element
    strides: Mapping[Atom, int]
    start: int
    loops: tuple[Iterator, ...]
    depends: frozenset[Iterator]
    is_write: bool


@dataclass(slots=True)
class _Counting:
    kernel: Kernel
    numbers: _Numbers
    machine: Machine
    accesses: list[_Access] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    _turns: dict[Iterator, float] = field(default_factory=dict)  # of tiles that end early

    def work(self) -> Work:
        extent = self.numbers.extent
        items = math.prod(extent(axis) for axis in self.kernel.grid)
        self._steps(self.kernel.body, self.kernel.grid, float(items))
        traffic = [self._traffic(buffer.name) for buffer in self.kernel.buffers]
        local = sum(
            self.numbers.number(b.size) * compute_bytes(b.dtype)
            for b in self.kernel.buffers
            if b.scope is not Scope.GLOBAL
        )
        cheap = self._cheap(self.kernel.body)
        last = max((place for place, s in enumerate(self.stretches) if s.is_loop), default=0)
        stretches = (
            replace(s, is_awaited=bool(s.chains) and place < last) for place, s in enumerate(self.stretches)
        )
        return Work(
            items,
            1 + GRAIN // (1 + cheap),
            tuple(stretches),
            tuple(found for pair in traffic for found in pair),
            local,
        )

    def _cheap(self, steps: tuple[Step, ...]) -> int:
        """Cheap operations of an item, as the generated code counts them to choose its grain."""
        total = 0
        for step in steps:
            match step:
                case Loop(iterator, _, body, _):
                    total += self._cheap(body) * self.numbers.extent(iterator)
                case Compute(_, block, _, _):
                    total += block.cost + 2
        return total

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
            self._stretch(loop.body, inside, turns, turns, None)  # as compilers write it out
        elif loop.kind is LoopKind.LANE or len(body) + len(unrolled) == len(loop.body):
            self._stretch(loop.body, inside, runs, turns, loop.iterator, ragged)
        else:
            self._steps(loop.body, inside, turns)

    def _turns_of(self, iterator: Iterator) -> float:
        found = self._turns.get(iterator)
        return self.numbers.extent(iterator) if found is None else found

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
    ) -> None:
        body = _Body(self, lane)
        body.steps(steps, around, 1)
        is_vector = lane is not None and body.is_vector
        self.stretches.append(
            Stretch(starts, turns, lane is not None, is_vector, body.operations, body.chains, ragged)
        )

    # -- traffic ----------------------------------------------------------------------------

    def access(self, target: Target, around: tuple[Iterator, ...], is_write: bool) -> None:
        buffer = self.kernel.buffer(target.buffer)
        size = buffer.dtype.size if buffer.scope is Scope.GLOBAL else compute_bytes(buffer.dtype)
        strides = self.numbers.strides(target.offset)
        depends = target.offset.iterators()
        start = self.numbers.number(target.offset)
        self.accesses.append(_Access(target.buffer, size, strides, start, around, depends, is_write))

    def _traffic(self, name: str) -> list[Traffic]:
        buffer = self.kernel.buffer(name)
        if buffer.scope is Scope.REGISTER:
            return []
        size = buffer.dtype.size if buffer.scope is Scope.GLOBAL else compute_bytes(buffer.dtype)
        whole = self.numbers.number(buffer.size) * size
        found: list[Traffic] = []
        for is_write in (False, True):
            own = [a for a in self.accesses if a.buffer == name and a.is_write == is_write]
            if not own:
                continue
            every = frozenset(i for a in own for i in a.loops)
            touched, lines = self._footprint(own, every, whole)
            accessed = round(sum(a.size * math.prod(map(self._turns_of, a.loops)) for a in own))
            found.append(
                Traffic(
                    name, buffer.scope, is_write, touched, lines, accessed, self._again(own[0], lines, whole)
                )
            )
        return found

    def _footprint(self, accesses: list[_Access], loops: frozenset[Iterator], whole: int) -> tuple[int, int]:
        """Distinct bytes that the accesses to one buffer touch in these loops, and those of their lines."""
        groups: dict[tuple[tuple[Atom, int], ...], set[int]] = {}
        for access in accesses:
            groups.setdefault(tuple(access.strides.items()), set()).add(access.start)
        size = accesses[0].size
        touched = lines = 0
        for strides, starts in groups.items():
            moving = dict(strides)
            span = self.numbers.span(moving, loops) + max(starts) - min(starts)
            counts = {atom: self.numbers.values(atom, loops) for atom in moving}
            under = frozenset(i for atom in moving for i in Index.of(atom).iterators()) & loops
            points = min(math.prod(counts.values()), math.prod(max(1, self.numbers.extent(i)) for i in under))
            distinct = min(points * len(starts), span)
            step = min((abs(s) for atom, s in moving.items() if counts[atom] > 1), default=1)
            each = min(max(1, step // len(starts)) * size, self.machine.line)
            touched += distinct * size
            lines += max(
                min(distinct * each, -(-span * size // self.machine.line) * self.machine.line),
                distinct * size,
            )
        return min(touched, whole), min(lines, max(whole, self.machine.line))

    def _again(self, access: _Access, lines: int, whole: int) -> tuple[tuple[int, int], ...]:
        """Loops that the access does not depend on, around others that it does."""
        found: list[tuple[int, int]] = []
        times = 1
        for place, loop in enumerate(access.loops):
            turns = self.numbers.extent(loop)
            inner = access.loops[place + 1 :]
            if loop in access.depends or turns < 2 or not any(i in access.depends for i in inner):
                continue
            found.append((self._between(frozenset(inner)), lines * times * (turns - 1)))
            times *= turns
        return tuple(found)

    def _between(self, loops: frozenset[Iterator]) -> int:
        """Bytes of all buffers that are touched in one turn around these loops."""
        total = 0
        for name in {a.buffer for a in self.accesses}:
            own = [a for a in self.accesses if a.buffer == name and loops & set(a.loops)]
            if own:
                whole = self.numbers.number(self.kernel.buffer(name).size) * own[0].size
                total += self._footprint(own, loops, whole)[1]
        return total


@dataclass(slots=True)
class _Body:
    """The operations of one iteration of an innermost loop; equal reads of it are one."""

    counting: _Counting
    lane: Iterator | None
    operations: Counter[tuple[Unit, int]] = field(default_factory=Counter)
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
            moves = self.lane is None
            match item:
                case Load(tensor, indices, _):
                    self._load(Target(tensor, indices[0]), around, times)
                    moves |= self._moves(indices[0]) or tensor in self._made
                case Apply(op, operands, dtype):
                    moves |= any(moving[operand] for operand in operands)
                    if moves:
                        bounded = isinstance(block.instructions[operands[-1]], Constant)
                        self._apply(op, block.instructions[operands[0]].dtype, dtype, bounded, times)
                case Position(index, dtype):
                    moves |= self._moves(index)
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
        if buffer.scope is Scope.REGISTER and buffer.size.is_one:
            return
        self.counting.access(target, around, False)
        if self.lane is None or self._moves(target.offset):
            self._move(target, False, times)
            self._widen(buffer.dtype, times)

    def _write(self, target: Target, around: tuple[Iterator, ...], times: int) -> None:
        buffer = self.counting.kernel.buffer(target.buffer)
        if buffer.scope is Scope.REGISTER and buffer.size.is_one:
            return
        self.counting.access(target, around, True)
        self._move(target, True, times)
        self._widen(buffer.dtype, times)

    def _move(self, target: Target, is_write: bool, times: int) -> None:
        size = self.counting.kernel.buffer(target.buffer).dtype.size
        self._count(self._unit(target, size, is_write), size, times)
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
        crowded = self.counting.machine.is_crowded(apart * size, numbers.extent(self.lane))
        return far if crowded else near

    def _widen(self, dtype: DType, times: int) -> None:
        if dtype.compute is not dtype:
            self._count(Unit.CONVERT, dtype.size, times)

    def _moves(self, offset: Index) -> bool:
        return self.lane is not None and self.lane in offset.iterators()

    def _count(self, unit: Unit, size: int, times: int) -> None:
        self.operations[unit, size] += times
