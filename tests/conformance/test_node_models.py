"""The node models of the onnx package: each goes through, with whatever of it can be a kernel in one.

What onnxruntime itself does not run, or runs to other results than onnx states, is skipped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.backend.test.loader import load_model_tests

import apollo_fuse
from apollo_fuse import InputShape, Options
from apollo_fuse.dtypes import DType
from apollo_fuse.operators import DESCRIPTIONS
from apollo_fuse.tolerance import compare
from tests.fusing import reference_session

pytestmark = pytest.mark.slow

CASES = {case.name: case for case in load_model_tests(kind="node")}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("name", CASES)
def test_node_model(name: str, tmp_path: Path, cache: Path) -> None:
    case = CASES[name]
    if case.model is None or not case.data_sets:
        pytest.skip("the package holds no data for it")
    names = [value.name for value in case.model.graph.input]
    feeds = dict(zip(names, case.data_sets[0][0], strict=True))
    if not all(isinstance(array, np.ndarray) for array in feeds.values()):
        pytest.skip("an input is no tensor")
    try:
        original = reference_session(case.model)
        expected = original.run(None, feeds)
    except Exception as error:  # onnxruntime raises classes of its own for each status
        pytest.skip(f"onnxruntime does not run it: {str(error).splitlines()[0]}")
    onnx.save(case.model, tmp_path / "model.onnx")
    given = tuple(InputShape(key, array.shape) for key, array in feeds.items() if array.size and array.ndim)
    options = Options(given, measure=False, strict=True, fuse_all=True, cache_dir=cache, threads=2)
    report = apollo_fuse.fuse(tmp_path / "model.onnx", tmp_path / "fused.onnx", options)
    session = apollo_fuse.session(report.output)
    found = session.run(None, feeds)
    for argument, a, b in zip(original.get_outputs(), expected, found, strict=True):
        if isinstance(a, np.ndarray):
            problem = compare(argument.name, a, b, DType.FLOAT32).problem
            assert not problem
    described = {(node.domain, node.op_type) for node in case.model.graph.node} <= set(DESCRIPTIONS)
    if described and report.library is None:
        reasons = "; ".join(f"{r.reason}: {r.evidence}" for r in report.refused)
        pytest.skip(f"no kernel: {reasons or 'folded away'}")
