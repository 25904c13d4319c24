"""What the kernels of a model would be on a GPU: compiled ahead of time, and predicted; nothing of it runs.

Each kernel is compiled with several numbers of warps, and the cost model, which knows from the compiled ones
what stays in flight, takes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from apollo_fuse.codegen.triton.compile import Binary, Job, compile_kernels
from apollo_fuse.codegen.triton.emit import Launch, emit
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
class _Compiled:
    """A kernel with a number of warps, and what it takes."""

    binary: Binary
    cost: Cost


def on_gpus(
    candidates: Iterable[Candidate],
    sizes: Mapping[Symbol, int],
    options: Options,
    warn: Callable[[str], None],
) -> dict[str, dict[str, GpuReport]]:
    """What each variant of a kernel would be on the GPUs of the target, by their names.

    `sizes` are the extents of the run that is predicted.
    """
    distinct: dict[str, Candidate] = {}
    for candidate in candidates:
        distinct.setdefault(candidate.variant, candidate)
    found: dict[str, dict[str, GpuReport]] = {variant: {} for variant in distinct}
    for gpu in options.gpus:
        told = _on_gpu(list(distinct.values()), gpu, sizes, options)
        for (variant, candidate), what in zip(distinct.items(), told, strict=True):
            if isinstance(what, Refused):
                warn(f"kernel {candidate.name} has no form for {gpu}: {what.reason}: {what.evidence}")
            else:
                found[variant][str(gpu)] = what
    return found


def _on_gpu(
    candidates: Sequence[Candidate], target: GpuTarget, sizes: Mapping[Symbol, int], options: Options
) -> list[GpuReport | Refused]:
    """For each candidate its kernels on the GPU, or why it has none."""
    programs = [emit(x.group, x.name, x.name) for x in candidates]
    jobs: list[Job] = []
    for candidate, program in zip(candidates, programs, strict=True):
        if not isinstance(program, Refused):
            types = _types(candidate.group)
            launches = (launch for each in program.launches for launch in _variants(each, target))
            jobs += [Job(program.text, launch, types) for launch in launches]
    workers = options.threads or default_threads()
    binaries = iter(compile_kernels(jobs, target, options.cache_dir, workers))
    found: list[GpuReport | Refused] = []
    for candidate, program in zip(candidates, programs, strict=True):
        if isinstance(program, Refused):
            found.append(program)
            continue
        variants = {
            launch.kernel: [next(binaries) for _ in _variants(launch, target)] for launch in program.launches
        }
        found.append(_report(candidate, variants, target, sizes))
    return found


def _variants(launch: Launch, target: GpuTarget) -> list[Launch]:
    most = _MOST_THREADS // target.warp
    warps = dict.fromkeys(max(1, min(most, int(launch.warps * factor))) for factor in _FACTORS)
    return [replace(launch, warps=number) for number in warps]


def _types(group: KernelGroup) -> dict[str, DType]:
    return {v.name: v.dtype for v in (*group.inputs, *group.outputs, *group.temporaries)}


def _report(
    candidate: Candidate,
    variants: Mapping[str, Sequence[Binary]],
    target: GpuTarget,
    sizes: Mapping[Symbol, int],
) -> GpuReport:
    machine, group = target.machine, candidate.group
    assert machine.gpu is not None
    shapes = [[evaluate(extent, sizes) for extent in value.shape] for value in candidate.micro_graph.inputs]
    own = bound(group, shapes, {})
    chosen: list[_Compiled] = []
    for kernel in taken(group, own):
        alone = replace(group, kernels=(replace(kernel, form=0),), forms=())
        tried = [_Compiled(b, cost_of(alone, own, machine, block=_block(b))) for b in variants[kernel.name]]
        chosen.append(min(tried, key=lambda x: (x.binary.spills, x.cost.seconds)))
    longest = max(chosen, key=lambda x: x.cost.seconds)
    return GpuReport(
        launches=len(chosen),
        registers=max(x.binary.registers for x in chosen),
        spills=sum(x.binary.spills for x in chosen),
        shared_bytes=max(x.binary.shared_bytes for x in chosen),
        num_warps=longest.binary.threads // target.warp,
        occupancy=occupancy(machine.gpu, _block(longest.binary)),
        dram_bytes=sum(x.cost.moved[machine.levels[-1].name] for x in chosen),
        compulsory_bytes=sum(x.cost.compulsory for x in chosen),
        predicted_us=sum(x.cost.seconds for x in chosen) * 1e6,
        binary_bytes=sum(x.binary.bytes for x in chosen),
    )


def _block(binary: Binary) -> Block:
    return Block(binary.threads, binary.registers, binary.shared_bytes, binary.items)
