"""Work grows with what is new in a model, not with its size: counted, not timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from apollo_fuse import driver, fusion, onnx_io
from apollo_fuse.codegen import link
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.passes import aggregate_ops
from apollo_fuse.passes.contraction import Contraction
from apollo_fuse.passes.loop_fusion import LoopFusion
from apollo_fuse.report import Report
from apollo_fuse.symbolic import infer_shapes
from benchmarks.scale import branches, chain, layers
from models.memory_bound import softmax

Counted = Callable[[object, str], None]


@pytest.fixture
def calls() -> Counter[str]:
    return Counter()


@pytest.fixture
def counted(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Makes a function count its calls by its name."""

    def count(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def counting(*arguments: object, **more: object) -> object:
            calls[name] += 1
            return function(*arguments, **more)

        monkeypatch.setattr(owner, name, counting)

    return count


def fused(model: onnx.ModelProto, folder: Path, **more: object) -> Report:
    path = folder / "net.onnx"
    onnx.save(model, path)
    options = Options(measure=False, strict=True, threads=2, cache_dir=folder / "cache", **more)  # type: ignore[arg-type]
    return driver.fuse(path, options=options)


def test_equal_layers_are_scheduled_compiled_and_judged_once(
    calls: Counter[str], counted: Counted, tmp_path: Path
) -> None:
    counted(LoopFusion, "__call__")
    counted(fusion.c, "emit")
    counted(driver, "judge")
    counted(link, "_run")
    found: list[Counter[str]] = []
    for count in (2, 12):
        calls.clear()
        folder = tmp_path / str(count)
        folder.mkdir()
        report = fused(layers(10 * count), folder, fuse_all=True)
        assert report.fused_nodes >= 2 * (count - 1)
        found.append(Counter(calls))
    few, many = found
    assert many == few
    assert many["judge"] == many["emit"] == len(report.kernels)


@pytest.mark.parametrize("form", [chain, branches, layers])
def test_the_work_of_grouping_grows_with_the_nodes(
    form: Callable[[int], onnx.ModelProto], calls: Counter[str], counted: Counted, tmp_path: Path
) -> None:
    counted(aggregate_ops._Growth, "_try")
    counted(Contraction, "find")
    found: list[Counter[str]] = []
    for nodes in (600, 2400):
        calls.clear()
        path = tmp_path / f"{nodes}.onnx"
        onnx.save(form(nodes), path)
        model = onnx_io.load_clean(path, tmp_path)
        infer_shapes(model)
        plan(model, Options())
        found.append(Counter(calls))
    few, many = found
    for name, count in many.items():
        assert count < 6 * few[name], name  # of four times the nodes


def test_few_sessions_are_made_of_the_whole_model(
    calls: Counter[str], counted: Counted, tmp_path: Path
) -> None:
    counted(driver, "open_session")
    counted(driver.Trial, "fused")
    report = fused(softmax("rows", 48), tmp_path, fuse_all=True)
    assert report.fused_nodes == 1
    assert calls == {"open_session": 1, "fused": 1}


def test_the_parts_of_the_time_are_parts_of_the_whole(tmp_path: Path) -> None:
    seconds = fused(softmax("rows", 48), tmp_path, fuse_all=True).compile_seconds
    assert set(seconds.parts) == {
        *("load", "shapes", "partition", "isl", "codegen", "inputs"),
        *("cc", "gpu", "judge", "verify", "measure", "write"),
    }
    left_out = {"measure", "gpu"}  # nothing was asked of either
    assert all((time > 0) != (part in left_out) for part, time in seconds.parts.items())
    assert sum(seconds.parts.values()) <= seconds.total
