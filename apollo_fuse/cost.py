"""The cost model: how long a kernel takes on a machine, and what bounds it.

A roofline with levels (Williams, Waterman and Patterson, "Roofline", CACM 52, 2009; the in-core part follows
the ECM model of Hofmann, Eitzinger and Fey): work in the core and transfers between levels of memory overlap,
so that for the most part the longer of the two counts, and what starts loops, items, threads and kernels
comes on top.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from apollo_fuse.extents import evaluate, evaluate_formula
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import Kernel, KernelGroup, Scope
from apollo_fuse.machine import ACROSS, FUNCTIONS, MOVES, Gpu, Level, Machine, Unit
from apollo_fuse.occupancy import Block, reached
from apollo_fuse.passes.overlap_tails import SHORTEST
from apollo_fuse.passes.tile_and_map import GRAIN
from apollo_fuse.scop import Derived
from apollo_fuse.strides import Numbers
from apollo_fuse.work import Stretch, Work, work_of

_MOST_CHUNKS = (
    64  # of a launch, as runtime/compute.c parts it, and how many there are of a thread's worth of work
)
_FINER = 4

_WITHIN = {across: within for within, across in ACROSS.items()}  # as elements lie, which move one by one
_DIVIDER = frozenset({Unit.DIVIDE, Unit.SQRT})  # a part of the core that additions and products leave idle
_SHARPNESS = 4  # of the roof's edge: where core and memory take as long, a kernel takes a fifth longer


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run takes, in seconds, and what it consists of.

    core: operations, reads and writes from the nearest cache, of all threads together.
    memory: transfers from further levels by the name of the level, all threads together.
    starts: of loops and items. threads: of parting work, and what waiting for threads leaves unused.
    calls: of the kernel by onnxruntime, or launches.
    compulsory: distinct bytes of tensors. moved: bytes that come from a level or go to it, by its name.
    """

    core: float
    memory: Mapping[str, float]
    starts: float
    threads: float
    calls: float
    elapsed: float
    compulsory: int
    moved: Mapping[str, int]

    @property
    def seconds(self) -> float:
        return self.elapsed + self.calls

    @property
    def bound_by(self) -> str:
        """What the time goes into for the most part."""
        parts = {"operations": self.core, **self.memory, "starts of loops": self.starts}
        parts |= {"threads": self.threads, "the call": self.calls}
        return max(parts, key=lambda name: parts[name])

    def __str__(self) -> str:
        return f"{self.seconds * 1e6:.1f} us, bound by {self.bound_by}"


def cost_of(
    group: KernelGroup,
    sizes: Mapping[Symbol, int],
    machine: Machine,
    threads: int | None = None,
    block: Block | None = None,
) -> Cost:
    """What one run of the group takes on the machine.

    sizes: the extents by their symbols, as `bound` finds them; one that is missing counts as 1.
    threads: of a processor, all cores unless given. block: of a GPU, as it was compiled.
    """
    return cost_of_stitch([(group, sizes)], machine, threads, block)


