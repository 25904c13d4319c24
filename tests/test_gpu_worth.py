"""Without measuring, a kernel stays that pays on the GPUs of the target, though the CPU may lose by it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest

from apollo_fuse import Options, acceptance, fuse
from apollo_fuse.dtypes import DType
from apollo_fuse.gpu import KNOWN
from apollo_fuse.gpu_worth import pay_together_on, pays_on
from apollo_fuse.unfused import Ran, Tensor
from models import memory_bound
from tests.interpreted import candidates_of

ROWS = Tensor(DType.FLOAT32, (64, 1000))


def test_a_kernel_pays_where_it_takes_the_place_of_several_launches(tmp_path: Path) -> None:
    _, (softmax,) = candidates_of(memory_bound.softmax(64, 1000), tmp_path)
    one, view = Ran("Softmax", (ROWS,), (ROWS,)), Ran("Reshape", (ROWS,), (ROWS,))
    assert pays_on(KNOWN, [one] * 5, (softmax.group, {}))
    assert not pays_on(KNOWN, [one], (softmax.group, {}))
    assert not pays_on(KNOWN, [one, *[view] * 4], (softmax.group, {}))
    assert not pays_on((), [one] * 5, (softmax.group, {}))


def test_kernels_pay_together_where_they_save_more_launches_than_their_table_takes(tmp_path: Path) -> None:
    _, (softmax,) = candidates_of(memory_bound.softmax(64, 1000), tmp_path)
    assert pay_together_on(KNOWN, [(softmax.group, {})] * 3)
    assert not pay_together_on(KNOWN, [(softmax.group, {})])
    assert not pay_together_on((), [(softmax.group, {})] * 3)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("target", "kept"), [("cpu", 0), ("cpu,cuda:90", 1)])
def test_what_the_cpu_loses_by_stays_for_gpus_alone(
    target: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "predicted", lambda *_: (1e-6, 2e-6))
    onnx.save(memory_bound.softmax(64, 1000), tmp_path / "net.onnx")
    options = Options(target=target, measure=False, cache_dir=tmp_path / "cache")
    report = fuse(tmp_path / "net.onnx", options=options)
    assert sum(kernel.accepted for kernel in report.kernels) == kept
