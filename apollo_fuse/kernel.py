"""The kernel IR: a grid of parallel axes over loop nests, with buffers in scopes. Both emitters read it.

All accesses are linear offsets into buffers.  Everything prints as text (`Kernel.__str__`), which
is what golden tests compare and ``--dump`` writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from collections.abc import Iterator as Generator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Block, Constant, Load, Op, Position, cost_of
from apollo_fuse.graph import Value
from apollo_fuse.index import ONE, ZERO, Atom, Index, Indirect, Iterator, minimum
from apollo_fuse.scop import Derived, Extent


class Scope(Enum):
    """Where a buffer lives: in registers, in on-chip memory of one block or thread, or in device memory."""

    REGISTER = "register"
    SHARED = "shared"
    GLOBAL = "global"


class LoopKind(Enum):
    SEQUENTIAL = "for"
    LANE = "lane"  # vectorised: SIMD lanes on a CPU, the threads of a block on a GPU
    UNROLLED = "unrolled"


@dataclass(frozen=True, slots=True)
class Buffer:
    """`size` elements; GLOBAL buffers are the kernel's inputs, outputs and temporaries.

    A SHARED buffer with a `host` lies in that buffer's memory: in another SHARED one, whose content is no
    longer needed then, or from `base` on in an output, whose content is not there yet.
    """

    name: str
    dtype: DType
    size: Index
    scope: Scope
    host: str | None = None
    base: Index = ZERO

    @property
    def bytes(self) -> Index:
        """On chip, where values keep the type that they are computed in; truth values are 4 bytes there."""
        return self.size * (4 if self.dtype is DType.BOOL else self.dtype.compute.size)

    @property
    def is_register(self) -> bool:
        """Whether it is one value, that a register holds."""
        return self.scope is Scope.REGISTER and self.size.is_one

    def __str__(self) -> str:
        inside = (
            ""
            if self.host is None
            else f" in {self.host}" + ("" if self.base.is_zero else f" from {self.base}")
        )
        return f"{self.scope.value} {self.name}: {self.dtype.value}[{self.size}]{inside}"


@dataclass(frozen=True, slots=True)
class Target:
    buffer: str
    offset: Index


@dataclass(frozen=True, slots=True)
class Compute:
    """Evaluates a block and writes its value; with `combine`, into an accumulator."""

    statement: str
    block: Block
    targets: tuple[Target, ...]
    combine: Op | None = None


@dataclass(frozen=True, slots=True)
class Initialise:
    """Sets an accumulator to the identity of `op`."""

    target: Target
    op: Op


@dataclass(frozen=True, slots=True)
class Copy:
    """Moves an element, as when an accumulator becomes an output."""

    source: Target
    target: Target


@dataclass(frozen=True, slots=True)
class Loop:
    """Over the iterator's extent; at most to `limit`, where a tile ends early at the end of an axis."""

    iterator: Iterator
    kind: LoopKind
    body: tuple[Step, ...]
    limit: Index | None = None

    @property
    def turns(self) -> Index:
        """How often it turns."""
        extent = self.iterator.extent
        return extent if self.limit is None else minimum(extent, self.limit)


Step: TypeAlias = Loop | Compute | Initialise | Copy


@dataclass(frozen=True, slots=True)
class Kernel:
    """`form` is the form of its group that the kernel belongs to."""

    name: str
    buffers: tuple[Buffer, ...]
    grid: tuple[Iterator, ...]
    body: tuple[Step, ...]
    form: int = 0

    def buffer(self, name: str) -> Buffer:
        return next(b for b in self.buffers if b.name == name)

    @property
    def shared_bytes(self) -> Index:
        """Bytes of SHARED memory that a work item needs near, those that lie in an output included."""
        shared = {b.name for b in self.buffers if b.scope is Scope.SHARED}
        total = ZERO
        for buffer in self.buffers:
            if buffer.scope is Scope.SHARED and buffer.host not in shared:
                total = total + buffer.bytes
        return total

    @property
    def items(self) -> Index:
        """Work items of the whole grid."""
        total = ONE
        for axis in self.grid:
            total = total * axis.extent
        return total

    def __str__(self) -> str:
        lines = [f"kernel {self.name}" + (f" of form {self.form}" if self.form else "")]
        lines += [f"  {buffer}" for buffer in self.buffers]
        lines += [f"  grid {axis} < {axis.extent}" for axis in self.grid]
        for step in self.body:
            lines += _lines(step, "  ")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class AtMost:
    """Holds while `value`, which the run-time extents give, is at most `limit`."""

    value: Index
    limit: int

    def __str__(self) -> str:
        return f"{self.value} <= {self.limit}"


