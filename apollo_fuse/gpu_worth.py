"""Whether kernels pay on GPUs, by prediction: beside the CPU, what decides where nothing is measured.

A kernel has to win on each GPU that the library is made for. onnxruntime's operators are taken to do nothing
there but move their tensors, in a launch each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apollo_fuse.cost import cost_of, cost_of_stitch
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.machine import Machine
from apollo_fuse.unfused import VIEWS, Ran, moving_seconds

Sized = tuple[KernelGroup, Mapping[Symbol, int]]
"""A group with the extents of a run."""


def pays_on(gpus: Sequence[GpuTarget], operators: Sequence[Ran], kernel: Sized) -> bool:
    """Whether the kernel is faster than the operators on all the GPUs; not where there are none."""
    return bool(gpus) and all(
        cost_of(*kernel, gpu.machine).seconds < launched_alone(operators, gpu.machine) for gpu in gpus
    )


def pay_together_on(gpus: Sequence[GpuTarget], kernels: Sequence[Sized]) -> bool:
    """Whether kernels are faster in shared launches, with one that writes their table, than each alone."""

    def gains(machine: Machine) -> bool:
        together = machine.node + cost_of_stitch(kernels, machine).seconds
        return together < sum(cost_of(group, extents, machine).seconds for group, extents in kernels)

    return bool(gpus) and all(gains(gpu.machine) for gpu in gpus)


def launched_alone(operators: Sequence[Ran], machine: Machine) -> float:
    """Seconds of the operators one after the other."""
    moving = (node for node in operators if node.op_type not in VIEWS)
    return sum(machine.node + moving_seconds(node, machine) for node in moving)
