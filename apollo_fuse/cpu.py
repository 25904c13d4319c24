"""The processors that a library is made for: an architecture and, on x86-64, the levels of its psABI."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from apollo_fuse.errors import UsageError

NATIVE = "native"

_X86_64 = "x86-64"
_ARCHITECTURES = {"amd64": _X86_64, "x86_64": _X86_64, "arm64": "aarch64"}  # names that systems give them
# What each level adds to the one below, in the names that Linux gives the features.
_LEVEL_FEATURES = {
    2: "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2",
    3: "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    4: "avx512f avx512bw avx512cd avx512dq avx512vl",
}


@dataclass(frozen=True, slots=True)
class Cpu:
    """What kernels are compiled for: a level (1 to 4) of x86-64, or another architecture with level 0."""

    architecture: str
    level: int = 0

    def __str__(self) -> str:
        return self.architecture if self.level < 2 else f"{self.architecture}-v{self.level}"

    @classmethod
    def native(cls) -> "Cpu":
        """This machine, with the highest level that its processor and its system have."""
        machine = platform.machine().lower()
        architecture = _ARCHITECTURES.get(machine, machine)
        return cls(architecture, _x86_level()) if architecture == _X86_64 else cls(architecture)

    @property
    def baseline(self) -> "Cpu":
        """What every processor of the architecture can run."""
        return Cpu(self.architecture, min(self.level, 1))

    def runs(self, other: "Cpu") -> bool:
        """Whether code for `other` runs on a processor like this."""
        return self.architecture == other.architecture and self.level >= other.level


KNOWN = (*(Cpu(_X86_64, level) for level in range(1, 5)), Cpu("aarch64"))
"""What can be asked for by name."""


@dataclass(frozen=True, slots=True)
class CpuTargets:
    """The processors that one library is made for: levels of one architecture, the lowest first."""

    cpus: tuple[Cpu, ...]

    def __post_init__(self) -> None:
        architectures = list(dict.fromkeys(cpu.architecture for cpu in self.cpus))
        if len(architectures) > 1:
            raise UsageError(
                f"{' and '.join(architectures)} are different architectures, and a library holds code "
                "for one; run apollo-fuse once for each"
            )
        levels = [cpu.level for cpu in self.cpus]
        if not levels or levels != sorted(set(levels)):
            raise UsageError(
                f"the CPUs are {list(map(str, self.cpus))}; give one or more, each once, the lowest first"
            )

    def __str__(self) -> str:
        return ", ".join(map(str, self.cpus))

    @classmethod
    def native(cls) -> "CpuTargets":
        """The machine's own processor alone."""
        return cls((Cpu.native(),))

    @classmethod
    def parse(cls, text: str) -> "CpuTargets":
        """Read `native` or names separated by commas, in any order: `x86-64-v2,x86-64-v4`.

        Raises UsageError for a name that is not known, and for CPUs that have no library in common.
        """
        named = {str(cpu): cpu for cpu in KNOWN}
        found: set[Cpu] = set()
        for name in (part.strip() for part in text.split(",")):
            if name != NATIVE and name not in named:
                raise UsageError(
                    f"{name!r} is no CPU that is known; give {NATIVE} or a list of {', '.join(named)}"
                )
            found.add(Cpu.native() if name == NATIVE else named[name])
        return cls(tuple(sorted(found, key=lambda cpu: (cpu.architecture, cpu.level))))

    def tried_on(self, machine: Cpu) -> Cpu:
        """Whose code is verified and measured: the best that `machine` runs, or its own if it runs none."""
        runnable = [cpu for cpu in self.cpus if machine.runs(cpu)]
        return runnable[-1] if runnable else machine


def _x86_level() -> int:
    """The level of this processor, 1 where its features are not known."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    features = set(found[1].split()) if found else set()
    level = 1
    for candidate, required in _LEVEL_FEATURES.items():
        if not features.issuperset(required.split()):
            break
        level = candidate
    return level


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def default_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))
