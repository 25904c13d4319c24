"""What a program on a GPU computes of a kernel: an item as the CPU has it, or some turns of a loop in one.

The cost model decides, by the sizes that a model runs with, and for all GPUs of a library together, since the
library computes one number of programs for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from apollo_fuse.codegen.triton.emit import emit
from apollo_fuse.codegen.triton.spread import spreads
from apollo_fuse.cost import bound, cost_of, taken
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.graph import Refused
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import Kernel, KernelGroup
from apollo_fuse.occupancy import Block
from apollo_fuse.summary import evaluate

_WORTH = 1.2
"""How many times as fast other programs have to be predicted."""


def tiled(
    candidates: Iterable[Candidate], sizes: Mapping[Symbol, int], gpus: Sequence[GpuTarget]
) -> dict[str, KernelGroup]:
    """The groups of the candidates for these GPUs, by name. Those of one name run with several extents."""
    groups: dict[str, KernelGroup] = {}
    runs: dict[str, list[Mapping[Symbol, int]]] = {}
    for x in candidates:
        groups[x.name] = x.group
        runs.setdefault(x.name, []).append(extents_of(x, sizes))
    return {
        name: replace(
            group, kernels=tuple(_best(group, kernel, runs[name], gpus) for kernel in group.kernels)
        )
        for name, group in groups.items()
    }


def _best(
    group: KernelGroup, kernel: Kernel, runs: Iterable[Mapping[Symbol, int]], gpus: Sequence[GpuTarget]
) -> Kernel:
    taking = [extents for extents in runs if kernel in taken(group, extents)]
    others = {spread: _seconds(group, spread, taking, gpus) for spread in spreads(kernel)} if taking else {}
    if not others:
        return kernel
    best = min(others, key=lambda spread: others[spread])
    return best if others[best] * _WORTH < _seconds(group, kernel, taking, gpus) else kernel


def _seconds(
    group: KernelGroup, kernel: Kernel, runs: Iterable[Mapping[Symbol, int]], gpus: Iterable[GpuTarget]
) -> float:
    """What the kernel is predicted to take in all the runs on all the GPUs, before it is compiled.

    Scratch of a program would grow with their number, so that no kernel is spread that needs some.
    """
    alone = group_of(group, kernel)
    program = emit(alone, kernel.name, kernel.name)
    if isinstance(program, Refused) or program.launches[0].scratch:
        return float("inf")
    launch = program.launches[0]
    return sum(
        cost_of(alone, x, gpu.machine, block=Block(launch.warps * gpu.warp, items=launch.rows)).seconds
        for x in runs
        for gpu in gpus
    )


def extents_of(candidate: Candidate, sizes: Mapping[Symbol, int]) -> dict[Symbol, int]:
    """The extents of the candidate's kernels in a run with these sizes."""
    shapes = [[evaluate(extent, sizes) for extent in value.shape] for value in candidate.micro_graph.inputs]
    return bound(candidate.group, shapes, {})


def group_of(group: KernelGroup, kernel: Kernel) -> KernelGroup:
    """A group that always runs the one kernel."""
    return replace(group, kernels=(replace(kernel, form=0),), forms=())
