"""The GPUs that kernels are compiled for, by their architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apollo_fuse.errors import UsageError

if TYPE_CHECKING:
    from apollo_fuse.machine import Machine

CPU = ("auto", "cpu")
"""What a target starts with: `auto` is what the machine has, which is the CPU today."""


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """What Triton calls a target: the architecture is a compute capability of CUDA, or a name of HIP."""

    backend: str
    architecture: str

    def __str__(self) -> str:
        return f"{self.backend}:{self.architecture}"

    @property
    def warp(self) -> int:
        """Threads that run in step."""
        return 64 if self.backend == "hip" else 32

    @property
    def machine(self) -> Machine:
        """A GPU of the architecture, which kernels are predicted for."""
        from apollo_fuse import descriptions  # which knows all of the compiler

        names = {
            "cuda:80": descriptions.a100,
            "cuda:90": descriptions.h100,
            "hip:gfx942": descriptions.mi300x,
        }
        return names[str(self)]()


KNOWN = (GpuTarget("cuda", "80"), GpuTarget("cuda", "90"), GpuTarget("hip", "gfx942"))
"""What can be asked for by name."""


def gpus_of(target: str) -> tuple[GpuTarget, ...]:
    """The GPUs in a target such as `cpu,cuda:90`.  Raises UsageError for one that makes no sense."""
    named = {str(gpu): gpu for gpu in KNOWN}
    first, *others = (part.strip() for part in target.split(","))
    for name in (first, *others):
        if name not in (*CPU, *named):
            raise UsageError(
                f"{name!r} is no target that is known; give {' or '.join(CPU)}, and behind it, with commas, "
                f"any of {', '.join(named)}"
            )
    if first not in CPU:
        raise UsageError(f"the target is {target!r}, and every library runs on the CPU; give cpu,{target}")
    if len(set(others)) < len(others) or set(others) & set(CPU):
        raise UsageError(f"the target is {target!r}; name each thing once")
    return tuple(named[name] for name in others)
