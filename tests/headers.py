"""Compiles functions of the runtime's headers into a library, for ctypes."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import apollo_fuse.runtime
from apollo_fuse.codegen.toolchain import Toolchain

HEADERS = Path(apollo_fuse.runtime.__file__).parent
TOOLCHAIN = Toolchain.find({"PATH": "/usr/bin:/bin"})
LEVELS = sorted({min(2, TOOLCHAIN.cpu.level), TOOLCHAIN.cpu.level})


def compile_library(
    source: str, folder: Path, name: str, level: int, *extra: str
) -> subprocess.CompletedProcess[str]:
    """Writes `name`.so into the folder; warnings are errors."""
    (folder / f"{name}.c").write_text(source)
    toolchain = replace(TOOLCHAIN, cpu=replace(TOOLCHAIN.cpu, level=level))
    warnings = ("-Wall", "-Wextra", "-Werror")
    arguments = [*toolchain.flags, "-fvisibility=default", *warnings, f"-I{HEADERS}", *extra]
    command = [*toolchain.command, *arguments, "-shared", f"{name}.c", "-o", f"{name}.so", "-lm"]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
