"""Finds a C compiler for a processor, and knows the flags that it takes."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from apollo_fuse.cpu import Cpu
from apollo_fuse.errors import CompilerError, NoCompilerError
from apollo_fuse.options import Options

# No -ffast-math: NaN, infinities and signed zeros keep their meaning, and so does the order of additions.
# Only what no kernel can observe (errno, floating-point traps) is given up.
_COMMON_FLAGS = (
    "-std=c11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fwrapv",
    "-ffp-contract=off",
)
# gcc's jump threading splits lanes by the branches of a clamp, and computes what follows it once for each.
# Two steps along a row that it jams into one read lines out of order, which prefetchers follow badly.
_GCC_FLAGS = ("-fno-thread-jumps", "-fno-loop-unroll-and-jam")
# zig's clang adds the undefined-behaviour sanitizer on its own, and debug information with our paths.
_ZIG_FLAGS = ("-fno-sanitize=undefined", "-g0")
_ZIG = (sys.executable, "-m", "ziglang", "cc")
_GLIBC = "2.28"  # the oldest that onnxruntime's own wheels run with


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A C compiler and the processor it compiles for."""

    command: tuple[str, ...]
    """The compiler's command line, without flags."""
    identification: str
    """What the compiler says about its version; part of every cache key."""
    cpu: Cpu
    """What kernels are compiled for."""

    @classmethod
    def find(cls, environment: Mapping[str, str], cpu: Cpu | None = None) -> "Toolchain":
        """A compiler for `cpu`, or for this machine where none is given.

        For this machine's architecture it is what `CC` names, else gcc, clang, cc, or the ziglang package,
        for another one ziglang. Raises NoCompilerError where there is none.
        """
        machine = Cpu.native()
        cpu = cpu or machine
        foreign = cpu.architecture != machine.architecture
        command = _cross_command(cpu) if foreign else _native_command(environment)
        return cls(command, _identify(command), cpu)

    @property
    def is_zig(self) -> bool:
        """Whether this is the clang in zig, which spells some flags its own way."""
        return re.search(r"\bzig(lang)?\b", " ".join((*self.command, self.identification))) is not None

    @property
    def is_gcc(self) -> bool:
        """Whether this is gcc, by the notice that stands below its version."""
        return "Free Software Foundation" in self.identification

    @property
    def portable_flags(self) -> tuple[str, ...]:
        """The flags of code that any processor of this architecture must run."""
        return replace(self, cpu=self.cpu.baseline).flags

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of kernels."""
        own = _ZIG_FLAGS if self.is_zig else _GCC_FLAGS if self.is_gcc else ()
        return (*_COMMON_FLAGS, *own, f"-DAF_LEVEL={self.cpu.level}", *self._processor_flags)

    @property
    def _processor_flags(self) -> tuple[str, ...]:
        """Always stated: compilers can be built with a higher default, and zig's is the machine at hand."""
        if self.cpu.level == 0:
            return ("-mcpu=baseline",) if self.is_zig else ()
        name = str(self.cpu).replace("-", "_") if self.is_zig else str(self.cpu)
        wide = ("-mprefer-vector-width=512",) if self.cpu.level == 4 else ()
        return (f"-march={name}", *wide)


def toolchains_for(options: Options) -> dict[Cpu, Toolchain]:
    """The compilers for the processor that kernels are tried on, and for all targets."""
    environment = {**os.environ, "CC": options.compiler or ""}
    tried = options.cpu.tried_on(Cpu.native())
    return {cpu: Toolchain.find(environment, cpu) for cpu in dict.fromkeys((tried, *options.cpu.cpus))}


def _native_command(environment: Mapping[str, str]) -> tuple[str, ...]:
    path = environment.get("PATH")
    if chosen := shlex.split(environment.get("CC", "")):
        if (program := shutil.which(chosen[0], path=path)) is None:
            raise NoCompilerError(
                f"CC is {chosen[0]!r}, which is no program on PATH; set it to one, or unset it"
            )
        return (os.path.abspath(program), *chosen[1:])
    for name in ("gcc", "clang", "cc"):
        if (program := shutil.which(name, path=path)) is not None:
            return (os.path.abspath(program),)
    if importlib.util.find_spec("ziglang") is not None:
        return _ZIG
    raise NoCompilerError("no C compiler was found; install gcc or run `pip install 'apollo-fuse[cc]'`")


def _cross_command(cpu: Cpu) -> tuple[str, ...]:
    if importlib.util.find_spec("ziglang") is None:
        raise NoCompilerError(
            f"code for {cpu} is cross-compiled with the ziglang package, which is missing; "
            "run `pip install 'apollo-fuse[cc]'`"
        )
    return (*_ZIG, "-target", f"{cpu.architecture.replace('-', '_')}-linux-gnu.{_GLIBC}")


def _identify(command: Sequence[str]) -> str:
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CompilerError(
            f"{shlex.join(command)} cannot be run: {error}; set CC to a C compiler"
        ) from error
    if done.returncode != 0:
        raise CompilerError(f"{shlex.join(command)} --version failed; set CC to a C compiler")
    return done.stdout
