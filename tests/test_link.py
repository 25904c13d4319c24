"""Finding a compiler, compiling through the cache, and linking."""

import ctypes
import stat
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from apollo_fuse.codegen import link, table
from apollo_fuse.codegen import toolchain as tools
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cpu import KNOWN, Cpu
from apollo_fuse.errors import CompilerError, NoCompilerError, OutputError
from tests import elf

SYSTEM = {"PATH": "/usr/bin:/bin"}
SOURCES = [
    f'#include "kernel.h"\n#include "vmath.h"\nint af_number_{i}(void) {{ return {i}; }}\n' for i in range(4)
]
TABLE = table.tables([], [0])


def counting_compiler(folder: Path) -> tuple[Toolchain, Path]:
    """A compiler that also writes a line to a log whenever it runs."""
    real = Toolchain.find(SYSTEM).command[0]
    log, script = folder / "calls", folder / "counting-cc"
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {real} "$@"\n')
    script.chmod(0o755)
    toolchain = Toolchain.find({**SYSTEM, "CC": str(script)})
    log.write_text("")
    return toolchain, log


def calls(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_equal_sources_compile_once_and_then_come_from_the_cache(tmp_path: Path) -> None:
    toolchain, log = counting_compiler(tmp_path)
    done: list[int] = []
    objects = link.compile_objects([*SOURCES, SOURCES[0]], toolchain, tmp_path / "cache", 2, done.append)
    assert calls(log) == len(SOURCES)
    assert objects[0] == objects[-1] and len(set(objects)) == len(SOURCES)
    assert done == sorted(done) and done[-1] == len(objects)
    assert link.compile_objects(SOURCES, toolchain, tmp_path / "cache", 2) == objects[:-1]
    assert calls(log) == len(SOURCES)


def test_another_level_or_compiler_is_another_object(tmp_path: Path) -> None:
    toolchain = Toolchain.find(SYSTEM)
    others = [toolchain, replace(toolchain, identification="another")]
    if toolchain.cpu.level > 1:
        others.append(replace(toolchain, cpu=replace(toolchain.cpu, level=toolchain.cpu.level - 1)))
    compiled = [link.compile_objects(SOURCES[:1], other, tmp_path, 1)[0] for other in others]
    assert len(set(compiled)) == len(others)


def test_the_cache_is_private_and_holds_nothing_but_objects(tmp_path: Path) -> None:
    cache = tmp_path / "a" / "cache"
    objects = link.compile_objects(SOURCES, Toolchain.find(SYSTEM), cache, 2)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(cache.iterdir()) == sorted(objects)


def test_a_compile_error_shows_the_compilers_first_lines(tmp_path: Path) -> None:
    broken = "int af_broken(void) { return undeclared_name; }\n"
    with pytest.raises(CompilerError, match="undeclared_name"):
        link.compile_objects([broken, *SOURCES], Toolchain.find(SYSTEM), tmp_path, 2)
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]


def test_no_compiler_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoCompilerError, match=r"install gcc or run `pip install 'apollo-fuse\[cc\]'`"):
        Toolchain.find({"PATH": str(tmp_path)})


def test_a_cc_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoCompilerError, match="CC is 'no-such-cc'"):
        Toolchain.find({"PATH": str(tmp_path), "CC": "no-such-cc -m64"})


def test_a_cc_that_does_not_work_is_a_compiler_error() -> None:
    with pytest.raises(CompilerError, match="set CC to a C compiler"):
        Toolchain.find({**SYSTEM, "CC": "false"})


def test_cc_may_carry_arguments() -> None:
    found = Toolchain.find(SYSTEM)
    assert Toolchain.find({**SYSTEM, "CC": f"{found.command[0]} -pipe"}).command == (
        *found.command,
        "-pipe",
    )


def test_the_ziglang_package_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(tools, "_identify", lambda command: "clang version 20 (ziglang/zig-bootstrap)")
    found = Toolchain.find({"PATH": str(tmp_path)})
    assert found.command == (sys.executable, "-m", "ziglang", "cc")
    assert "-march=x86_64_v3" in replace(found, cpu=Cpu("x86-64", 3)).flags


@pytest.mark.parametrize("zig", [False, True])
@pytest.mark.parametrize("cpu", KNOWN, ids=str)
def test_the_plugin_is_compiled_for_every_processor_of_the_architecture(cpu: Cpu, zig: bool) -> None:
    toolchain = Toolchain(("zig" if zig else "gcc",), "", cpu)
    processor = [flag for flag in toolchain.portable_flags if flag.startswith("-m")]
    expected = {
        ("x86-64", False): ["-march=x86-64"],
        ("x86-64", True): ["-march=x86_64"],
        ("aarch64", False): [],
        ("aarch64", True): ["-mcpu=baseline"],
    }
    assert processor == expected[cpu.architecture, zig]


def _build(output: Path, cache: Path) -> bytes:
    toolchain = Toolchain.find(SYSTEM)
    objects = link.compile_objects(SOURCES, toolchain, cache, 2)
    link.link_library(objects, TABLE, output, toolchain, cache)
    return output.read_bytes()


def test_concurrent_writers_share_a_cache_and_an_output(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        tasks = [pool.submit(_build, tmp_path / "out.so", tmp_path / "cache") for _ in range(8)]
        libraries = {task.result() for task in tasks}
    assert len(libraries) == 1
    assert len(list((tmp_path / "cache").iterdir())) == len(SOURCES) + 3
    assert {entry.name for entry in tmp_path.iterdir()} == {"cache", "out.so"}


def test_a_library_does_not_depend_on_where_it_is_built(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    one = _build(tmp_path / "one.so", tmp_path / "cache")
    other = _build(tmp_path / "deep" / "er" / "other.so", tmp_path / "deep" / "cache")
    assert one == other
    assert str(tmp_path).encode() not in one


def test_a_library_exports_the_entry_point_alone(tmp_path: Path) -> None:
    _build(tmp_path / "out.so", tmp_path / "cache")
    assert elf.exported(tmp_path / "out.so") == ["RegisterCustomOps"]
    assert ctypes.CDLL(str(tmp_path / "out.so")).RegisterCustomOps


def test_a_library_needs_the_c_library_alone(tmp_path: Path) -> None:
    _build(tmp_path / "out.so", tmp_path / "cache")
    assert set(elf.needed(tmp_path / "out.so")) <= {"libc.so.6", "libm.so.6"}


def test_a_link_error_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "out.so").write_text("before")
    toolchain = Toolchain.find(SYSTEM)
    with pytest.raises(CompilerError, match="af_missing"):
        link.link_library(
            [],
            table.tables([table.alone("af_missing", 1)], [0]),
            tmp_path / "out.so",
            toolchain,
            tmp_path / "cache",
        )
    assert (tmp_path / "out.so").read_text() == "before"


def test_an_output_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        _build(tmp_path / "absent" / "out.so", tmp_path / "cache")
