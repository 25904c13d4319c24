"""Sums of two tensors are written as additions, which onnxruntime makes part of convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from apollo_fuse.bodies import nodes
from models.writing import Graph
from tests.fusing import assert_computes_as, with_shapes
from tests.test_end_to_end import normal, text_model


def residual() -> onnx.ModelProto:
    """A grouped convolution that stays in rows on every machine, and Relu of its sum with a residual."""
    graph = Graph("residual")
    x = graph.input("x", [1, 12, 9, 9])
    weights = np.linspace(-1, 1, 36, dtype=np.float32).reshape(12, 3, 1, 1)
    made = graph.op("Conv", x, weights, np.linspace(-1, 1, 12, dtype=np.float32), group=4)
    graph.output(graph.op("Relu", graph.op("Sum", made, x)), "y", [1, 12, 9, 9])
    return graph.model()


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in nodes(model.graph)]


def optimised(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators behind all optimisations of onnxruntime."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def test_onnxruntime_takes_an_addition_into_a_convolution_and_a_sum_not(tmp_path: Path) -> None:
    model = residual()
    clean = with_shapes(model, tmp_path)
    assert optimised(model, tmp_path) == ["Conv", "Sum", "Relu"]
    assert optimised(ir.to_proto(clean), tmp_path) == ["FusedConv"]
    assert_computes_as(clean, model, normal(1, 12, 9, 9))


@pytest.mark.parametrize(("operands", "expected"), [("x, z", "Add"), ("z, x, x", "Sum")])
def test_only_sums_of_two_are(operands: str, expected: str, tmp_path: Path) -> None:
    text = f"""g (float[A, 4] x) => (float[A, 4] y) <float[4] z = {{1, 2, 3, 4}}>
      {{ a = Sum({operands}) y = Exp(a) }}"""
    model = text_model(text)
    clean = with_shapes(model, tmp_path)
    assert kinds(clean) == [expected, "Exp"]
    assert_computes_as(clean, model, normal(3, 4))


def test_sums_in_bodies_are(tmp_path: Path) -> None:
    model = text_model(
        """g (bool c, float[A, 4] x) => (float[A, 4] y) {
            y = If(c) <
                then_branch = t () => (float[A, 4] a) { a = Sum(x, x) },
                else_branch = e () => (float[A, 4] b) { b = Neg(x) }
            >
        }"""
    )
    assert kinds(with_shapes(model, tmp_path)).count("Add") == 1
