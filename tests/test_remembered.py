"""A compilation that was done before verifies and measures nothing, and comes to the same."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse import InputShape, Options, driver, fuse, fusing, onnx_files, remembered
from apollo_fuse.report import CompileSeconds, Report
from tests.test_end_to_end import normal, text_model


class _RanTheModelError(Exception):
    pass


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    text = "g (float[N, 64] x) => (float[N, 64] y) { t = Mul(x, w) u = Tanh(t) y = Add(u, w) }"
    onnx.save(text_model(text, w=normal(64)), path)
    return path


@pytest.fixture
def options(tmp_path: Path) -> Options:
    given = (InputShape("x", (32, 64)),)
    return Options(given, measure=False, strict=True, threads=1, cache_dir=tmp_path / "cache")


def forbid_running(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise _RanTheModelError

    monkeypatch.setattr(driver, "open_session", refuse)


def memory_of(model: Path, options: Options) -> Path:
    return options.cache_dir / "results" / f"{fusing._key(model, options)}.zip"


def without_times(report: Report) -> Report:
    return dataclasses.replace(report, compile_seconds=CompileSeconds(), remembered=False)


def test_the_same_compilation_again_runs_nothing_and_writes_the_same(
    model: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fuse(model, options=options)
    assert first.library is not None and not first.remembered
    written = first.output.read_bytes(), first.library.read_bytes()
    first.output.unlink()
    first.library.unlink()
    forbid_running(monkeypatch)
    second = fuse(model, options=options)
    assert second.remembered and second.library is not None
    assert (second.output.read_bytes(), second.library.read_bytes()) == written
    assert without_times(second) == without_times(first)


WRITTEN_AGAIN = """
import sys
from pathlib import Path
from apollo_fuse import InputShape, Options, fuse
given = (InputShape("x", (32, 64)),)
options = Options(given, measure=False, strict=True, threads=1, cache_dir=Path(sys.argv[2]))
assert fuse(sys.argv[1], options=options).remembered
print(*sorted({"apollo_fuse.driver", "islpy", "onnx_ir", "onnxruntime", "sympy"} & set(sys.modules)))
"""


def test_to_write_a_result_again_loads_neither_compiler_nor_onnxruntime(
    model: Path, options: Options
) -> None:
    fuse(model, options=options)
    command = [sys.executable, "-c", WRITTEN_AGAIN, str(model), str(options.cache_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_that_nothing_wins_is_remembered_too(
    model: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver.Settle, "verified", lambda *_: ((), driver.NOTHING))
    fuse(model, options=options)
    monkeypatch.undo()
    forbid_running(monkeypatch)
    report = fuse(model, options=options)
    assert report.remembered and report.library is None
    assert report.output.read_bytes() == model.read_bytes()


def test_another_model_or_other_options_are_decided_anew(
    model: Path, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "one.npz", x=np.ones((32, 64), np.float32))
    given = dataclasses.replace(options, inputs=tmp_path / "one.npz")
    fuse(model, options=given)
    fuse(model, options=options)
    forbid_running(monkeypatch)
    for other in (
        {"shapes": (InputShape("x", (16, 64)),)},
        {"seed": 1},
        {"threads": 2},
        {"strict": False},
        {"remeasure": True},
    ):
        with pytest.raises(_RanTheModelError):
            fuse(model, options=dataclasses.replace(options, **other))  # type: ignore[arg-type]
    assert fuse(model, options=given).remembered
    np.savez(tmp_path / "one.npz", x=np.zeros((32, 64), np.float32))
    with pytest.raises(_RanTheModelError):
        fuse(model, options=given)
    text = "g (float[N, 64] x) => (float[N, 64] y) { t = Mul(x, w) u = Tanh(t) y = Add(u, w) }"
    onnx.save(text_model(text, w=normal(64) * 2), model)
    with pytest.raises(_RanTheModelError):
        fuse(model, options=options)


@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_damaged_memory_is_made_anew(model: Path, options: Options, length: int) -> None:
    first = fuse(model, options=options)
    (memory,) = (options.cache_dir / "results").iterdir()
    memory.write_bytes(memory.read_bytes()[:length])
    second = fuse(model, options=options)
    assert not second.remembered and second.library is not None
    assert without_times(second) == without_times(first)
    assert fuse(model, options=options).remembered


def test_memories_belong_to_the_user_alone(model: Path, options: Options) -> None:
    fuse(model, options=options)
    assert (options.cache_dir / "results").stat().st_mode & 0o077 == 0


def test_intermediate_forms_are_made_anew(model: Path, options: Options, tmp_path: Path) -> None:
    fuse(model, options=options)
    (tmp_path / "dump").mkdir()
    assert not fuse(model, options=dataclasses.replace(options, dump=tmp_path / "dump")).remembered
    assert (tmp_path / "dump" / "clusters.txt").read_text()


def test_a_result_is_written_again_to_another_place(model: Path, options: Options, tmp_path: Path) -> None:
    first = fuse(model, options=options)
    (tmp_path / "elsewhere").mkdir()
    second = fuse(model, tmp_path / "elsewhere" / "net.onnx", options)
    assert second.remembered and first.library is not None and second.library is not None
    assert (second.output, second.library) == (
        tmp_path / "elsewhere" / "net.onnx",
        tmp_path / "elsewhere" / "net.so",
    )
    assert second.output.read_bytes() == first.output.read_bytes()
    assert second.library.read_bytes() == first.library.read_bytes()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("large", [False, True])
def test_weights_of_the_model_are_not_kept_twice(
    beside: bool, large: bool, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(onnx_files, "_LARGE", 0)
    text = "g (float[N, 512] x) => (float[N, 512] y) { t = MatMul(x, w) u = Tanh(t) y = Add(u, x) }"
    weight = normal(512, 512)
    path = tmp_path / "net.onnx"
    onnx.save(text_model(text, w=weight), path, save_as_external_data=beside, location="net.bin")
    options = dataclasses.replace(options, shapes=(InputShape("x", (32, 512)),), fuse_all=True)
    first = fuse(path, tmp_path / "out.onnx", options)
    written = {file.name: file.read_bytes() for file in tmp_path.glob("out.*")}
    assert len(written) == (3 if large else 2)
    for name in written:
        (tmp_path / name).unlink()
    (memory,) = (options.cache_dir / "results").iterdir()
    assert memory.stat().st_size < weight.nbytes / 8
    second = fuse(path, tmp_path / "out.onnx", options)
    assert second.remembered and without_times(second) == without_times(first)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("out.*")} == written


def test_a_result_with_many_weights_of_its_own_is_not_kept(
    model: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "_MOST", 1024)
    text = "g (float[N, 64] x) => (float[N, 64] y) { a = Mul(w, w) t = Mul(x, a) u = Tanh(t) y = Add(u, a) }"
    onnx.save(text_model(text, w=normal(64, 64)[:32]), model)
    assert fuse(model, options=dataclasses.replace(options, fuse_all=True)).library is not None
    assert not (options.cache_dir / "results").exists()


def test_results_that_were_not_used_for_longest_make_room(
    model: Path, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (dataclasses.replace(options, seed=seed) for seed in (1, 2, 3))
    fuse(model, options=first)
    fuse(model, options=second)
    for place, chosen in enumerate((second, first)):  # the first was used last
        os.utime(memory_of(model, chosen), (place, place))
    size = memory_of(model, first).stat().st_size
    monkeypatch.setattr(remembered, "_ROOM", 5 * size // 2)
    fuse(model, options=third)
    assert fuse(model, options=third).remembered and fuse(model, options=first).remembered
    assert not fuse(model, options=second).remembered
