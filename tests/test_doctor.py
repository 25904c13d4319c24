"""`apollo-fuse --doctor` says what the machine has, and what to do about what is missing."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import click.testing
import pytest

from apollo_fuse import cli
from apollo_fuse.cpu import Cpu
from apollo_fuse.doctor import Diagnosis, Finding, examine
from apollo_fuse.options import Options


def targets(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {x.what: x for x in diagnosis.targets}


def machine(diagnosis: Diagnosis) -> dict[str, Finding]:
    return {x.what: x for x in diagnosis.machine}


def lacking(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else find(name))


class Driver:
    """A driver's library with three devices, or with a status for every call."""

    def __init__(self, status: int) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.status

    def cuDeviceGetCount(self, count: ctypes.Array[ctypes.c_int]) -> int:
        count._obj.value = 3  # type: ignore[attr-defined]
        return self.status


def driven(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    def load(name: str) -> Driver:
        if name != "libcuda.so.1":
            raise OSError(name)
        return Driver(status)

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_a_machine_with_everything_is_ready_for_its_own_cpu(tmp_path: Path) -> None:
    diagnosis = examine(Options(cache_dir=tmp_path / "not" / "yet"))
    assert diagnosis.is_ready
    assert str(Cpu.native()) in targets(diagnosis)["cpu"].found
    found = machine(diagnosis)
    assert found["cache"].found == str(tmp_path / "not" / "yet") and not found["cache"].missing
    assert "CPUExecutionProvider" in found["onnxruntime"].found
    assert {"apollo-fuse", "triton", "python"} <= found.keys()
    assert not (tmp_path / "not").exists()


def test_a_missing_compiler_is_told_with_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacking(monkeypatch, "ziglang")
    monkeypatch.setenv("PATH", str(tmp_path))
    diagnosis = examine(Options(compiler=None, cache_dir=tmp_path))
    assert not diagnosis.is_ready
    assert "install gcc or run `pip install 'apollo-fuse[cc]'`" in targets(diagnosis)["cpu"].missing


def test_a_compiler_for_other_architectures_is_told_of_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lacking(monkeypatch, "ziglang")
    diagnosis = examine(Options(cache_dir=tmp_path))
    other = "aarch64" if Cpu.native().architecture == "x86-64" else "x86-64"
    assert "apollo-fuse[cc]" in targets(diagnosis)[f"cpu, --cpu {other}"].missing
    assert diagnosis.is_ready


def test_gpus_want_triton_and_nothing_is_promised_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = targets(examine(Options(cache_dir=tmp_path)))
    assert "into libraries" in found["cpu,cuda:90"].found
    assert found["cpu,hip:gfx942"].found == found["cpu,cuda:90"].found
    lacking(monkeypatch, "triton")
    diagnosis = examine(Options(cache_dir=tmp_path))
    assert "apollo-fuse[gpu]" in targets(diagnosis)["cpu,cuda:90"].missing
    assert diagnosis.is_ready


def test_drivers_are_asked_for_their_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driven(monkeypatch, 0)
    found = machine(examine(Options(cache_dir=tmp_path)))
    assert found["CUDA driver"].found == "libcuda.so.1, 3 devices"
    assert found["HIP driver"].found == "none: libamdhip64.so is not there"


def test_a_driver_that_fails_is_told_with_its_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    driven(monkeypatch, 100)
    found = machine(examine(Options(cache_dir=tmp_path)))
    assert found["CUDA driver"].found == "libcuda.so.1 is there, and ends with status 100"


def test_a_cache_that_cannot_be_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    diagnosis = examine(Options(cache_dir=tmp_path / "file" / "cache"))
    assert "--cache-dir" in machine(diagnosis)["cache"].missing
    assert not diagnosis.is_ready


def test_the_command_needs_no_model_and_its_status_is_whether_models_can_be_fused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("APOLLO_FUSE_CACHE_DIR", str(tmp_path))
    shown = click.testing.CliRunner().invoke(cli.main, ["--doctor"])
    assert shown.exit_code == 0
    assert "cpu,hip:gfx942" in shown.stdout and f"ready: {Cpu.native()} with" in shown.stdout
    monkeypatch.setenv("CC", "no-such-compiler")
    shown = click.testing.CliRunner().invoke(cli.main, ["--doctor"])
    assert shown.exit_code == 1
    assert "missing: CC is 'no-such-compiler'" in shown.stdout


def test_the_doctor_imports_no_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    examine(Options(cache_dir=tmp_path))
    assert "triton" not in set(sys.modules) - before
