"""The GPUs that kernels are compiled for, by their architectures."""

from __future__ import annotations

from dataclasses import dataclass

from apollo_fuse.descriptions import a100, h100, mi300x
from apollo_fuse.machine import Machine


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """What Triton calls a target: the architecture is a compute capability of CUDA or a name of HIP."""

    backend: str
    architecture: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.architecture}"

    @property
    def warp(self) -> int:
        """Threads that run in step."""
        gpu = self.machine.gpu
        assert gpu is not None, f"{self} is described as a GPU"
        return gpu.warp

    @property
    def machine(self) -> Machine:
        """A GPU of the architecture, which kernels are predicted for."""
        return _MACHINES[self]()


_MACHINES = {
    GpuTarget("cuda", "80"): a100,
    GpuTarget("cuda", "90"): h100,
    GpuTarget("hip", "gfx942"): mi300x,
}
KNOWN = tuple(_MACHINES)
"""What can be asked for by name."""
