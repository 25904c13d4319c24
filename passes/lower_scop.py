"""From a Scop to its kernels: loop fusion, memory stitching and mapping, with what each sends back.

What overflows on-chip memory is computed again instead where that is cheap, and the Scop is scheduled anew.
Where run-time extents decide what fits, or whether rows are few and long, the kernels come in two forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from apollo_fuse.graph import Refused, Value
from apollo_fuse.kernel import AtMost, Kernel, KernelGroup, work
from apollo_fuse.passes.cascade_sums import cascade_sums
from apollo_fuse.passes.fission_lanes import fission_lanes
from apollo_fuse.passes.loop_fusion import Fused
from apollo_fuse.passes.memory_stitching import Overflow, shared_tensors
from apollo_fuse.passes.recompute import recompute
from apollo_fuse.passes.split_reductions import FEW, LONG, split_reductions
from apollo_fuse.passes.tile_and_map import TileAndMap
from apollo_fuse.scop import Scop


@dataclass(frozen=True, slots=True)
class Lowered:
    fused: Fused
    group: KernelGroup


@dataclass(frozen=True, slots=True)
class LowerScop:
    loop_fusion: Callable[[Scop], Fused | Refused]
    tile_and_map: TileAndMap

    def __call__(self, scop: Scop) -> Lowered | Refused:
        lowered = self._formed(scop)
        if isinstance(lowered, Refused):
            return lowered
        kernels = tuple(fission_lanes(cascade_sums(kernel)) for kernel in lowered.group.kernels)
        return replace(lowered, group=replace(lowered.group, kernels=kernels))

    def _formed(self, scop: Scop) -> Lowered | Refused:
        """The kernels, in two forms where run-time extents choose between them."""
        plain = self._lower(scop)
        if isinstance(plain, Refused):
            return plain
        group = plain.group
        kernels = [k for k in group.kernels if _may_split(k)]
        if not kernels:
            unbounded = self._unbounded(group)
            streamed = self._streamed(plain) if unbounded is not None else None
            if unbounded is None or streamed is None:
                return plain
            return replace(plain, group=_either(unbounded, group, streamed.group))
        split = _split((self._streamed(plain) or plain).group)
        items, cost = kernels[0].items, work(kernels[0].body)
        if items.constant is None:
            return replace(plain, group=_either(AtMost(items, FEW), split, group))
        if cost.constant is None:
            short = self._unbounded(group) or AtMost(cost, LONG)
            return replace(plain, group=_either(short, group, split))
        return replace(plain, group=split)

    def _lower(self, scop: Scop) -> Lowered | Refused:
        """Demotes one tensor after the other, the largest first, until the others fit."""
        while True:
            fused = self.loop_fusion(scop)
            if isinstance(fused, Refused):
                return fused
            group = self.tile_and_map(fused)
            if isinstance(group, KernelGroup):
                return Lowered(fused, group)
            if isinstance(group, Refused):
                return group
            demoted = _first_demoted(scop, group)
            if demoted is None:
                return group.refused
            scop = demoted

    def _unbounded(self, group: KernelGroup) -> AtMost | None:
        """When the SHARED memory of a work item fits, where its size is known at run time only."""
        budget = self.tile_and_map.memory_stitching.shared_bytes
        sizes = (kernel.shared_bytes for kernel in group.kernels)
        return next((AtMost(size, budget) for size in sizes if size.constant is None), None)

    def _streamed(self, plain: Lowered) -> Lowered | None:
        """The same without SHARED memory for whole rows, if there is such a form."""
        scop = plain.fused.scop
        reduced = {s.target.name for s in scop.statements if s.reduction is not None}
        shared = {name for kernel in plain.group.kernels for name in shared_tensors(kernel)} - reduced
        without = recompute(scop, shared)
        if not shared or without is None:
            return None
        streamed = self._lower(without)
        return None if isinstance(streamed, Refused) else streamed


def _first_demoted(scop: Scop, overflow: Overflow) -> Scop | None:
    demoted = (recompute(scop, (tensor,)) for tensor in overflow.tensors)
    return next((found for found in demoted if found is not None), None)


def _may_split(kernel: Kernel) -> bool:
    """Whether the kernel has few work items, each long, for some extents at least; known are one of both."""
    items, cost = kernel.items.constant, work(kernel.body).constant
    if items is None and cost is None:
        return False
    return (items is None or items <= FEW) and (cost is None or cost >= LONG)


def _split(group: KernelGroup) -> KernelGroup:
    kernels: list[Kernel] = []
    temporaries: list[Value] = []
    for kernel in group.kernels:
        split = split_reductions(kernel) if _may_split(kernel) else None
        kernels += [kernel] if split is None else split.kernels
        temporaries += [] if split is None else split.temporaries
    return replace(group, kernels=tuple(kernels), temporaries=(*group.temporaries, *temporaries))


def _either(condition: AtMost, form: KernelGroup, other: KernelGroup) -> KernelGroup:
    """One group that runs as `form` where the condition holds, and as `other` elsewhere."""
    if form.kernels == other.kernels:
        return form
    kernels = (*form.kernels, *(replace(k, name=f"{k.name}b", form=1) for k in other.kernels))
    temporaries = tuple(dict.fromkeys((*form.temporaries, *other.temporaries)))
    return replace(form, kernels=kernels, temporaries=temporaries, forms=(condition,))
