"""How each kernel is compiled for a GPU: with other warps, too, where what was compiled says that it can pay.

A kernel is compiled as it was emitted. Where that spills registers, more warps mean fewer elements for each
thread, and are tried until nothing spills. Where the cost model says that much of the time is lost to a GPU
that is not full, half and twice as many are tried. Most kernels need neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from apollo_fuse.codegen.triton.compile import Binary, Job, compile_kernels
from apollo_fuse.codegen.triton.emit import RULE, Launch, Program, emit
from apollo_fuse.cost import Cost, cost_of, taken
from apollo_fuse.cpu import default_threads
from apollo_fuse.dtypes import DType
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.gpu_tiles import extents_of, group_of, tiled
from apollo_fuse.graph import Refused
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import Kernel, KernelGroup
from apollo_fuse.occupancy import Block
from apollo_fuse.options import Options

_MOST_THREADS = 1024
_WORTH_TRYING = 0.1
"""The share of a run, its launch included, that has to be lost before other warps are tried."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel with a number of warps, and what it takes; `cost` is None where the run takes another form."""

    binary: Binary
    cost: Cost | None

    @property
    def rank(self) -> tuple[int, float]:
        """The fewest spills are best, and then the least predicted time."""
        return self.binary.spills, self.cost.seconds if self.cost is not None else 0.0


@dataclass(slots=True)
class _Trial:
    """One kernel, and what it was compiled to so far, by the number of warps."""

    candidate: Candidate
    text: str
    launch: Launch
    kernel: Kernel
    is_taken: bool
    extents: Mapping[Symbol, int]
    found: dict[int, Compiled] = field(default_factory=dict)

    @property
    def best(self) -> Compiled:
        return min(self.found.values(), key=lambda x: x.rank)

    def next_warps(self, target: GpuTarget) -> list[int]:
        """What is worth to be tried next; nothing where the best could not get much better."""
        most = _MOST_THREADS // target.warp
        if not self.found:
            return [min(most, self.launch.warps)]
        best, widest = self.best, max(self.found)
        if best.binary.spills:
            return [2 * widest] if widest < most else []
        if len(self.found) > 1 or best.cost is None:
            return []
        lost = best.cost.threads / best.cost.seconds
        others = [number for number in (widest // 2, 2 * widest) if 1 <= number <= most]
        return others if lost > _WORTH_TRYING else []

    def job(self, warps: int) -> Job:
        return Job(self.text, replace(self.launch, warps=warps), types_of(self.candidate.group))

    def add(self, warps: int, binary: Binary, target: GpuTarget) -> None:
        cost = None
        if self.is_taken:
            own = group_of(self.candidate.group, self.kernel)
            cost = cost_of(own, self.extents, target.machine, block=block_of(binary))
        self.found[warps] = Compiled(binary, cost)


def best_of(
    programs: Sequence[tuple[Candidate, Program]],
    target: GpuTarget,
    sizes: Mapping[Symbol, int],
    options: Options,
) -> list[list[Compiled]]:
    """For each program its kernels in order, each with the warps that serve it best."""
    trials = [_trials(candidate, program, sizes) for candidate, program in programs]
    every = [trial for own in trials for trial in own]
    workers = options.threads or default_threads()
    while pending := [(trial, warps) for trial in every for warps in trial.next_warps(target)]:
        jobs = [trial.job(warps) for trial, warps in pending]
        binaries = compile_kernels(jobs, target, options.cache_dir, workers)
        for (trial, warps), binary in zip(pending, binaries, strict=True):
            trial.add(warps, binary, target)
    return [[trial.best for trial in own] for own in trials]


def spilling(
    candidates: Sequence[Candidate], sizes: Mapping[Symbol, int], options: Options
) -> dict[int, Refused]:
    """The places of candidates with a kernel that spills registers on some GPU, however many warps it has."""
    groups = tiled(candidates, sizes, options.gpus)
    distinct = {x.variant: replace(x, group=groups[x.name]) for x in candidates}.values()
    emitted = [(x, emit(x.group, x.name, x.name)) for x in distinct]
    jobs = [(x, program) for x, program in emitted if isinstance(program, Program)]
    found: dict[str, Refused] = {}
    for gpu in options.gpus:
        for (x, _), kernels in zip(jobs, best_of(jobs, gpu, sizes, options), strict=True):
            if spills := max(kernel.binary.spills for kernel in kernels):
                evidence = f"{spills} bytes of registers are spilled by a thread on {gpu}"
                found.setdefault(x.variant, Refused((), RULE, "too many live values", evidence))
    return {place: found[x.variant] for place, x in enumerate(candidates) if x.variant in found}


def _trials(candidate: Candidate, program: Program, sizes: Mapping[Symbol, int]) -> list[_Trial]:
    group, own = candidate.group, extents_of(candidate, sizes)
    run = taken(group, own)
    return [
        _Trial(candidate, program.text, launch, kernel, kernel in run, own)
        for launch, kernel in zip(program.launches, group.kernels, strict=True)
    ]


def types_of(group: KernelGroup) -> dict[str, DType]:
    """Of the tensors that launches name."""
    return {v.name: v.dtype for v in (*group.inputs, *group.outputs, *group.temporaries)}


def block_of(binary: Binary) -> Block:
    """What occupancy follows from."""
    return Block(binary.threads, binary.registers, binary.shared_bytes, binary.items)
