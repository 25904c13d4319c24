"""Branches of If that shapes decide lie in the graph around them, and the others stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.backend.test.case.node import collect_testcases

from apollo_fuse.bodies import nodes
from tests.fusing import assert_computes_as, reference_session, with_shapes
from tests.test_end_to_end import normal, text_model

HIDDEN = 4
WEIGHTS = {"w": normal(1, 4 * HIDDEN, 8), "r": normal(1, 4 * HIDDEN, HIDDEN), "bias": normal(8)}
INTEGERS = {
    name: np.array([n]) for name, n in {"first": 0, "last": -1, "one": 1, "two": 2, "three": 3}.items()
}


def model_of(nodes: str, inputs: str = "float[2, 8, L] x") -> onnx.ModelProto:
    return text_model(f"g ({inputs}) => (float[] y) {{ {nodes} }}", **WEIGHTS, **INTEGERS)


def either(condition: str, then: str, otherwise: str, name: str = "y") -> str:
    """An If whose branches end in `p` and `q`, each with a name of its own."""
    then, otherwise = then.replace("p =", f"p_{name} ="), otherwise.replace("q =", f"q_{name} =")
    return (
        f"{name} = If ({condition}) <then_branch = a_{name} () => (float[] p_{name}) {{ {then} }}, "
        f"else_branch = b_{name} () => (float[] q_{name}) {{ {otherwise} }}>"
    )


def op_types(model: ir.Model) -> list[str]:
    return sorted(node.op_type for node in nodes(model.graph))


def test_a_branch_may_be_a_weight(tmp_path: Path) -> None:
    then = "then_branch = a () => (float[1] p) <float[1] p = {3}> { }"
    otherwise = "else_branch = b () => (float q) { q = ReduceMax(x) }"
    model = model_of(
        f"s = Shape(x) e = Gather(s, first) c = Equal(e, two) v = If (c) <{then}, {otherwise}> y = Mul(x, v)"
    )
    clean = with_shapes(model, tmp_path)
    assert op_types(clean) == ["Mul"]
    assert_computes_as(clean, model, normal(2, 8, 3))


def test_a_branch_hides_the_rank_of_what_range_reads(tmp_path: Path) -> None:
    """onnxruntime takes one element for a scalar, unless it knows better before the model runs."""
    (case,) = (c for c in collect_testcases("AffineGrid") if c.name == "test_affine_grid_2d_expanded")
    clean = with_shapes(case.model, tmp_path)
    assert "If" in op_types(clean)
    assert reference_session(ir.to_proto(clean)).get_outputs()


@pytest.mark.parametrize(
    ("wanted", "kept"), [("two", ["Identity", "Relu"]), ("three", ["Add", "Identity", "Neg"])]
)
def test_an_extent_decides(wanted: str, kept: list[str], tmp_path: Path) -> None:
    choice = either("c", "p = Relu(x)", "n = Neg(x) q = Add(n, x)")
    model = model_of(f"s = Shape(x) e = Gather(s, first) c = Equal(e, {wanted}) {choice}")
    clean = with_shapes(model, tmp_path)
    assert op_types(clean) == kept
    assert_computes_as(clean, model, normal(2, 8, 3))


def test_what_a_branch_leaves_decides_about_others(tmp_path: Path) -> None:
    """The rank of `v` is known once its branch is, and decides about an If inside of a branch of another."""
    inner = either("d", "p = Abs(n)", "q = Sin(n)", "i")
    model = model_of(
        "s = Shape(x) e = Gather(s, first) c = Equal(e, two) "
        + either("c", "p = Unsqueeze(x, first)", "q = Identity(x)", "v")
        + " t = Shape(v) k = Size(t) d = Greater(k, three) f = Not(d) "
        + either("f", "p = Exp(v)", f"n = Neg(v) {inner} q = Ceil(i)")
    )
    clean = with_shapes(model, tmp_path)
    assert op_types(clean) == ["Abs", "Ceil", "Identity", "Neg", "Unsqueeze"]
    assert_computes_as(clean, model, normal(2, 8, 3))


def test_a_result_that_is_an_input_keeps_its_name(tmp_path: Path) -> None:
    model = model_of(
        "s = Shape(x) e = Gather(s, first) c = Equal(e, two) " + either("c", "p = Identity(x)", "q = Neg(x)")
    )
    clean = with_shapes(model, tmp_path)
    assert set(op_types(clean)) == {"Identity"}
    assert_computes_as(clean, model, normal(2, 8, 3))


def test_a_condition_that_an_input_decides_stays(tmp_path: Path) -> None:
    model = model_of(either("c", "p = Relu(x)", "q = Neg(x)"), "float[N] x, bool c")
    assert op_types(with_shapes(model, tmp_path)) == ["If", "Neg", "Relu"]


LSTM = f"h = Unsqueeze(v, first) m = LSTM <hidden_size = {HIDDEN}> (h, w, r) y = Tanh(m)"
IS_ONE = "s = Shape(x) e = Gather(s, last) c = Equal(e, one)"


def test_an_extent_that_the_model_cannot_run_without_is_squeezed(tmp_path: Path) -> None:
    model = model_of(f"{IS_ONE} {either('c', 'p = Squeeze(x, last)', 'q = Identity(x)', 'v')} {LSTM}")
    clean = with_shapes(model, tmp_path)
    assert op_types(clean) == ["LSTM", "Squeeze", "Tanh", "Unsqueeze"]
    assert_computes_as(clean, model, normal(2, 8, 1))
    for each in (model, ir.to_proto(clean)):
        with pytest.raises(Exception, match="Squeeze|LSTM"):  # a class of onnxruntime's for each status
            reference_session(each).run(None, {"x": normal(2, 8, 3)})


@pytest.mark.parametrize(
    ("then", "behind"),
    [
        ("p = Squeeze(x, last)", "y = Tanh(v)"),  # runs on any rank
        ("p = ReduceMax <keepdims = 0> (x, last)", LSTM),  # runs on any extent
        ("p = Squeeze(x, first)", LSTM),  # runs on an extent that was not asked for
    ],
)
def test_a_choice_between_two_ways_to_run_stays(then: str, behind: str, tmp_path: Path) -> None:
    model = model_of(f"{IS_ONE} {either('c', then, 'q = Identity(x)', 'v')} {behind}", "float[N, 8, L] x")
    assert "If" in op_types(with_shapes(model, tmp_path))
