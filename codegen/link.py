"""Compiles generated C sources with the C compiler at hand and links them into a custom-op library."""

import hashlib
import importlib.resources
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache as memoised
from pathlib import Path

from apollo_fuse.atomic import write_bytes, write_text
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cpu import default_threads
from apollo_fuse.errors import CompilerError

_LINK_FLAGS = ("-shared", "-Wl,--build-id=none", "-Wl,-z,defs")
_PLUGIN, _GPU_PLUGIN = ("plugin.c", "compute.c"), ("gpu.c", "launches.c", "modules.c", "driver.c")
_LIBRARIES = ("-lm",)  # the few functions of POSIX threads that the plugin calls are in every glibc's libc
_COMPILER_LINES_SHOWN = 12
LARGE_FRAME = 16 * 1024
"""Bytes of a function's stack frame from which the compiler is asked to name them."""
_FRAME = re.compile(r"frame size (?:of |\()(\d+)")  # in the words of gcc and of clang
_REGISTERS = (
    b"apollo_fuse: no memory to register its ops"  # a sentence in plugin.c, which every library holds
)


@dataclass(frozen=True, slots=True)
class Build:
    """Kernels compiled for one processor: the object file of each, by name."""

    toolchain: Toolchain
    objects: Mapping[str, Path]


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


def large_frame(compiled: Path) -> int:
    """Bytes of the largest stack frame in an object of `compile_objects`; 0 where none is large.

    A frame holds the arrays of a kernel and what the compiler has no register for.
    """
    try:
        return int(_frame_file(compiled).read_text())
    except FileNotFoundError:
        return 0


def link_library(
    objects: Sequence[Path],
    table_source: str,
    output: Path,
    toolchain: Toolchain,
    cache: Path,
    gpu_sources: Sequence[str] = (),
) -> None:
    """Link `objects`, the table of ops and the plugin into a library at `output`, which appears whole.

    gpu_sources: kernels for GPUs and their table, if any; with them comes what launches kernels there.
    Raises CompilerError with the linker's first lines, and OutputError where `output` cannot be written.
    """
    # The plugin runs before it knows the processor, hence the flags that every processor can run; and what
    # a linker adds of its own follows them.
    flags: Sequence[str] = toolchain.portable_flags
    plugin, libraries = list(_PLUGIN), list(_LIBRARIES)
    if gpu_sources:
        flags = (*flags, "-DAF_GPU")
        plugin += _GPU_PLUGIN
        libraries.append("-ldl")
    texts = ((_runtime() / name).read_text() for name in plugin)
    with ThreadPoolExecutor(default_threads()) as pool:
        sources = (*texts, table_source, *gpu_sources)
        own = list(pool.map(lambda source: _compile(source, toolchain, flags, cache), sources))
    with tempfile.TemporaryDirectory(dir=_private(cache)) as folder:
        # Fixed names in a folder of its own: the library does not depend on where it was built.
        places = [f"{position}.o" for position in range(len(own) + len(objects))]
        for place, file in zip(places, [*own, *objects], strict=True):
            Path(folder, place).symlink_to(file.absolute())
        _run(toolchain, [*flags, *_LINK_FLAGS, *places, "-o", "library.so", *libraries], Path(folder))
        write_bytes(output, Path(folder, "library.so").read_bytes())


def remove_library(path: Path) -> None:
    """Remove the library of an earlier run at `path`; any other file there stays."""
    if path.is_file() and _REGISTERS in path.read_bytes():
        path.unlink()


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
        warn = f"-Wframe-larger-than={LARGE_FRAME}"
        arguments = [*flags, warn, f"-I{_runtime()}", "-c", "source.c", "-o", "source.o"]
        said = _run(toolchain, arguments, Path(folder))
        if not Path(folder, "source.o").exists():
            raise CompilerError(
                f"{shlex.join(toolchain.command)} wrote no object file; set CC to a C compiler, or unset it"
            )
        if frames := [int(found) for found in _FRAME.findall(said)]:
            write_text(
                _frame_file(compiled), str(max(frames))
            )  # first: an object is complete once it is there
        os.replace(Path(folder, "source.o"), compiled)
    return compiled


def _frame_file(compiled: Path) -> Path:
    return compiled.with_suffix(".frame")


def _run(toolchain: Toolchain, arguments: Sequence[str], folder: Path) -> str:
    """Runs the compiler in `folder`; gives what it says on stderr."""
    done = subprocess.run(
        [*toolchain.command, *arguments], cwd=folder, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        shown = "\n".join(lines[:_COMPILER_LINES_SHOWN])
        raise CompilerError(
            f"{shlex.join(toolchain.command)} ended with status {done.returncode}, expected 0; report "
            f"this with the model, and for code for this machine try another compiler in CC:\n{shown}"
        )
    return done.stderr


def _runtime() -> Path:
    return Path(str(importlib.resources.files("apollo_fuse.runtime")))


@memoised
def _headers() -> str:
    return "".join(header.read_text() for header in sorted(_runtime().glob("*.h")))


def _private(folder: Path) -> Path:
    """`folder`, made for this user alone where it is missing: what lies in it gets executed."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