def cost_of_stitch(
    groups: Sequence[tuple[KernelGroup, Mapping[Symbol, int]]],
    machine: Machine,
    threads: int | None = None,
    block: Block | None = None,
    rows: Sequence[int] | None = None,
) -> Cost:
    """What one run of groups takes that share launches: the first kernels of all, then the second ones.

    rows: on a GPU the items in a block of each group, where those differ.
    """
    stages = list(zip_longest(*(_runs(group, sizes, machine) for group, sizes in groups)))
    launches = [[run for run in stage if run is not None] for stage in stages]
    if machine.gpu is not None:
        block = block or Block()
        items = rows or [block.items] * len(groups)
        blocks = [
            sum(-(-run.work.items // each) for run, each in zip(stage, items, strict=True) if run is not None)
            for stage in stages
        ]
        parts = [
            _on_gpu(runs, machine, machine.gpu, block, count)
            for runs, count in zip(launches, blocks, strict=True)
        ]
        return _sum(parts, machine.node * len(parts))
    used = max(1, machine.cores if threads is None else min(threads, machine.cores))
    tensors = sum(len(group.inputs) + len(group.outputs) for group, _ in groups)
    calls = machine.node + tensors * machine.argument
    return _sum([_launch(runs, machine, used) for runs in launches], calls)


def taken(group: KernelGroup, sizes: Mapping[Symbol, int]) -> tuple[Kernel, ...]:
    """The kernels that a run with these extents takes: those of the first form whose condition holds."""
    numbers = Numbers(sizes)
    holding = (form for form, c in enumerate(group.forms) if numbers.number(c.value) <= c.limit)
    form = next(holding, len(group.forms))
    return tuple(kernel for kernel in group.kernels if kernel.form == form)


def bound(
    group: KernelGroup, shapes: Sequence[Sequence[int]], elements: Mapping[int, Sequence[int]]
) -> dict[Symbol, int]:
    """The extents of a run, from the shapes of the inputs, and from what the inputs hold that are extents.

    elements: what the input at a place holds, of those that `Extent.is_element` names. What does not follow
    from these is left out.
    """
    sizes: dict[Symbol, int] = {}
    for extent in group.extents:
        if isinstance(extent, Derived):
            found = evaluate_formula(extent.formula, sizes)
        elif extent.is_element and extent.input not in elements:
            found = None
        else:
            source = elements[extent.input] if extent.is_element else shapes[extent.input]
            rest, divisor = evaluate(extent.rest, sizes), evaluate(extent.divisor, sizes)
            found = None if rest is None or not divisor else (source[extent.axis] - rest) // divisor
        if found is not None:
            sizes[extent.symbol] = found
    return sizes


def _sum(parts: Sequence[Cost], calls: float) -> Cost:
    """Kernels that run one after the other."""
    memory: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for part in parts:
        memory.update(part.memory)
        moved.update(part.moved)
    return Cost(
        sum(part.core for part in parts),
        memory,
        sum(part.starts for part in parts),
        sum(part.threads for part in parts),
        calls,
        sum(part.elapsed for part in parts),
        sum(part.compulsory for part in parts),
        moved,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A kernel in a run of its group, which touches so many bytes of lines with all of its kernels."""

    work: Work
    touched: float


def _runs(group: KernelGroup, sizes: Mapping[Symbol, int], machine: Machine) -> list[_Run]:
    works = [work_of(kernel, sizes, machine) for kernel in taken(group, sizes)]
    touched = _touched(works)
    return [_Run(work, touched) for work in works]


def _touched(works: Sequence[Work]) -> float:
    """Bytes of lines of the tensors that the kernels of a group read or write, one after the other."""
    read: dict[str, float] = {}
    written: dict[str, float] = {}
    for traffic in (t for work in works for t in work.traffic if t.scope is Scope.GLOBAL):
        if traffic.is_write:  # each a part
            written[traffic.buffer] = written.get(traffic.buffer, 0.0) + traffic.lines
        else:
            read[traffic.buffer] = max(read.get(traffic.buffer, 0.0), traffic.lines)
    return sum(max(read.get(name, 0.0), written.get(name, 0.0)) for name in read.keys() | written.keys())


def _launch(runs: Sequence[_Run], machine: Machine, threads: int) -> Cost:
    """Kernels whose items are parted among threads together."""
    works = [run.work for run in runs]
    items, cheap = sum(work.items for work in works), sum(work.items * work.cheap for work in works)
    chunks = _chunks(items, cheap)
    used = min(threads, chunks)
    core = across = starts = 0.0
    for stretch in (stretch for work in works for stretch in work.stretches):
        turns, twice, start = _core(stretch, machine)
        core, across, starts = core + turns, across + twice, starts + start
    starts += items * machine.item
    moved = _moved(runs, machine, used)
    levels = machine.levels[1:]
    one = {level.name: moved[level.name].seconds(level, 1) for level in levels}
    if used == 1:
        elapsed = _overlapped(core, across + max(one.values(), default=0.0)) + starts
    else:
        streamed = (_streamed(moved[x.name].seconds(x, used), one[x.name], machine.wake) for x in levels)
        computed = _schedule((core + starts) / chunks, chunks, used, machine.wake)
        elapsed = machine.launch + _overlapped(computed, across / used + max(streamed, default=0.0))
    together = max((moved[level.name].seconds(level, used) for level in levels), default=0.0)
    shared = _overlapped(core / used, across / used + together) + starts / used
    return Cost(
        core,
        one,
        starts,
        elapsed - shared,
        0.0,
        elapsed,
        sum(work.compulsory for work in works),
        {name: m.read + m.written for name, m in moved.items()},
    )


def _on_gpu(runs: Sequence[_Run], machine: Machine, gpu: Gpu, block: Block, blocks: int) -> Cost:
    """Blocks compute items, threads lanes; rates are those of all multiprocessors together."""
    works = [run.work for run in runs]
    share = reached(gpu, block, blocks)
    core = sum(_core(stretch, machine)[0] for work in works for stretch in work.stretches)
    moved = _moved(runs, machine, gpu.multiprocessors)
    memory = {
        level.name: moved[level.name].seconds(level, gpu.multiprocessors) for level in machine.levels[1:]
    }
    peak = max(core, *memory.values())
    elapsed = peak / share if share else 0.0
    return Cost(
        core,
        memory,
        0.0,
        elapsed - peak,
        0.0,
        elapsed,
        sum(work.compulsory for work in works),
        {name: m.read + m.written for name, m in moved.items()},
    )


def _overlapped(core: float, memory: float) -> float:
    """Seconds of work in the core and of transfers, where neither hides all of the other."""
    longer, shorter = max(core, memory), min(core, memory)
    return longer * (1 + (shorter / longer) ** _SHARPNESS) ** (1 / _SHARPNESS) if longer else 0.0


def _chunks(items: int, cheap: int) -> int:
    """What the plugin parts a launch into, of so many items and cheap operations."""
    threads = min((cheap + GRAIN // 2) // GRAIN, items)
    return 1 if threads < 2 else min(threads * _FINER, items, _MOST_CHUNKS)


def _streamed(together: float, alone: float, wake: float) -> float:
    """Seconds of moving what all threads move in `together` and one in `alone`, with the others waking."""
    return alone if alone <= wake else together + wake * (1 - together / alone)


def _schedule(chunk: float, chunks: int, threads: int, wake: float) -> float:
    """Seconds until all chunks are done, each by the first thread that is free; all but one have to wake."""
    free = [0.0] + [wake] * (threads - 1)
    end = 0.0
    for _ in range(chunks):
        start = heapq.heappop(free)
        heapq.heappush(free, start + chunk)
        end = max(end, start + chunk)
    return end


@dataclass(frozen=True, slots=True)
class _Moved:
    """Bytes that come from a level, or go to it."""

    read: int
    written: int

    def seconds(self, level: Level, threads: int) -> float:
        """With all of so many threads moving their share."""
        reading, writing = (level.bandwidth(rate, threads) for rate in (level.read, level.write))
        return self.read / reading + self.written / writing


def _moved(runs: Sequence[_Run], machine: Machine, threads: int) -> dict[str, _Moved]:
    """What each level but the nearest delivers and takes, where a run finds what the one before has left.

    Between two uses of a line come all that its group touches, and none of what shares a launch with it: what
    does not share one would come between them, too.
    """
    found: dict[str, _Moved] = {}
    for nearer, level in pairwise(machine.levels):
        assert nearer.size is not None
        room = nearer.size if nearer.shared else nearer.size * threads
        read = written = 0.0
        for run in runs:
            share = missing(run.touched, room)
            for traffic in (t for t in run.work.traffic if t.scope is Scope.GLOBAL):
                lines = traffic.lines * share
                for between, again in traffic.again:
                    lines += again * missing(between, nearer.size)
                if traffic.is_write:
                    written += lines
                else:
                    read += lines
        found[level.name] = _Moved(round(read), round(written))
    return found


def missing(touched: float, room: int) -> float:
    """The share of what is touched in turn that is not found again in a cache of this size.

    Least recently used lines go first: what is a little larger than the cache is never found. Real caches
    know the order about, and hold other things too, hence the slope.
    """
    return min(1.0, max(0.0, (touched / room - 0.5) / 0.75))


def _core(stretch: Stretch, machine: Machine) -> tuple[float, float, float]:
    """Seconds of the iterations, and of the starts, of a stretch on one thread.

    Between the two stands the part of the iterations in which the nearest cache is busy with vectors that lie
    across two of its lines, and takes none from further levels.
    """
    arithmetic = divider = functions = ports = across = 0.0
    for (found, size), count in stretch.operations.items():
        unit = found if stretch.is_vector else _WITHIN.get(found, found)
        factor = 1.0 if stretch.is_vector else _scalar(unit, size, machine)
        seconds = count * factor * machine.of(unit, size)
        if unit in MOVES:
            ports += seconds
            if unit in _WITHIN:
                across += max(0.0, seconds - count * machine.of(_WITHIN[unit], size))
        elif unit in FUNCTIONS:  # which divide, too
            functions += seconds
        elif unit in _DIVIDER:
            divider += seconds
        else:
            arithmetic += seconds
    chain = max((machine.of(unit, size) for unit, size in stretch.chains), default=0.0)
    whole = stretch.is_vector and stretch.is_ragged
    beside = max(arithmetic, divider) + (1 - machine.hidden) * min(arithmetic, divider)
    turns = _whole(stretch, machine) if whole else stretch.turns
    seconds = max(functions + beside, ports, chain) * turns
    start = machine.drain if stretch.is_awaited else machine.loop
    return seconds, across * turns, stretch.starts * start if stretch.is_loop else 0.0


def _whole(stretch: Stretch, machine: Machine) -> float:
    """Iterations of a loop of vectors, with those that fill no vector counted for what they take.

    What is left takes half a vector, then elements one by one, or one vector of `SHORTEST` that starts early.
    A loop that is known to fill no vector is made of smaller ones. Of what is no whole vector each takes half
    as long as one.
    """
    if not stretch.starts:
        return 0.0
    widest = lanes = machine.lanes(max((size for _, size in stretch.operations), default=4))
    each = stretch.turns / stretch.starts
    if stretch.is_covered and each >= SHORTEST:
        piece = max(SHORTEST, widest // 2)
        return stretch.starts * math.ceil(each / piece) * piece
    while stretch.is_known and 1 < lanes > each:
        lanes //= 2
    vectors, rest = divmod(each, lanes)
    halves, single = divmod(rest, max(1, lanes // 2))
    pieces = halves + math.ceil(single) + (vectors if lanes < widest else 2 * vectors)
    return stretch.starts * pieces * widest / 2


def _scalar(unit: Unit, size: int, machine: Machine) -> float:
    """How much longer an operation takes outside of vectors."""
    return 1.0 if unit in (Unit.REMAINDER, Unit.LIBRARY) else max(1.0, machine.lanes(size) / 2)
