"""A compilation that was done before verifies and measures nothing, and comes to the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse import InputShape, Options, driver, fuse
from apollo_fuse.report import Report
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


def without_times(report: Report) -> Report:
    return dataclasses.replace(report, compile_seconds=driver.CompileSeconds(), remembered=False)


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


@pytest.mark.parametrize("damage", ("", "{}", "[1]", '{"kept": [99]}'))
def test_a_damaged_memory_is_made_anew(model: Path, options: Options, damage: str) -> None:
    first = fuse(model, options=options)
    (memory,) = (options.cache_dir / "decisions").iterdir()
    memory.write_text(damage)
    second = fuse(model, options=options)
    assert not second.remembered and second.library is not None
    assert without_times(second) == without_times(first)
    assert fuse(model, options=options).remembered


def test_memories_belong_to_the_user_alone(model: Path, options: Options) -> None:
    fuse(model, options=options)
    assert (options.cache_dir / "decisions").stat().st_mode & 0o077 == 0
