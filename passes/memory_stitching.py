"""Layer II: gives what statements pass to each other inside a work item its scope, by liveness and budget.

An intermediate read where it was written is a REGISTER, and so is an accumulator.  One that another
nest reads is SHARED: memory of the work item's own, which on a CPU stays in the first or second level
cache of its thread.  SHARED intermediates whose lifetimes do not overlap lie in the same memory; what
does not fit the budget is an `Overflow`, which names what could be computed again instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Block, Instruction, Load
from apollo_fuse.graph import Refused
from apollo_fuse.index import ONE, ZERO, Index, Iterator, product
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
    walk,
)
from apollo_fuse.passes.nests import Nest, Nests, Placed
from apollo_fuse.scop import tensor_size

RULE = "memory_stitching"
NEAR = 16 * 1024  # bytes that stay in a first level cache beside what is read and written


@dataclass(frozen=True, slots=True)
class Overflow:
    """Tensors that no work item may hold, and the refusal that stands where they cannot be done without."""

    tensors: tuple[str, ...]
    refused: Refused


@dataclass(frozen=True, slots=True)
class Lanes:
    """The loops that wrap the statements of a nest, outermost first; the lane loop is one of them.

    `lane` and `width` are set when the lanes come from the grid: accumulators and intermediates then
    hold one element for each lane.
    """

    loops: tuple[tuple[Iterator, LoopKind, Index | None], ...] = ()
    lane: Index | None = None
    width: Index = ONE


@dataclass(frozen=True, slots=True)
class MemoryStitching:
    """`shared_bytes` is the budget of a work item.

    On a CPU it is half of a second level cache, the other half being for inputs and outputs: of 512 KiB,
    which few server processors are below. On a GPU it is the 48 KiB that a block has without asking.
    """

    shared_bytes: int = 256 * 1024

    def __call__(
        self, name: str, nests: Nests, grid: tuple[Iterator, ...], lanes: Lanes
    ) -> Kernel | Overflow | Refused:
        state = _State(nests, lanes, _forwarded(nests))
        try:
            body = state.steps(nests.body, ())
        except _OutOfPlace as problem:
            return Refused(tuple(nests.placed), RULE, problem.args[0], problem.args[1])
        scop = nests.scop
        interface = [
            Buffer(v.name, v.dtype, tensor_size(v), Scope.GLOBAL)
            for v in (*scop.inputs, *scop.outputs, *scop.temporaries)
        ]
        local = _hosted(tuple(state.local.values()), body)
        kernel = Kernel(name, (*interface, *local), grid, body)
        needed = kernel.shared_bytes.constant
        if needed is not None and needed > self.shared_bytes:
            evidence = f"{needed} bytes a work item, of {self.shared_bytes}"
            refused = Refused(tuple(nests.placed), RULE, "intermediates overflow on-chip memory", evidence)
            return Overflow(shared_tensors(kernel), refused)
        return _in_outputs(kernel)


def shared_tensors(kernel: Kernel) -> tuple[str, ...]:
    """The largest first."""
    shared = (b for b in kernel.buffers if b.scope is Scope.SHARED)
    return tuple(b.name for b in sorted(shared, key=lambda b: -(b.size.constant or 0)))


def _hosted(buffers: tuple[Buffer, ...], body: tuple[Step, ...]) -> tuple[Buffer, ...]:
    """The buffers, with SHARED ones in the memory of others of their type that are no longer read.

    A lifetime is the steps of the body from the first that mentions a buffer to the last. Greedy, in the
    order of first mention; optimal for buffers of one size, as for intervals.
    """
    mentioned: dict[str, list[int]] = {}
    for place, step in enumerate(body):
        for name in buffers_of((step,)):
            mentioned.setdefault(name, []).append(place)
    shared = sorted(
        (b for b in buffers if b.scope is Scope.SHARED and b.name in mentioned),
        key=lambda b: mentioned[b.name][0],
    )
    free_after: dict[str, int] = {}  # host: the last step that its present content is needed in
    placed: dict[str, Buffer] = {}
    for buffer in shared:
        first, last = mentioned[buffer.name][0], mentioned[buffer.name][-1]
        fitting = [
            host
            for host, until in free_after.items()
            if until < first and (placed[host].dtype, placed[host].size) == (buffer.dtype, buffer.size)
        ]
        if fitting:
            buffer = replace(buffer, host=fitting[0])
        free_after[fitting[0] if fitting else buffer.name] = last
        placed[buffer.name] = buffer
    return tuple(placed.get(b.name, b) for b in buffers)


def _in_outputs(kernel: Kernel) -> Kernel:
    """The kernel with its long SHARED buffers in the outputs that are written over them.

    The memory of an output has to come near once.  It does so while an intermediate is computed, rather
    than while it is copied, and the buffer takes no room beside it.
    """
    buffers = tuple(_in_output(kernel, b) if _is_long(b) else b for b in kernel.buffers)
    return replace(kernel, buffers=buffers)


def _is_long(buffer: Buffer) -> bool:
    known = buffer.bytes.constant
    plain = buffer.dtype is buffer.dtype.compute and buffer.dtype is not DType.BOOL
    return buffer.scope is Scope.SHARED and buffer.host is None and plain and (known is None or known > NEAR)


def _in_output(kernel: Kernel, buffer: Buffer) -> Buffer:
    """In an output that the last reader writes element by element, where nothing else needs either."""
    if any(b.host == buffer.name for b in kernel.buffers):
        return buffer
    mentions = [place for place, step in enumerate(kernel.body) if buffer.name in buffers_of((step,))]
    steps = kernel.body[mentions[0] : mentions[-1] + 1]
    last = [s for s in walk(steps[-1:]) if isinstance(s, Compute) and _reads(s, buffer.name)]
    if len(last) != 1 or len(last[0].targets) != 1 or len(_reads(last[0], buffer.name)) != 1:
        return buffer
    (reader,) = last
    (target,), (offset,) = reader.targets, _reads(reader, buffer.name)
    host = kernel.buffer(target.buffer)
    base = target.offset - offset
    others = [s for s in walk(steps) if not isinstance(s, Loop) and s is not reader]
    if (
        host.scope is Scope.GLOBAL
        and host.dtype is buffer.dtype
        and base.iterators() <= frozenset(kernel.grid)
        and product(i.extent for i in offset.iterators()) == buffer.size
        and host.name not in buffers_of((*others, replace(reader, targets=())))
    ):
        return replace(buffer, host=host.name, base=base)
    return buffer


def _reads(step: Compute, name: str) -> list[Index]:
    return [load.indices[0] for load in step.block.loads if load.tensor == name]


class _OutOfPlace(Exception):
    """Its arguments are the reason and the evidence."""


def _forwarded(nests: Nests) -> frozenset[str]:
    """Tensors whose every reader runs right after the writer, at the same place."""
    beside: dict[str, tuple[Nest, ...]] = {}

    def visit(children: tuple[Nest, ...]) -> None:
        run: list[Nest] = []
        for child in children:
            if child.iterator is None:
                run.append(child)
            else:
                run = []
                visit(child.children)
            for member in run:
                beside[member.statement] = tuple(run)

    visit(nests.body)
    found: set[str] = set()
    for name, placed in nests.placed.items():
        if placed.reduced:
            continue
        target = placed.statement.target.name
        together = {n.statement for n in beside[name]}
        readers = {
            n: load for n, p in nests.placed.items() for load in p.block.loads if load.tensor == target
        }
        if readers and all(n in together and load.indices[0] == placed.offset for n, load in readers.items()):
            found.add(target)
    return frozenset(found)


@dataclass(slots=True)
class _State:
    nests: Nests
    lanes: Lanes
    forwarded: frozenset[str]
    local: dict[str, Buffer] = field(default_factory=dict)
    started: set[str] = field(default_factory=set)

    def steps(self, children: tuple[Nest, ...], around: tuple[Iterator, ...]) -> tuple[Step, ...]:
        """The steps of sibling nests; `around` holds the loops outside, without the grid."""
        result: list[Step] = []
        run: list[Placed] = []
        for child in children:
            if child.iterator is None:
                run.append(self.nests.placed[child.statement])
                continue
            result += self._wrapped(run)
            run = []
            result += self._loop(child, child.iterator, around)
        return (*result, *self._wrapped(run))

    def _loop(self, nest: Nest, iterator: Iterator, around: tuple[Iterator, ...]) -> list[Step]:
        beginning = [
            p for p in self._within(nest) if iterator in p.reduced and p.statement.name not in self.started
        ]
        before: list[Step] = []
        after: list[Step] = []
        for placed in beginning:
            self.started.add(placed.statement.name)
            inside = placed.offset.iterators() & set(self._loops(nest))
            if inside:
                raise _OutOfPlace(
                    "a reduction keeps an axis inside its own loop", ", ".join(map(str, inside))
                )
            accumulator = self._accumulator(placed)
            assert placed.statement.reduction is not None
            before.append(Initialise(accumulator, placed.statement.reduction.op))
            tensor = placed.statement.target.name
            if tensor not in self.nests.local_sizes:
                after.append(Copy(accumulator, Target(tensor, placed.offset)))
            elif accumulator.buffer != tensor:
                after.append(Copy(accumulator, self._local(tensor, placed.offset)))
        body = self.steps(nest.children, (*around, iterator))
        innermost = self.lanes.lane is None and not any(isinstance(step, Loop) for step in body)
        kind = LoopKind.LANE if innermost else LoopKind.SEQUENTIAL
        return [*self._in_lanes(before), Loop(iterator, kind, body), *self._in_lanes(after)]

    def _within(self, nest: Nest) -> list[Placed]:
        if nest.iterator is None:
            return [self.nests.placed[nest.statement]]
        return [p for child in nest.children for p in self._within(child)]

    def _loops(self, nest: Nest) -> list[Iterator]:
        inner = [i for child in nest.children for i in self._loops(child)]
        return inner if nest.iterator is None else [nest.iterator, *inner]

    def _wrapped(self, run: list[Placed]) -> list[Step]:
        return self._in_lanes([self._compute(placed) for placed in run])

    def _in_lanes(self, steps: list[Step]) -> list[Step]:
        if not steps:
            return []
        for iterator, kind, limit in reversed(self.lanes.loops):
            steps = [Loop(iterator, kind, tuple(steps), limit)]
        return steps

    def _compute(self, placed: Placed) -> Compute:
        statement = placed.statement
        target = statement.target
        internal = target.name in self.nests.local_sizes
        block = Block(tuple(map(self._instruction, placed.block.instructions)))
        if placed.reduced:
            assert statement.reduction is not None
            return Compute(statement.name, block, (self._accumulator(placed),), statement.reduction.op)
        targets: list[Target] = []
        if target.name in self.forwarded:
            name = f"{target.name}_value"
            self.local.setdefault(name, Buffer(name, target.dtype, ONE, Scope.REGISTER))
            targets.append(Target(name, ZERO))
        elif internal:
            targets.append(self._local(target.name, placed.offset))
        if not internal:
            targets.append(Target(target.name, placed.offset))
        return Compute(statement.name, block, tuple(targets))

    def _accumulator(self, placed: Placed) -> Target:
        """Where a reduction is added up: in a register, of each lane where lanes are around it."""
        target = placed.statement.target
        kept = self.nests.local_sizes.get(target.name)
        if kept is not None and (kept.is_one or self.lanes.lane is not None):
            return self._local(target.name, placed.offset)
        name = f"{target.name}_sum"
        self.local.setdefault(name, Buffer(name, target.dtype, self.lanes.width, Scope.REGISTER))
        return Target(name, self.lanes.lane if self.lanes.lane is not None else ZERO)

    def _local(self, tensor: str, offset: Index) -> Target:
        size = self.nests.local_sizes[tensor]
        dtype = self.nests.scop.value(tensor).dtype
        scope = Scope.REGISTER if size.is_one else Scope.SHARED
        self.local.setdefault(tensor, Buffer(tensor, dtype, size * self.lanes.width, scope))
        place = offset if self.lanes.lane is None else offset * self.lanes.width + self.lanes.lane
        return Target(tensor, place)

    def _instruction(self, item: Instruction) -> Instruction:
        if not isinstance(item, Load):
            return item
        if item.tensor in self.forwarded:
            return Load(f"{item.tensor}_value", (ZERO,), item.dtype)
        if item.tensor in self.nests.local_sizes:
            target = self._local(item.tensor, item.indices[0])
            return Load(target.buffer, (target.offset,), item.dtype)
        return item
