"""The kernels of a model on GPUs: compiled ahead of time, and predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from apollo_fuse.codegen.launches import GpuCode, Kinds, Variant, gpu_form
from apollo_fuse.codegen.stitched import runs, writer, writes
from apollo_fuse.codegen.triton.compile import Binary, Job, compile_kernels
from apollo_fuse.codegen.triton.emit import Launch, Program, emit, emit_stitched
from apollo_fuse.cold import ColdTraffic, cold_traffic
from apollo_fuse.cost import cost_of_stitch, taken
from apollo_fuse.cpu import default_threads
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.gpu_tiles import extents_of, group_of, tiled
from apollo_fuse.gpu_trials import Compiled, best_of, block_of
from apollo_fuse.graph import Refused
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.occupancy import occupancy
from apollo_fuse.options import Options
from apollo_fuse.report import GpuReport
from apollo_fuse.stitching import Stitch


@dataclass(frozen=True, slots=True)
class GpuKernels:
    """For each variant of a kernel or stitch its reports by GPU, and what a library holds.

    dumps: what members of stitches share, and kernels in other parts than the CPU's, in Triton, by file name.
    """

    reports: Mapping[str, Mapping[str, GpuReport]]
    code: GpuCode
    dumps: Mapping[str, str] = field(default_factory=dict)


def on_gpus(
    candidates: Iterable[Candidate],
    stitches: Iterable[Stitch],
    sizes: Mapping[Symbol, int],
    options: Options,
    warn: Callable[[str], None],
) -> GpuKernels:
    """The candidates on the GPUs of the target, and the stitches of some of them.

    sizes: the extents of the run that is predicted.
    """
    every = list(candidates)
    groups = tiled(every, sizes, options.gpus)
    distinct = {x.variant: replace(x, group=groups[x.name]) for x in reversed(every)}
    programs: dict[str, Program] = {}
    for variant, candidate in distinct.items():
        program = emit(candidate.group, candidate.name, candidate.name)
        if isinstance(program, Refused):
            warn(f"kernel {candidate.name} has no form for GPUs: {program.reason}: {program.evidence}")
        else:
            programs[variant] = program
    jobs = [(distinct[variant], program) for variant, program in programs.items()]
    reports: dict[str, dict[str, GpuReport]] = {variant: {} for variant in distinct}
    alone: dict[GpuTarget, dict[str, list[Binary]]] = {}
    for gpu in options.gpus:
        alone[gpu] = {}
        for (candidate, program), kernels in zip(jobs, best_of(jobs, gpu, sizes, options), strict=True):
            cold = cold_traffic(candidate.group, program.launches, extents_of(candidate, sizes), gpu.machine)
            reports[candidate.variant][str(gpu)] = _report(kernels, gpu, [cold])
            alone[gpu][candidate.variant] = [x.binary for x in kernels]
    launches = {candidate.name: program.launches for candidate, program in jobs}
    variants: dict[str, list[Variant]] = {name: [] for name in launches}
    for candidate, _ in jobs:
        own = extents_of(candidate, sizes)
        extents = tuple(own.get(extent.symbol, 0) for extent in candidate.group.extents)
        binaries = {gpu: alone[gpu][candidate.variant] for gpu in options.gpus}
        variants[candidate.name].append(Variant(extents, binaries))
    joined = [
        replace(x, members=tuple(replace(member, group=groups[member.name]) for member in x.members))
        for x in stitches
        if all(member.name in launches for member in x.members)
    ]
    stitched = _stitched(joined, launches, options)
    for x in joined:
        reports[x.variant] = {
            str(gpu): _report_of_stitch(x, launches, alone[gpu], stitched.binaries, gpu, sizes)
            for gpu in options.gpus
        }
    forms = {
        candidate.name: gpu_form(
            candidate.group, candidate.name, launches[candidate.name], variants[candidate.name]
        )
        for candidate, _ in jobs
    }
    code = GpuCode(forms, stitched.binaries, stitched.writer)
    return GpuKernels(reports, code, _texts(every, jobs) | stitched.texts)


def _texts(candidates: Iterable[Candidate], programs: Iterable[tuple[Candidate, Program]]) -> dict[str, str]:
    """Of the programs that compute other parts than the items of the candidates, by file name."""
    groups = {x.name: x.group for x in candidates}
    return {f"{x.name}.triton.py": program.text for x, program in programs if x.group != groups[x.name]}


@dataclass(frozen=True, slots=True)
class _Stitched:
    """Kernels that share launches: their binaries, what writes their tables, and texts by file name."""

    binaries: Mapping[Kinds, Mapping[GpuTarget, Binary]]
    writer: Mapping[GpuTarget, Binary]
    texts: dict[str, str]


def _stitched(
    stitches: Iterable[Stitch], launches: Mapping[str, Sequence[Launch]], options: Options
) -> _Stitched:
    """What the launches that the stitches share take, each distinct one once."""
    programs: dict[Kinds, Program] = {}
    texts: dict[str, str] = {}
    for x in stitches:
        names = [member.name for member in x.members]
        groups = {member.name: member.group for member in x.members}
        for number, run in enumerate(runs(names, launches)):
            if len(run.members) == 1:
                continue
            kinds = run.kinds(names), run.kernel
            if kinds not in programs:
                programs[kinds] = emit_stitched([(name, groups[name], run.kernel) for name in kinds[0]])
            texts[f"{x.name}.{number}.triton.py"] = programs[kinds].text
    binaries: dict[Kinds, dict[GpuTarget, Binary]] = {kinds: {} for kinds in programs}
    writers: dict[GpuTarget, Binary] = {}
    workers = options.threads or default_threads()
    for gpu in options.gpus if programs else ():
        jobs = [Job(program.text, program.launches[0], {}) for program in programs.values()]
        writers[gpu], *found = compile_kernels([writer(), *jobs], gpu, options.cache_dir, workers)
        for kinds, binary in zip(programs, found, strict=True):
            binaries[kinds][gpu] = binary
    return _Stitched(binaries, writers, texts)


def _report_of_stitch(
    stitch: Stitch,
    launches: Mapping[str, Sequence[Launch]],
    alone: Mapping[str, Sequence[Binary]],
    stitched: Mapping[Kinds, Mapping[GpuTarget, Binary]],
    target: GpuTarget,
    sizes: Mapping[Symbol, int],
) -> GpuReport:
    """Those of a run: launches that members share, and those that write the table."""
    names = [member.name for member in stitch.members]
    shared = runs(names, launches)
    started: list[Compiled] = []
    for run in shared:
        taking: list[tuple[KernelGroup, Mapping[Symbol, int]]] = []
        rows: list[int] = []
        for member in (stitch.members[place] for place in run.members):
            kernel, extents = member.group.kernels[run.kernel], extents_of(member, sizes)
            if kernel in taken(member.group, extents):
                taking.append((group_of(member.group, kernel), extents))
                rows.append(launches[member.name][run.kernel].rows)
        if len(run.members) > 1:
            binary = stitched[run.kinds(names), run.kernel][target]
        else:
            binary = alone[stitch.members[run.members[0]].variant][run.kernel]
        if taking:
            block = block_of(binary)
            started.append(Compiled(binary, cost_of_stitch(taking, target.machine, block=block, rows=rows)))
    cold = [
        cold_traffic(x.group, launches[x.name], extents_of(x, sizes), target.machine) for x in stitch.members
    ]
    return _report(started, target, cold, writes(shared, names, launches))


def _report(
    kernels: Sequence[Compiled], target: GpuTarget, cold: Sequence[ColdTraffic], writes: int = 0
) -> GpuReport:
    """What a run launches, and moves with `cold` caches; `writes` launches more only write a table."""
    machine = target.machine
    assert machine.gpu is not None
    costs = [(x.binary, x.cost) for x in kernels if x.cost is not None]
    longest, _ = max(costs, key=lambda x: x[1].seconds)
    return GpuReport(
        launches=len(costs) + writes,
        registers=max(binary.registers for binary, _ in costs),
        spills=sum(binary.spills for binary, _ in costs),
        shared_bytes=max(binary.shared_bytes for binary, _ in costs),
        num_warps=longest.threads // target.warp,
        occupancy=occupancy(machine.gpu, block_of(longest)),
        dram_bytes=sum(cost.moved[machine.levels[-1].name] for _, cost in costs),
        cold_bytes=sum(traffic.moved for traffic in cold),
        compulsory_bytes=sum(traffic.compulsory for traffic in cold),
        predicted_us=(sum(cost.seconds for _, cost in costs) + writes * machine.node) * 1e6,
        binary_bytes=sum({binary.path: binary.bytes for binary, _ in costs}.values()),
    )
