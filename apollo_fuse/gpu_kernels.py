"""The kernels of a model on GPUs: compiled ahead of time, and predicted.

Each kernel is compiled with several numbers of warps, and the cost model, which knows from the compiled ones
what stays in flight, takes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from apollo_fuse.codegen.launches import GpuForm, gpu_form
from apollo_fuse.codegen.triton.compile import Binary, Job, compile_kernels
from apollo_fuse.codegen.triton.emit import Launch, Program, emit
from apollo_fuse.cost import Cost, bound, cost_of, taken
from apollo_fuse.cpu import default_threads
from apollo_fuse.dtypes import DType
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.graph import Refused
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.occupancy import Block, occupancy
from apollo_fuse.options import Options
from apollo_fuse.report import GpuReport
from apollo_fuse.summary import evaluate

_FACTORS = (1.0, 0.5, 2.0)  # times the warps that a kernel is emitted for; the first where several are alike
_MOST_THREADS = 1024


@dataclass(frozen=True, slots=True)
class GpuKernels:
    """For each variant of a kernel its reports by GPU, and for each kernel by name what a library holds.

    A kernel of several variants has the warps that are best for the first of them.
    """

    reports: Mapping[str, Mapping[str, GpuReport]]
    forms: Mapping[str, GpuForm]


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A kernel with a number of warps, and what it takes; `cost` is None where the run takes another form."""

    binary: Binary
    cost: Cost | None


def on_gpus(
    candidates: Iterable[Candidate],
    sizes: Mapping[Symbol, int],
    options: Options,
    warn: Callable[[str], None],
) -> GpuKernels:
    """The candidates on the GPUs of the target; `sizes` are the extents of the run that is predicted."""
    distinct: dict[str, Candidate] = {}
    for candidate in candidates:
        distinct.setdefault(candidate.variant, candidate)
    programs: dict[str, Program] = {}
    for variant, candidate in distinct.items():
        program = emit(candidate.group, candidate.name, candidate.name)
        if isinstance(program, Refused):
            warn(f"kernel {candidate.name} has no form for GPUs: {program.reason}: {program.evidence}")
        else:
            programs[variant] = program
    reports: dict[str, dict[str, GpuReport]] = {variant: {} for variant in distinct}
    chosen: dict[str, dict[GpuTarget, list[Binary]]] = {variant: {} for variant in programs}
    for gpu in options.gpus:
        jobs = [(distinct[variant], program) for variant, program in programs.items()]
        for variant, kernels in zip(programs, _chosen(jobs, gpu, sizes, options), strict=True):
            reports[variant][str(gpu)] = _report(kernels, gpu)
            chosen[variant][gpu] = [x.binary for x in kernels]
    forms: dict[str, GpuForm] = {}
    for variant, program in programs.items():
        candidate = distinct[variant]
        binaries = {gpu: found for gpu, found in chosen[variant].items() if gpu.launches}
        if binaries and candidate.name not in forms:
            forms[candidate.name] = gpu_form(candidate.group, candidate.name, program.launches, binaries)
    return GpuKernels(reports, forms)


def _chosen(
    programs: Sequence[tuple[Candidate, Program]],
    target: GpuTarget,
    sizes: Mapping[Symbol, int],
    options: Options,
) -> list[list[_Compiled]]:
    """For each program its kernels in order, each with the warps that serve it best."""
    jobs = [
        Job(program.text, launch, _types(candidate.group))
        for candidate, program in programs
        for each in program.launches
        for launch in _variants(each, target)
    ]
    workers = options.threads or default_threads()
    binaries = iter(compile_kernels(jobs, target, options.cache_dir, workers))
    found: list[list[_Compiled]] = []
    for candidate, program in programs:
        variants = {
            launch.kernel: [next(binaries) for _ in _variants(launch, target)] for launch in program.launches
        }
        found.append(_best(candidate, variants, target, sizes))
    return found


def _variants(launch: Launch, target: GpuTarget) -> list[Launch]:
    most = _MOST_THREADS // target.warp
    warps = dict.fromkeys(max(1, min(most, int(launch.warps * factor))) for factor in _FACTORS)
    return [replace(launch, warps=number) for number in warps]


def _types(group: KernelGroup) -> dict[str, DType]:
    return {v.name: v.dtype for v in (*group.inputs, *group.outputs, *group.temporaries)}


def _best(
    candidate: Candidate,
    variants: Mapping[str, Sequence[Binary]],
    target: GpuTarget,
    sizes: Mapping[Symbol, int],
) -> list[_Compiled]:
    """The fewest spills, and then the least predicted time where the run takes the kernel."""
    group = candidate.group
    shapes = [[evaluate(extent, sizes) for extent in value.shape] for value in candidate.micro_graph.inputs]
    own = bound(group, shapes, {})
    runs = taken(group, own)
    found: list[_Compiled] = []
    for kernel in group.kernels:
        if kernel not in runs:
            found.append(_Compiled(min(variants[kernel.name], key=lambda x: x.spills), None))
            continue
        alone = replace(group, kernels=(replace(kernel, form=0),), forms=())
        costs = [(b, cost_of(alone, own, target.machine, block=_block(b))) for b in variants[kernel.name]]
        found.append(_Compiled(*min(costs, key=lambda x: (x[0].spills, x[1].seconds))))
    return found


def _report(kernels: Sequence[_Compiled], target: GpuTarget) -> GpuReport:
    machine = target.machine
    assert machine.gpu is not None
    costs = [(x.binary, x.cost) for x in kernels if x.cost is not None]
    longest, _ = max(costs, key=lambda x: x[1].seconds)
    return GpuReport(
        launches=len(costs),
        registers=max(binary.registers for binary, _ in costs),
        spills=sum(binary.spills for binary, _ in costs),
        shared_bytes=max(binary.shared_bytes for binary, _ in costs),
        num_warps=longest.threads // target.warp,
        occupancy=occupancy(machine.gpu, _block(longest)),
        dram_bytes=sum(cost.moved[machine.levels[-1].name] for _, cost in costs),
        compulsory_bytes=sum(cost.compulsory for _, cost in costs),
        predicted_us=sum(cost.seconds for _, cost in costs) * 1e6,
        binary_bytes=sum(binary.bytes for binary, _ in costs),
    )


def _block(binary: Binary) -> Block:
    return Block(binary.threads, binary.registers, binary.shared_bytes, binary.items)
