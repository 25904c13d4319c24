"""`make gpu`: kernels go through the driver by ctypes; here through a stub, and the interpreter runs them."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse import Options, fuse, gpu_trials
from apollo_fuse.capture import capture
from apollo_fuse.gpu import GpuTarget
from benchmarks import device_rows, on_device
from benchmarks.device import DeviceError, cuda_target, first_device
from benchmarks.device_rows import Row, rows_for, wanted
from benchmarks.device_table import Ran, to_markdown
from benchmarks.on_device import NO_DEVICE
from benchmarks.on_provider import compared
from models import chains, memory_bound
from tests.interpreted import candidates_of
from tests.stub import PROVIDERS, Pretended, Process, Stub, patched

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(tmp_path_factory.mktemp("stub"))
    yield started
    started.close()


def measured(
    stub: Stub, model: onnx.ModelProto, folder: Path, wrong: bool, provider: str = "CUDAExecutionProvider"
) -> tuple[list[Row], int, int]:
    """The model's kernels on a stub of an A100, or of an MI300X where that is the provider's.

    `wrong` changes what is expected of the last output.
    """
    stub.use(provider)
    on_amd = PROVIDERS[provider] == "hip"
    stub.have(0x942 if on_amd else 80)
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
    device = first_device()
    with patched(gpu_trials, "compile_kernels", pretended.compile), patched(device_rows, "LAUNCHES", 1):
        rows = rows_for("model", candidates, arrays, device, replace(Options(), cache_dir=folder / "cache"))
    driver = ctypes.CDLL("libamdhip64.so.6" if on_amd else "libcuda.so.1")
    return rows, *(ctypes.c_int.in_dll(driver, name).value for name in ("allocated", "freed"))


def failing(stub: Stub, function: str) -> str:
    stub.have(80)
    stub.fail(function, 2)
    with pytest.raises(DeviceError) as found:
        first_device().array(64)
    return str(found.value)


@pytest.mark.parametrize(
    "make", [lambda: memory_bound.gelu_tanh(6, 100), lambda: chains.cross_entropy(6, 100)]
)
def test_kernels_run_agree_and_are_timed(make, process: Process, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    rows, allocated, freed = process(measured, make(), tmp_path, False)
    assert allocated == freed > 0
    *kernels, chain = rows
    assert chain.is_chain and chain.launches == sum(row.launches for row in kernels) > 0
    assert chain.bytes == sum(row.bytes for row in kernels)
    for row in rows:
        assert row.problem == "" and row.launches >= 1
        assert row.us == 1000 * row.launches  # by the stub's clock
        assert row.share == pytest.approx(row.bytes / (row.us * 1e-6) / 1024e9)


def test_an_output_that_differs_is_told(process: Process, tmp_path: Path) -> None:
    rows, _, _ = process(measured, memory_bound.gelu_tanh(6, 100), tmp_path, True)
    (kernel, chain) = rows
    assert kernel.problem and chain.problem == f"{kernel.kernel} do not agree"
    assert "1 kernels ran, 1 of them do not agree" in to_markdown(Ran(rows), {})


def test_a_gpu_of_amd_is_found_behind_its_driver(process: Process, tmp_path: Path) -> None:
    model = memory_bound.gelu_tanh(6, 100)
    rows, allocated, freed = process(measured, model, tmp_path, False, "ROCMExecutionProvider")
    assert allocated == freed > 0 and not any(row.problem for row in rows)
    for row in rows:
        assert row.share == pytest.approx(row.bytes / (row.us * 1e-6) / 5.3e12)


def test_a_model_is_compared_with_itself_fused_on_a_provider(tmp_path: Path) -> None:
    path, provider = tmp_path / "net.onnx", "CPUExecutionProvider"
    model, feeds = memory_bound.softmax(64, 1000), {"x": np.ones((64, 1000), np.float32)}
    onnx.save(model, path)
    report = fuse(path, options=Options(measure=False, fuse_all=True, cache_dir=tmp_path / "cache"))
    found = compared("net", path, report.output, report.library, feeds, provider, 0.1, 1)
    assert found.problem == "" and 0 < found.fused_us < found.unfused_us
    table = to_markdown(Ran([], [replace(found, problem="y is off")], {"vgg19": "Error: why"}, ["adam"]), {})
    assert "| net |" in table and "y is off" in table
    assert "| vgg19 | Error: why |" in table and "No time was left for adam." in table


def tabled(stub: Stub, folder: Path) -> tuple[int, str, dict[str, object]]:
    """What the command says and writes of one model on a stub of an H100."""
    stub.have(90)
    pretended = Pretended()
    stub.call(lambda launched: 0 if pretended.run(launched) else 1)
    files = {kind: folder / f"found.{kind}" for kind in ("json", "markdown")}
    arguments = [argument for kind, path in files.items() for argument in (f"--{kind}", str(path))]
    with patched(gpu_trials, "compile_kernels", pretended.compile), patched(device_rows, "LAUNCHES", 1):
        status = on_device.main(["--only", "chain20_64k", *arguments])
    return status, files["markdown"].read_text(), json.loads(files["json"].read_text())


def test_one_command_tables_kernels_and_chains(process: Process, tmp_path: Path) -> None:
    status, table, record = process(tabled, tmp_path)
    assert status == 0 and record["failed"] == {} and record["left"] == []
    assert record["device"]["compiled for"] == "cuda:90"
    (chain,) = record["chains"]
    assert [row["model"] for row in record["kernels"]] == [chain["model"]] == ["chain20_64k"]
    assert "| chain20_64k | all 1 | 1 | 1000.0 | 0.79 |" in table


def test_chains_run_in_torch_too(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    model, feeds = memory_bound.softmax(64, 1000), {"x": np.ones((64, 1000), np.float32)}
    clean, candidates = candidates_of(model, tmp_path)
    arrays = capture(clean, wanted(candidates), feeds, 1).arrays
    chain = [
        device_rows._Ready(x, (), (), [arrays[v.name or ""] for v in x.part.inputs], ()) for x in candidates
    ]
    eager, compiled = device_rows.in_torch(chain, "cpu")
    assert eager is not None and compiled is not None and eager > 0 < compiled


def test_errors_of_the_driver_have_its_words(process: Process) -> None:
    assert process(failing, "cuMemAlloc_v2") == "cuMemAlloc_v2 gave CUDA_ERROR_OUT_OF_MEMORY (2)"


def test_a_device_takes_the_newest_code_that_it_runs() -> None:
    assert cuda_target(86) == GpuTarget("cuda", "80")
    assert cuda_target(90) == cuda_target(120) == GpuTarget("cuda", "90")
    with pytest.raises(DeviceError, match="compute capability 75, expected 80 or newer"):
        cuda_target(75)


def test_without_a_gpu_it_is_skipped_with_a_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert on_device.main([]) == NO_DEVICE
    said = capsys.readouterr().err
    assert (
        "skipped, there is no GPU: libcuda.so.1: cannot open" in said and "; libamdhip64.so: cannot" in said
    )
