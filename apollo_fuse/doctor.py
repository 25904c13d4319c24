"""What the machine has of what apollo-fuse needs, and what is missing for which target: `--doctor`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnxruntime as ort

from apollo_fuse.codegen.toolchain import Toolchain, toolchains_for
from apollo_fuse.codegen.triton.compile import require_triton
from apollo_fuse.cpu import KNOWN as CPUS
from apollo_fuse.cpu import Cpu, cpu_name, default_threads
from apollo_fuse.errors import CompilerError
from apollo_fuse.gpu import KNOWN as GPUS
from apollo_fuse.options import Options
from apollo_fuse.versions import versions

_ON_GPU = "compiles kernels into libraries; no GPU has run one yet"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was looked for: what was found, and what to do where it is missing."""

    what: str
    found: str
    missing: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the machine has, and for each target whether it can be made; the first is the machine's CPU."""

    machine: tuple[Finding, ...]
    targets: tuple[Finding, ...]

    @property
    def is_ready(self) -> bool:
        """Whether a library for this machine's processor can be made."""
        return not self.targets[0].missing and not any(x.missing for x in self.machine if x.what == "cache")


def examine(options: Options) -> Diagnosis:
    """Looks at the machine; nothing is written or compiled."""
    machine = (
        Finding("processor", f"{cpu_name()}, {Cpu.native()}, {default_threads()} threads"),
        Finding("onnxruntime", f"{ort.__version__} with {', '.join(ort.get_available_providers())}"),
        *(_driver(driver) for driver in _DRIVERS),
        _cache(options),
        *(Finding(name, text) for name, text in versions().items() if name != "onnxruntime"),
    )
    return Diagnosis(machine, (_cpu(options), *_other_cpus(options), *_gpus()))


def _cpu(options: Options) -> Finding:
    """The target that every library is made for, unless others are named."""
    try:
        toolchain = toolchains_for(options)[Cpu.native()]
    except CompilerError as error:
        return Finding("cpu", "", str(error))
    return Finding("cpu", f"{Cpu.native()} with {_compiler(toolchain)}")


def _other_cpus(options: Options) -> Iterator[Finding]:
    for cpu in CPUS:
        if cpu == Cpu.native():
            continue
        try:
            toolchain = Toolchain.find({**os.environ, "CC": options.compiler or ""}, cpu)
            yield Finding(f"cpu, --cpu {cpu}", f"with {_compiler(toolchain)}")
        except CompilerError as error:
            yield Finding(f"cpu, --cpu {cpu}", "", str(error))


def _gpus() -> Iterator[Finding]:
    for gpu in GPUS:
        try:
            require_triton()
            yield Finding(f"cpu,{gpu}", _ON_GPU)
        except CompilerError as error:
            yield Finding(f"cpu,{gpu}", "", str(error))


def _compiler(toolchain: Toolchain) -> str:
    return f"{' '.join(toolchain.command)} ({toolchain.identification.strip().splitlines()[0]})"


def _cache(options: Options) -> Finding:
    """The folder of compiled kernels, or the one that it will be made in."""
    place = options.cache_dir
    existing = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding("cache", str(place), f"{existing} cannot be written; name another with --cache-dir")
    return Finding("cache", str(place))


@dataclass(frozen=True, slots=True)
class _Driver:
    """A GPU's driver: its library by the names it may have, and what starts it and counts its devices."""

    name: str
    libraries: tuple[str, ...]
    start: str
    count: str


_DRIVERS = (
    _Driver("CUDA driver", ("libcuda.so.1",), "cuInit", "cuDeviceGetCount"),
    _Driver(
        "HIP driver",
        ("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"),
        "hipInit",
        "hipGetDeviceCount",
    ),
)


def _driver(driver: _Driver) -> Finding:
    for name in driver.libraries:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        devices = ctypes.c_int(0)
        status = getattr(library, driver.start)(0) or getattr(library, driver.count)(ctypes.byref(devices))
        if status:
            return Finding(driver.name, f"{name} is there, and ends with status {status}")
        return Finding(driver.name, f"{name}, {devices.value} device{'' if devices.value == 1 else 's'}")
    return Finding(driver.name, f"none: {driver.libraries[-1]} is not there")


def lines(diagnosis: Diagnosis) -> Sequence[str]:
    """As text: the machine, then the targets."""
    width = max(len(x.what) for x in (*diagnosis.machine, *diagnosis.targets)) + 2
    written = [f"{x.what:{width}}{x.missing or x.found}" for x in diagnosis.machine]
    written += ["", "--target"]
    written += [
        f"{x.what:{width}}{f'missing: {x.missing}' if x.missing else f'ready: {x.found}'}"
        for x in diagnosis.targets
    ]
    return written
