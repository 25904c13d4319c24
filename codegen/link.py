"""Compiles generated C sources with the C compiler at hand and links them into a custom-op library."""

import hashlib
import importlib.resources
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache as memoised
from pathlib import Path

from apollo_fuse.atomic import write_bytes
from apollo_fuse.errors import CompilerError, NoCompilerError

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
_LINK_FLAGS = ("-shared", "-Wl,--build-id=none", "-Wl,-z,defs")
_LIBRARIES = ("-lm", "-lpthread")

# The x86-64 psABI's levels, in the names that Linux gives the features.
_LEVEL_FEATURES = {
    2: "cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2",
    3: "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave",
    4: "avx512f avx512bw avx512cd avx512dq avx512vl",
}
_COMPILER_LINES_SHOWN = 12
_REGISTERS = (
    b"apollo_fuse: no memory to register its ops"  # a sentence in plugin.c, which every library holds
)


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A C compiler and the processor it compiles for."""

    command: tuple[str, ...]
    """The compiler's command line, without flags."""
    identification: str
    """What the compiler says about its version; part of every cache key."""
    level: int
    """The x86-64 level (1 to 4) that kernels are compiled for; 0 on other processors."""

    @classmethod
    def find(cls, environment: Mapping[str, str]) -> "Toolchain":
        """The compiler that `CC` names, else gcc, clang, cc, or the ziglang package, for this processor.

        Raises NoCompilerError where there is none.
        """
        command = _compiler_command(environment)
        return cls(command, _identify(command), processor_level())

    @property
    def is_zig(self) -> bool:
        """Whether this is the clang in zig, which spells some flags its own way."""
        return re.search(r"\bzig(lang)?\b", " ".join((*self.command, self.identification))) is not None

    @property
    def portable_flags(self) -> tuple[str, ...]:
        """The flags of code that any processor of this architecture must run."""
        # zig's clang adds the undefined-behaviour sanitizer on its own, and debug information with our paths.
        return (*_COMMON_FLAGS, "-fno-sanitize=undefined", "-g0") if self.is_zig else _COMMON_FLAGS

    @property
    def flags(self) -> tuple[str, ...]:
        """The flags of kernels, for this processor."""
        if self.level == 0:
            return self.portable_flags
        base = "x86_64" if self.is_zig else "x86-64"
        march = base if self.level == 1 else f"{base}{'_' if self.is_zig else '-'}v{self.level}"
        wide = ("-mprefer-vector-width=512",) if self.level == 4 else ()
        return (*self.portable_flags, f"-march={march}", *wide)


def compile_objects(
    sources: Sequence[str],
    toolchain: Toolchain,
    cache: Path,
    jobs: int,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """The object file of each source, compiled by up to `jobs` compilers at once or taken from `cache`.

    Equal sources are compiled once. `progress` is told how many of `sources` are done. Raises CompilerError
    with the compiler's first lines.
    """
    places: dict[str, list[int]] = {}
    for index, source in enumerate(sources):
        places.setdefault(source, []).append(index)
    objects: dict[int, Path] = {}
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        running = {
            pool.submit(_compile, source, toolchain, toolchain.flags, cache): source for source in places
        }
        try:
            for future in as_completed(running):
                compiled = future.result()
                objects.update((index, compiled) for index in places[running[future]])
                if progress is not None:
                    progress(len(objects))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [objects[index] for index in range(len(sources))]


def link_library(
    objects: Sequence[Path], table_source: str, output: Path, toolchain: Toolchain, cache: Path
) -> None:
    """Link `objects`, the table of ops and the plugin into a library at `output`, which appears whole.

    Raises CompilerError with the linker's first lines, and OutputError where `output` cannot be written.
    """
    # The plugin runs before it knows the processor, hence the flags that every processor can run.
    own = [
        _compile(source, toolchain, toolchain.portable_flags, cache)
        for source in ((_runtime() / "plugin.c").read_text(), table_source)
    ]
    with tempfile.TemporaryDirectory(dir=_private(cache)) as folder:
        # Fixed names in a folder of its own: the library does not depend on where it was built.
        names = [f"{position}.o" for position in range(len(own) + len(objects))]
        for name, file in zip(names, [*own, *objects], strict=True):
            Path(folder, name).symlink_to(file.absolute())
        _run(toolchain, [*_LINK_FLAGS, *names, "-o", "library.so", *_LIBRARIES], Path(folder))
        write_bytes(output, Path(folder, "library.so").read_bytes())


def remove_library(path: Path) -> None:
    """Remove the library of an earlier run at `path`; any other file there stays."""
    if path.is_file() and _REGISTERS in path.read_bytes():
        path.unlink()


def processor_level() -> int:
    """The x86-64 level of this processor, 1 where its features are not known; 0 on other architectures."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return 0
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


def _compile(source: str, toolchain: Toolchain, flags: Sequence[str], cache: Path) -> Path:
    """The object of `source`, from `cache` or put there; concurrent writers each move a whole file in."""
    key = hashlib.sha256()
    for part in (source, _headers(), toolchain.identification, *toolchain.command, *flags):
        key.update(f"{len(part)}:{part}".encode())
    compiled = _private(cache) / f"{key.hexdigest()}.o"
    if compiled.exists():
        return compiled
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        Path(folder, "source.c").write_text(source)
        arguments = [*flags, f"-I{_runtime()}", "-c", "source.c", "-o", "source.o"]
        _run(toolchain, arguments, Path(folder))
        if not Path(folder, "source.o").exists():
            raise CompilerError(
                f"{shlex.join(toolchain.command)} wrote no object file; set CC to a C compiler, or unset it"
            )
        os.replace(Path(folder, "source.o"), compiled)
    return compiled


def _run(toolchain: Toolchain, arguments: Sequence[str], folder: Path) -> None:
    done = subprocess.run(
        [*toolchain.command, *arguments], cwd=folder, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        shown = "\n".join(lines[:_COMPILER_LINES_SHOWN])
        raise CompilerError(
            f"{shlex.join(toolchain.command)} ended with status {done.returncode}, expected 0; try another "
            f"compiler in CC, and report this with the model:\n{shown}"
        )


def _compiler_command(environment: Mapping[str, str]) -> tuple[str, ...]:
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
        return (sys.executable, "-m", "ziglang", "cc")
    raise NoCompilerError("no C compiler was found; install gcc or run `pip install 'apollo-fuse[cc]'`")


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


def _runtime() -> Path:
    return Path(str(importlib.resources.files("apollo_fuse.runtime")))


@memoised
def _headers() -> str:
    return "".join(header.read_text() for header in sorted(_runtime().glob("*.h")))


def _private(folder: Path) -> Path:
    """`folder`, made for this user alone where it is missing: what lies in it gets executed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
