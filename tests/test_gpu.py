"""What a target may be, and what is told of kernels on GPUs: compiled and predicted, with none at hand."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import onnx
import pytest

from apollo_fuse import Options, fuse
from apollo_fuse import report as reports
from apollo_fuse.cost import cost_of, taken
from apollo_fuse.descriptions import a100
from apollo_fuse.errors import NoTritonError, UsageError
from apollo_fuse.gpu import KNOWN, GpuTarget, gpus_of
from apollo_fuse.report import GpuReport, Report
from models import chains, memory_bound
from tests.interpreted import candidates_of


def test_gpus_follow_the_cpu_in_any_order() -> None:
    assert gpus_of("auto") == gpus_of("cpu") == ()
    assert gpus_of("cpu, cuda:90,cuda:80") == (GpuTarget("cuda", "90"), GpuTarget("cuda", "80"))
    assert gpus_of(f"auto,{','.join(map(str, KNOWN))}") == KNOWN


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cuda:90", "every library runs on the CPU; give cpu,cuda:90"),
        ("cpu,cuda:91", "'cuda:91' is no target that is known; give auto or cpu, and behind it"),
        ("cpu,cuda:90,cuda:90", "name each thing once"),
        ("cpu,cpu", "name each thing once"),
        ("", "'' is no target"),
    ],
)
def test_a_target_that_makes_no_sense_is_wrong_usage(target: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Options(target=target)


@pytest.mark.parametrize("gpu", KNOWN, ids=str)
def test_a_gpu_is_described_with_the_warps_that_its_kernels_have(gpu: GpuTarget) -> None:
    assert gpu.machine.gpu is not None and gpu.machine.gpu.warp == gpu.warp


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("reported")
    onnx.save(memory_bound.softmax(2048, 4096), folder / "net.onnx")
    options = Options(
        target="cpu,cuda:90,hip:gfx942", measure=False, fuse_all=True, cache_dir=folder / "cache"
    )
    first = fuse(folder / "net.onnx", options=options)
    again = fuse(folder / "net.onnx", options=options)
    assert again.remembered and again.kernels == first.kernels
    return first


def test_a_softmax_on_a_gpu_is_one_launch_that_spills_nothing(reported: Report) -> None:
    (kernel,) = reported.kernels
    assert kernel.gpu.keys() == {"cuda:90", "hip:gfx942"}
    for gpu in kernel.gpu.values():
        assert (gpu.launches, gpu.spills) == (1, 0)
        assert gpu.compulsory_bytes == 2 * 4 * 2048 * 4096
        assert 0 < gpu.registers <= 64 and 0 < gpu.occupancy <= 1 and gpu.binary_bytes > 1000
    # 64 MiB are more than the second level of an H100 holds, and fit the Infinity Cache
    assert kernel.gpu["cuda:90"].dram_bytes > 0 == kernel.gpu["hip:gfx942"].dram_bytes


def test_the_report_with_gpus_is_what_its_schema_says(reported: Report) -> None:
    schema = json.loads(Path(reports.__file__).with_name("report.schema.json").read_text())
    jsonschema.validate(reported.to_json(), schema)
    assert isinstance(reported.kernels[0].gpu["cuda:90"], GpuReport)


def test_a_missing_triton_is_told_before_the_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    onnx.save(memory_bound.mish(8, 48), tmp_path / "net.onnx")
    with pytest.raises(NoTritonError, match="Triton is not installed"):
        fuse(tmp_path / "net.onnx", options=Options(target="cpu,cuda:80", cache_dir=tmp_path / "cache"))
    assert [path.name for path in tmp_path.glob("net*")] == ["net.onnx"]


def test_the_cost_of_a_run_is_that_of_the_form_it_takes(tmp_path: Path) -> None:
    _, (candidate,) = candidates_of(chains.cross_entropy("rows", 1000), tmp_path)
    group = candidate.group
    (rows,) = (extent.symbol for extent in group.extents)
    few, many = taken(group, {rows: 3}), taken(group, {rows: 3000})
    assert {kernel.form for kernel in few} == {0} and {kernel.form for kernel in many} == {1}
    assert len(few) + len(many) == len(group.kernels)
    alone = replace(group, kernels=few, forms=())
    assert cost_of(group, {rows: 3}, a100()) == cost_of(alone, {rows: 3}, a100())
