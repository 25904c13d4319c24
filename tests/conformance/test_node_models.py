"""The node models of the onnx package: each goes through, with whatever of it can be a kernel in one.

Operands that choose what is computed (axes, shapes, pads, bounds) are inputs in these models, and weights in
others: where they keep a kernel away, they are made weights. What onnxruntime itself does not run, or runs to
other results than onnx states, is skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests

import apollo_fuse
from apollo_fuse import InputShape, Options, Report
from apollo_fuse.dtypes import DType
from apollo_fuse.operators import DESCRIPTIONS
from apollo_fuse.running import run
from apollo_fuse.tolerance import compare
from tests.fusing import reference_session

pytestmark = pytest.mark.slow

CASES = {case.name: case for case in load_model_tests(kind="node")}
Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("name", CASES)
def test_node_model(name: str, tmp_path: Path, cache: Path) -> None:
    case = CASES[name]
    if case.model is None or not case.data_sets:
        pytest.skip("the package holds no data for it")
    names = [value.name for value in case.model.graph.input]
    given = dict(zip(names, map(_array, case.data_sets[0][0]), strict=True))
    feeds = {key: array for key, array in given.items() if array is not None}
    if len(feeds) < len(given):
        pytest.skip("an input is no tensor")
    report = _agrees(case.model, feeds, tmp_path, cache)
    chosen = _choices(case.model, feeds)
    if report.library is None and chosen:
        fixed = onnx.ModelProto.FromString(case.model.SerializeToString())
        fixed.graph.initializer.extend(numpy_helper.from_array(feeds[key], key) for key in chosen)
        for value in [value for value in fixed.graph.input if value.name in chosen]:
            fixed.graph.input.remove(value)
        rest = {key: array for key, array in feeds.items() if key not in chosen}
        report = _agrees(fixed, rest, tmp_path, cache)
    described = {(node.domain, node.op_type) for node in case.model.graph.node} <= set(DESCRIPTIONS)
    if described and report.library is None:
        reasons = "; ".join(f"{r.reason}: {r.evidence}" for r in report.refused)
        pytest.skip(f"no kernel: {reasons or 'folded away'}")


def _array(value: object) -> np.ndarray | None:
    """What the package holds for an input as an array; scalars are NumPy's, narrow types protobuf's."""
    if isinstance(value, onnx.TensorProto):
        return np.asarray(numpy_helper.to_array(value))
    return np.asarray(value) if isinstance(value, np.ndarray | np.generic) else None


def _choices(model: onnx.ModelProto, feeds: Arrays) -> set[str]:
    """Inputs behind the first that hold a few numbers."""
    behind = {name for node in model.graph.node for name in node.input[1:]}
    return {key for key, array in feeds.items() if key in behind and array.size <= 16 and array.ndim <= 1}


def _agrees(model: onnx.ModelProto, feeds: Arrays, folder: Path, cache: Path) -> Report:
    """Fuses the model and compares what it gives with the original's results."""
    try:
        original = reference_session(model)
        expected = run(original, feeds)
    except Exception as error:  # onnxruntime raises classes of its own for each status
        pytest.skip(f"onnxruntime does not run it: {str(error).splitlines()[0]}")
    if any(
        compare("", a, b).problem
        for a, b in zip(expected, run(original, feeds), strict=True)
        if isinstance(a, np.ndarray)
    ):
        pytest.skip("onnxruntime computes something else each time")
    onnx.save(model, folder / "model.onnx")
    shapes = tuple(InputShape(key, array.shape) for key, array in feeds.items() if array.size and array.ndim)
    options = Options(shapes, measure=False, strict=True, fuse_all=True, cache_dir=cache, threads=2)
    report = apollo_fuse.fuse(folder / "model.onnx", folder / "fused.onnx", options)
    found = run(apollo_fuse.session(report.output), feeds)
    for argument, a, b in zip(original.get_outputs(), expected, found, strict=True):
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            assert not compare(argument.name, a, b, DType.FLOAT32).problem
    return report
