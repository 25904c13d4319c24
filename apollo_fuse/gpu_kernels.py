"""The kernels of a model on GPUs: compiled ahead of time, and predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from apollo_fuse.codegen.launches import GpuCode, Variant, gpu_form
from apollo_fuse.codegen.stitched import Kinds, runs, writer, writes
from apollo_fuse.codegen.triton.compile import Binary, Job, compile_kernels
from apollo_fuse.codegen.triton.emit import Launch, Program, emit, emit_stitched
from apollo_fuse.cold import cold_traffic
from apollo_fuse.cost import Cost, cost_of_stitch, taken
from apollo_fuse.cpu import default_threads
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.gpu_tiles import extents_of, group_of, tiled
from apollo_fuse.gpu_trials import best_of, block_of
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
        for (candidate, _), kernels in zip(jobs, best_of(jobs, gpu, sizes, options), strict=True):
            alone[gpu][candidate.variant] = [x.binary for x in kernels]
    launches = {candidate.name: program.launches for candidate, program in jobs}
    variants: dict[str, list[Variant]] = {name: [] for name in launches}
    for candidate, _ in jobs:
        own = extents_of(candidate, sizes)
        extents = tuple(own.get(extent.symbol, 0) for extent in candidate.group.extents)
        binaries = {gpu: alone[gpu][candidate.variant] for gpu in options.gpus}
        variants[candidate.name].append(Variant(extents, binaries))
    nodes = [_Node(candidate.name, candidate.variant, (candidate,)) for candidate, _ in jobs]
    for x in stitches:
        if all(member.name in launches for member in x.members):
            members = tuple(replace(member, group=groups[member.name]) for member in x.members)
            nodes.append(_Node(x.name, x.variant, members))
    stitched = _stitched(nodes, launches, options)
    for node in nodes:
        reports[node.variant] = {
            str(gpu): _report(node, launches, alone[gpu], stitched.binaries, gpu, sizes)
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
class _Node:
    """A kernel as a node of the model, or what several are as one."""

    name: str
    variant: str
    members: tuple[Candidate, ...]

    @property
    def ops(self) -> list[str]:
        return [member.name for member in self.members]


@dataclass(frozen=True, slots=True)
class _Stitched:
    """Kernels that share launches: their binaries, what writes their tables, and texts by file name."""

    binaries: Mapping[Kinds, Mapping[GpuTarget, Binary]]
    writer: Mapping[GpuTarget, Binary]
    texts: dict[str, str]


def _stitched(
    nodes: Iterable[_Node], launches: Mapping[str, Sequence[Launch]], options: Options
) -> _Stitched:
    """What the launches take that kernels of a node share, each distinct one once."""
    programs: dict[Kinds, Program] = {}
    texts: dict[str, str] = {}
    for node in nodes:
        groups = {member.name: member.group for member in node.members}
        for number, run in enumerate(runs(node.ops, launches)):
            if len(run.members) == 1:
                continue
            kinds = run.kinds(node.ops)
            if kinds not in programs:
                kernels, warps = kinds
                programs[kinds] = emit_stitched([(name, groups[name], k) for name, k in kernels], warps)
            texts[f"{node.name}.{number}.triton.py"] = programs[kinds].text
    binaries: dict[Kinds, dict[GpuTarget, Binary]] = {kinds: {} for kinds in programs}
    writers: dict[GpuTarget, Binary] = {}
    workers = options.threads or default_threads()
    for gpu in options.gpus if programs else ():
        jobs = [Job(program.text, program.launches[0], {}) for program in programs.values()]
        writers[gpu], *found = compile_kernels([writer(), *jobs], gpu, options.cache_dir, workers)
        for kinds, binary in zip(programs, found, strict=True):
            binaries[kinds][gpu] = binary
    return _Stitched(binaries, writers, texts)


def _report(
    node: _Node,
    launches: Mapping[str, Sequence[Launch]],
    alone: Mapping[str, Sequence[Binary]],
    stitched: Mapping[Kinds, Mapping[GpuTarget, Binary]],
    target: GpuTarget,
    sizes: Mapping[Symbol, int],
) -> GpuReport:
    """What a run launches, those that write the table included, and moves with cold caches."""
    shared = runs(node.ops, launches)
    costs: list[tuple[Binary, Cost]] = []
    for run in shared:
        taking: list[tuple[KernelGroup, Mapping[Symbol, int]]] = []
        rows: list[int] = []
        for place, number in run.members:
            member = node.members[place]
            kernel, extents = member.group.kernels[number], extents_of(member, sizes)
            if kernel in taken(member.group, extents):
                taking.append((group_of(member.group, kernel), extents))
                rows.append(launches[member.name][number].rows)
        if len(run.members) > 1:
            binary = stitched[run.kinds(node.ops)][target]
        else:
            ((place, number),) = run.members
            binary = alone[node.members[place].variant][number]
        if taking:
            cost = cost_of_stitch(taking, target.machine, block=block_of(binary), rows=rows)
            costs.append((binary, cost))
    cold = [
        cold_traffic(x.group, launches[x.name], extents_of(x, sizes), target.machine) for x in node.members
    ]
    writing = writes(shared, node.ops, launches)
    machine = target.machine
    assert machine.gpu is not None
    longest, _ = max(costs, key=lambda x: x[1].seconds)
    return GpuReport(
        launches=len(costs) + writing,
        registers=max(binary.registers for binary, _ in costs),
        spills=sum(binary.spills for binary, _ in costs),
        shared_bytes=max(binary.shared_bytes for binary, _ in costs),
        num_warps=longest.threads // target.warp,
        occupancy=occupancy(machine.gpu, block_of(longest)),
        dram_bytes=sum(cost.moved[machine.levels[-1].name] for _, cost in costs),
        cold_bytes=sum(traffic.moved for traffic in cold),
        compulsory_bytes=sum(traffic.compulsory for traffic in cold),
        predicted_us=(sum(cost.seconds for _, cost in costs) + writing * machine.node) * 1e6,
        binary_bytes=sum({binary.path: binary.bytes for binary, _ in costs}.values()),
    )
