"""`make gpu`: kernels go through the driver by ctypes; here through a stub, and the interpreter runs them."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse import gpu_trials
from apollo_fuse.capture import capture
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.options import Options
from benchmarks import on_device
from benchmarks.device import Device, DeviceError
from benchmarks.on_device import NO_DEVICE, Row, rows_for, target_for, to_markdown, wanted
from models import chains, memory_bound
from tests.interpreted import candidates_of
from tests.stub import Pretended, Process, Stub, patched

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(tmp_path_factory.mktemp("stub"))
    yield started
    started.close()


def measured(stub: Stub, model: onnx.ModelProto, folder: Path, wrong: bool) -> tuple[list[Row], int, int]:
    """The model's kernels on a stub of an A100; `wrong` changes what is expected of the last output."""
    stub.have(80)
    pretended = Pretended()
    stub.call(lambda launched: 0 if pretended.run(launched) else 1)
    clean, candidates = candidates_of(model, folder)
    generator = np.random.default_rng(0)
    feeds = {
        value.name: generator.standard_normal((6, 100)).astype(np.float32)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        else generator.integers(0, 100, 6)
        for value in model.graph.input
    }
    arrays = dict(capture(clean, wanted(candidates), feeds, 1).arrays)
    if wrong:
        name = candidates[-1].part.outputs[-1].name
        arrays[name] = arrays[name] + 1
    with patched(gpu_trials, "compile_kernels", pretended.compile), patched(on_device, "_LAUNCHES", 1):
        rows = rows_for("model", candidates, arrays, Device(), replace(Options(), cache_dir=folder / "cache"))
    driver = ctypes.CDLL("libcuda.so.1")
    return rows, *(ctypes.c_int.in_dll(driver, name).value for name in ("allocated", "freed"))


def failing(stub: Stub, function: str) -> str:
    stub.have(80)
    stub.fail(function, 2)
    with pytest.raises(DeviceError) as found:
        Device().array(64)
    return str(found.value)


@pytest.mark.parametrize(
    "make", [lambda: memory_bound.gelu_tanh(6, 100), lambda: chains.cross_entropy(6, 100)]
)
def test_kernels_run_agree_and_are_timed(make, process: Process, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rows, allocated, freed = process(measured, make(), tmp_path, False)
    assert rows and allocated == freed > 0
    for row in rows:
        assert row.problem == "" and row.launches >= 1
        assert row.us == 1000 * row.launches  # by the stub's clock
        assert row.share == pytest.approx(row.bytes / (row.us * 1e-6) / 1024e9)


def test_an_output_that_differs_is_told(process: Process, tmp_path: Path) -> None:
    rows, _, _ = process(measured, memory_bound.gelu_tanh(6, 100), tmp_path, True)
    assert rows[-1].problem
    assert "1 of them do not agree" in to_markdown(rows, {}, ["vgg19"])


def test_errors_of_the_driver_have_its_words(process: Process) -> None:
    assert process(failing, "cuMemAlloc_v2") == "cuMemAlloc_v2 gave CUDA_ERROR_OUT_OF_MEMORY (2)"


def test_a_device_takes_the_newest_code_that_it_runs() -> None:
    assert target_for(86) == GpuTarget("cuda", "80")
    assert target_for(90) == target_for(120) == GpuTarget("cuda", "90")
    with pytest.raises(DeviceError, match="compute capability 75, expected 80 or newer"):
        target_for(75)


def test_without_a_gpu_it_is_skipped_with_a_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert on_device.main([]) == NO_DEVICE
    assert "skipped, there is no GPU: no driver of NVIDIA can be loaded" in capsys.readouterr().err