@dataclass(frozen=True, slots=True)
class KernelGroup:
    """What one custom op runs: kernels one after the other, over the same inputs and outputs.

    A group may have several forms, of which a run takes one: the first whose condition in `forms` holds, else
    the one behind the last of them.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    temporaries: tuple[Value, ...]
    extents: tuple[Extent | Derived, ...]
    kernels: tuple[Kernel, ...]
    required: tuple[tuple[Index, Index], ...] = ()
    forms: tuple[AtMost, ...] = ()

    @property
    def stitches(self) -> bool:
        """Whether a loop reads what another loop of its kernel left in on-chip memory (Layer II)."""
        return any(_stitches(kernel) for kernel in self.kernels)

    def __str__(self) -> str:
        head = [f"extent {e}" for e in self.extents]
        head += [f"require {a} = {b}" for a, b in self.required]
        for role, values in (
            ("input", self.inputs),
            ("output", self.outputs),
            ("temporary", self.temporaries),
        ):
            head += [f"{role} {value}" for value in values]
        head += [f"form {number} where {condition}" for number, condition in enumerate(self.forms)]
        return "\n".join([*head, *map(str, self.kernels)])


def _stitches(kernel: Kernel) -> bool:
    local = {b.name for b in kernel.buffers if b.scope is not Scope.GLOBAL}
    made: dict[str, frozenset[Iterator]] = {}  # the loops around the first write to a local buffer

    def reads_from_elsewhere(steps: tuple[Step, ...], around: frozenset[Iterator]) -> bool:
        for step in steps:
            match step:
                case Loop(iterator, _, body):
                    if reads_from_elsewhere(body, around | {iterator}):
                        return True
                case Initialise(target):
                    made.setdefault(target.buffer, around)
                case Compute(_, block, targets):
                    read = {load.tensor for load in block.loads} & local
                    if any(around - made.get(name, around) for name in read):
                        return True
                    for target in targets:
                        made.setdefault(target.buffer, around)
                case Copy():
                    pass
        return False

    return reads_from_elsewhere(kernel.body, frozenset())


def walk(steps: tuple[Step, ...]) -> Generator[Step]:
    """All steps, loops before what is in them."""
    for step in steps:
        yield step
        if isinstance(step, Loop):
            yield from walk(step.body)


def with_lane_loops(steps: tuple[Step, ...], instead: Callable[[Loop], Iterable[Step]]) -> tuple[Step, ...]:
    """The steps with what `instead` gives in the place of each lane loop, in the order of the steps."""
    result: list[Step] = []
    for step in steps:
        if not isinstance(step, Loop):
            result.append(step)
        elif step.kind is LoopKind.LANE:
            result += instead(step)
        else:
            result.append(replace(step, body=with_lane_loops(step.body, instead)))
    return tuple(result)


def lane_loops_of(loop: Loop) -> tuple[Loop, ...]:
    """The lane loops that the body consists of; none where anything else stands in it."""
    found = tuple(step for step in loop.body if isinstance(step, Loop) and step.kind is LoopKind.LANE)
    return found if len(found) == len(loop.body) else ()


def buffers_of(steps: tuple[Step, ...]) -> set[str]:
    """The buffers that the steps read or write, index tensors included."""
    return read_by(steps) | indexed_by(steps) | written_by(steps)


def indexed_by(steps: tuple[Step, ...]) -> set[str]:
    """The index tensors that the steps read."""
    loads = (load for step in walk(steps) if isinstance(step, Compute) for load in step.block.loads)
    return {atom.tensor for load in loads for atom in load.indices[0].atoms() if isinstance(atom, Indirect)}


def read_by(steps: tuple[Step, ...]) -> set[str]:
    """The buffers that the steps read, other than as index tensors."""
    names: set[str] = set()
    for step in walk(steps):
        match step:
            case Compute(_, block, _, _):
                names |= {load.tensor for load in block.loads}
            case Copy(source, _):
                names.add(source.buffer)
            case Initialise() | Loop():
                pass
    return names


def written_by(steps: tuple[Step, ...]) -> set[str]:
    """The buffers that the steps write."""
    names: set[str] = set()
    for step in walk(steps):
        match step:
            case Compute(_, _, targets, _):
                names |= {target.buffer for target in targets}
            case Initialise(target, _) | Copy(_, target):
                names.add(target.buffer)
            case Loop():
                pass
    return names


def strides(grid: tuple[Iterator, ...]) -> Generator[tuple[Iterator, Index]]:
    """The axes of a grid, the last first, each with the work items from one of its places to the next."""
    stride = ONE
    for axis in reversed(grid):
        yield axis, stride
        stride = stride * axis.extent


SCATTERED = 32
"""Cheap operations that a write costs where lanes lie apart, and are written one by one."""


def is_scattered(offset: Index, lane: Iterator, others: Iterable[Iterator] = ()) -> bool:
    """Whether neighbouring lanes write elements that lie apart, and no other loop runs along them.

    Where one does, they are moved in tiles, or put together in registers.
    """
    along = (offset.coefficient(iterator) for iterator in others)
    if any(step is not None and step.is_one for step in along):
        return False
    jump = offset.coefficient(lane)
    return jump is None or not (jump.is_zero or jump.is_one)


def work(steps: tuple[Step, ...]) -> Index:
    """Cheap operations of the steps, reads and writes counted as two for each statement.

    What is alike in all turns of a loop is counted once, as compilers compute it before the loop. Writes that
    lanes scatter count as `SCATTERED` each.
    """
    return _work(steps, (), ())


def _work(steps: tuple[Step, ...], around: tuple[Loop, ...], made: tuple[set[str], ...]) -> Index:
    """made: for each loop around the steps, the tensors that it writes."""
    total = ZERO
    iterators = tuple(loop.iterator for loop in around)
    for step in steps:
        if isinstance(step, Loop):
            total = total + _work(step.body, (*around, step), (*made, written_by(step.body)))
        elif isinstance(step, Compute):
            *before, within = _costs_by_loop(step.block, iterators, made)
            turns = ONE
            for cost, iterator in zip(before, iterators, strict=True):
                total = total + turns * cost
                turns = turns * iterator.extent
            if around and around[-1].kind is LoopKind.LANE:
                *outer, lane = iterators
                within += SCATTERED * sum(is_scattered(t.offset, lane, outer) for t in step.targets)
            total = total + turns * (within + 2)
    return total


def _costs_by_loop(block: Block, around: tuple[Iterator, ...], made: tuple[set[str], ...]) -> list[int]:
    """Cheap operations that are to be computed outside of the loops, in the first of them, and so on.

    made: for each loop the tensors that it writes.
    """
    costs = [0] * (len(around) + 1)
    depths: list[int] = []
    for item in block.instructions:
        match item:
            case Load(tensor, indices, _):
                moved = _depth(around, {i for index in indices for i in index.iterators()})
                depth = max([moved, *(d for d, names in enumerate(made, 1) if tensor in names)])
            case Position(index, _):
                depth = _depth(around, index.iterators())
            case Apply(_, operands, _):
                depth = max(depths[operand] for operand in operands)
                costs[depth] += cost_of(item)
            case Constant():
                depth = 0
        depths.append(depth)
    return costs


def _depth(around: tuple[Iterator, ...], moving: Collection[Iterator]) -> int:
    """How many of the loops hold the innermost one of those that move a place."""
    return max((depth for depth, iterator in enumerate(around, 1) if iterator in moving), default=0)


def part_of(loop: Loop, start: Index, extent: Index) -> Loop:
    """So many turns of the loop, from `start` on; they are to lie within its limit."""
    turn = Iterator(loop.iterator.name, extent)
    values: dict[Atom, Index] = {loop.iterator: start + Index.of(turn)}
    return Loop(turn, loop.kind, tuple(substituted(step, values) for step in loop.body))


def in_blocks_of(loop: Loop, length: int, suffix: str = "block") -> tuple[Iterator, Loop]:
    """What iterates over blocks of so many turns, and the loop over those of one; the last may be shorter.

    suffix: behind the loop's name, what makes one for the blocks that is none of the grid's.
    """
    extent = loop.iterator.extent
    block = Iterator(f"{loop.iterator.name}_{suffix}", (extent + (length - 1)) // length)
    even = loop.limit is None and extent.constant is not None and extent.constant % length == 0
    limit = None if even else loop.turns - Index.of(block) * length
    return block, replace(part_of(loop, Index.of(block) * length, Index.of(length)), limit=limit)


def substituted(step: Step, values: dict[Atom, Index]) -> Step:
    """The step with these values in the place of iterators and extents."""

    def target(old: Target) -> Target:
        return Target(old.buffer, old.offset.substitute(values))

    match step:
        case Loop(iterator, kind, body, limit):
            inner = tuple(substituted(child, values) for child in body)
            return Loop(iterator, kind, inner, None if limit is None else limit.substitute(values))
        case Compute(statement, block, targets, combine):
            return Compute(statement, block.substitute(values), tuple(map(target, targets)), combine)
        case Initialise(old, op):
            return Initialise(target(old), op)
        case Copy(source, old):
            return Copy(target(source), target(old))


def _lines(step: Step, indent: str) -> list[str]:
    match step:
        case Loop(iterator, kind, body, limit):
            end = str(iterator.extent) if limit is None else f"min({iterator.extent}, {limit})"
            inner = [line for child in body for line in _lines(child, indent + "  ")]
            return [f"{indent}{kind.value} {iterator} < {end}:", *inner]
        case Initialise(target, op):
            return [f"{indent}{target.buffer}[{target.offset}] = identity of {op.value}"]
        case Copy(source, target):
            return [f"{indent}{target.buffer}[{target.offset}] = {source.buffer}[{source.offset}]"]
        case Compute(statement, block, targets, combine):
            names = ", ".join(f"{t.buffer}[{t.offset}]" for t in targets)
            head = f"{indent}{statement}: {names} {'' if combine is None else combine.value}="
            return [head, *(f"{indent}  {line}" for line in str(block).splitlines())]
