"""Where a kernel and onnxruntime differ beyond tolerance, the same in doubles tells which is right."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rich.console import Console

from apollo_fuse import Options, fuse
from apollo_fuse.doubles import NotInDoublesError, in_doubles
from apollo_fuse.dtypes import DType
from apollo_fuse.render import render_explanation
from apollo_fuse.report import Report
from apollo_fuse.tolerance import compare, nearer
from apollo_fuse.verify import Verdict, verify
from models.writing import Graph
from tests.fusing import reference_session

COLUMNS = np.array([0], np.int64)
Feeds = Mapping[str, np.ndarray]


def model(body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> g {body}')


def deviation(cancels: bool, off: float = 0.0) -> onnx.ModelProto:
    """The deviations of columns: as the difference of two sums, or as the sum of squared distances."""
    graph = Graph("deviation")
    x = graph.input("x", [2048, 64])
    mean = graph.op("ReduceMean", x, COLUMNS)
    if cancels:
        squared = graph.op("ReduceMean", graph.op("Mul", x, x), COLUMNS)
        variance = graph.op("Sub", squared, graph.op("Mul", mean, mean))
    else:
        distance = graph.op("Sub", x, mean)
        variance = graph.op("ReduceMean", graph.op("Mul", distance, distance), COLUMNS)
    graph.output(graph.op("Add", graph.op("Sqrt", variance), off), "out", [1, 64])
    return graph.model()


def judged(original: onnx.ModelProto, other: onnx.ModelProto, feeds: Feeds) -> Verdict:
    """The verdict on `other` as a kernel in the place of `original`."""
    return verify(
        reference_session(original),
        reference_session(other),
        [feeds],
        in_doubles=lambda feeds: in_doubles(ir.from_proto(original), feeds),
    )


def columns(mean: float) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(mean, 0.1, (2048, 64)).astype(np.float32)}


def test_the_result_that_is_nearer_to_doubles_is_right() -> None:
    exact, cancelling, feeds = deviation(False), deviation(True), columns(3.0)
    plain = verify(reference_session(cancelling), reference_session(exact), [feeds])
    assert not plain.passed and not plain.note
    verdict = judged(cancelling, exact, feeds)
    assert verdict.passed and "off from doubles by" in verdict.note
    assert (verdict.max_abs_error, verdict.max_rel_error) == (plain.max_abs_error, plain.max_rel_error)


def test_the_result_that_is_farther_from_doubles_is_wrong_and_both_errors_are_told() -> None:
    verdict = judged(deviation(False), deviation(True), columns(3.0))
    assert not verdict.passed and not verdict.note
    assert "is expected (off from doubles by" in verdict.problem and "onnxruntime by" in verdict.problem


@pytest.mark.parametrize("off", [1e-3, 0.1])
def test_a_wrong_result_is_wrong_however_uncertain_onnxruntime_is(off: float) -> None:
    """Not even onnxruntime's worst column excuses a constant that is added to all of them."""
    verdict = judged(deviation(True), deviation(False, off), columns(3.0))
    assert not verdict.passed


def test_what_is_far_from_doubles_is_wrong_however_far_onnxruntime_is() -> None:
    truth = np.ones(8)
    ours = np.full(8, 1.01, np.float32)
    found = nearer(truth, np.full(8, 2.0, np.float32), ours, DType.FLOAT32)
    assert not found.right
    assert found.evidence == "off from doubles by 45 tolerances, onnxruntime by 4.5e+03"


def test_results_that_agree_are_not_computed_in_doubles() -> None:
    def never(feeds: Feeds) -> list[np.ndarray]:
        raise AssertionError("the results agree")

    one, other = reference_session(deviation(False)), reference_session(deviation(False))
    assert verify(one, other, [columns(0.0)], in_doubles=never).passed


def quantised(off: float) -> onnx.ModelProto:
    """Integers of a tanh, and of one that is off by a number."""
    graph = Graph("quantised")
    moved = graph.op("Add", graph.op("Tanh", graph.input("x", ["n"])), off)
    scale, zero = np.array(0.1, np.float32), np.array(3, np.int8)
    graph.output(graph.op("QuantizeLinear", moved, scale, zero), "y", ["n"], onnx.TensorProto.INT8)
    return graph.model()


def test_an_integer_is_right_where_a_number_in_doubles_rounds_to_it_as_well() -> None:
    """1.5 steps are between two integers, of which onnxruntime takes one and the kernel the other."""
    feeds = {"x": np.arctanh(np.linspace(-0.95, 0.95, 20)).astype(np.float32)}
    verdict = judged(quantised(-1e-6), quantised(1e-6), feeds)
    assert verdict.passed and verdict.note.startswith("y differs in ")
    assert "of a step from where doubles round to it" in verdict.note


def test_an_integer_by_a_scale_that_follows_from_the_numbers_is_judged_alike() -> None:
    """The scale is 0.5, so that every other number is between two integers, and may be either."""
    dynamic = model("(float[n] x) => (uint8[n] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }")
    feeds = {"x": np.arange(0, 511).astype(np.float32) / np.float32(4)}
    expected = reference_session(dynamic).run(None, feeds)[0]
    truth = in_doubles(ir.from_proto(dynamic), feeds)[0]
    between = np.abs(truth % 1 - 0.5) < 1e-3
    up = np.where(between, np.ceil(truth), expected).astype(np.uint8)
    assert 100 < np.count_nonzero(up != expected) and nearer(truth, expected, up).right
    assert not nearer(truth, expected, np.where(between, expected, expected - 1)).right


def test_an_integer_is_wrong_where_no_number_near_the_one_in_doubles_rounds_to_it() -> None:
    feeds = {"x": np.arctanh(np.linspace(-0.96, 0.94, 20)).astype(np.float32)}
    verdict = judged(quantised(0.0), quantised(0.02), feeds)
    assert verdict.problem.startswith("y differs in ")


def test_an_integer_that_is_another_in_doubles_is_wrong() -> None:
    down = model("(float[8] x) => (int64[8] y) { f = Floor(x) y = Cast<to = 7>(f) }")
    up = model("(float[8] x) => (int64[8] y) { f = Ceil(x) y = Cast<to = 7>(f) }")
    verdict = judged(down, up, {"x": np.full(8, 0.5, np.float32)})
    assert verdict.problem == "y differs in 8 of 8 elements"


def test_a_number_in_the_place_of_an_infinity_is_wrong_whatever_doubles_say() -> None:
    overflowing = model("(float[4] x) => (float[4] y) { s = Mul(x, x) y = Sqrt(s) }")
    kernel = model("(float[4] x) => (float[4] y) { y = Abs(x) }")
    verdict = judged(overflowing, kernel, {"x": np.full(4, 1e30, np.float32)})
    assert verdict.problem == "y has NaN or infinity in other places (4 elements)"


def test_numbers_where_doubles_have_none_are_wrong() -> None:
    truth = np.array([1.0, np.nan])
    theirs, ours = np.array([1.1, 0.0], np.float32), np.array([1.0, 0.0], np.float32)
    assert not nearer(truth, theirs, ours, DType.FLOAT32).right
    assert nearer(truth[:1], theirs[:1], ours[:1], DType.FLOAT32).right


def test_one_element_that_is_farther_than_any_of_onnxruntime_makes_all_wrong() -> None:
    truth = np.ones(1000)
    theirs, ours = np.full(1000, 1.001, np.float32), np.ones(1000, np.float32)
    assert nearer(truth, theirs, ours, DType.FLOAT32).right
    ours[7] = 1.002
    assert not nearer(truth, theirs, ours, DType.FLOAT32).right


def test_many_small_errors_are_not_excused_by_one_large_one() -> None:
    truth = np.ones(1000)
    theirs, ours = np.ones(1000, np.float32), np.full(1000, 1.001, np.float32)
    theirs[7] = 1.002
    assert not nearer(truth, theirs, ours, DType.FLOAT32).right


def test_every_float_of_the_sub_graph_becomes_a_double() -> None:
    x = np.random.default_rng(0).standard_normal(64).astype(np.float16)
    body = """(float16[64] x) => (double[64] y) {
      one = Constant <value = float[1] {1.0000001}> () wide = Cast <to = 1> (x) e = Erf(wide)
      half = Cast <to = 10> (e) back = Cast <to = 1> (half) s = Mul(back, one) y = Cast <to = 11> (s)
    }"""
    (found,) = in_doubles(ir.from_proto(model(body)), {"x": x})
    expected = [math.erf(value) * float(np.float32(1.0000001)) for value in x.astype(np.float64)]
    np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_what_cannot_be_computed_in_doubles_is_said() -> None:
    unknown = model("(float[4] x) => (float[4] y) { y = elsewhere.Mystery(x) }")
    unknown.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    with pytest.raises(NotInDoublesError, match="reference evaluator does not run it"):
        in_doubles(ir.from_proto(unknown), {"x": np.ones(4, np.float32)})
    with pytest.raises(NotInDoublesError, match="2 operators on 1000000000 elements"):
        many = np.broadcast_to(np.float32(1), (10**9,))
        in_doubles(
            ir.from_proto(model("(float[N] x) => (float[N] y) { z = Abs(x) y = Neg(z) }")), {"x": many}
        )


def test_a_kernel_that_is_nearer_stays_with_a_note_where_the_model_agrees(tmp_path: Path) -> None:
    """onnxruntime adds up the columns row by row; in what the model gives, that is not to be seen."""
    graph = Graph("decided")
    x = graph.op("Add", graph.op("Mul", graph.input("x", [2048, 64]), 0.1), 3.0)
    mean = graph.op("ReduceMean", x, COLUMNS)
    squared = graph.op("ReduceMean", graph.op("Mul", x, x), COLUMNS)
    found = graph.op("Sqrt", graph.op("Sub", squared, graph.op("Mul", mean, mean)))
    chosen = graph.op("MatMul", found, np.eye(64, dtype=np.float32))
    graph.output(graph.op("Greater", chosen, 0.05), "out", [1, 64], onnx.TensorProto.BOOL)
    onnx.save(graph.model(), tmp_path / "net.onnx")
    options = Options(measure=False, fuse_all=True, strict=True, cache_dir=tmp_path / "cache", threads=1)
    report = fuse(tmp_path / "net.onnx", options=options)
    (kernel,) = (k for k in report.kernels if "ReduceMean" in k.ops)
    assert kernel.accepted and "off from doubles by" in kernel.note
    assert kernel.note in explained(report)


def explained(report: Report) -> str:
    text = io.StringIO()
    render_explanation(report, Console(file=text, width=200))
    return text.getvalue()


def quantised_logits(off: float) -> onnx.ModelProto:
    """Means of numbers that are rounded to integers on the way, many of them from between two."""
    graph = Graph("logits")
    moved = graph.op("Add", graph.op("Mul", graph.input("x", [64, 64]), 1.0), off)
    scale, zero = np.array(0.1, np.float32), np.array(3, np.int8)
    integers = graph.op("QuantizeLinear", moved, scale, zero)
    numbers = graph.op("DequantizeLinear", integers, scale, zero)
    graph.output(graph.op("ReduceMean", numbers, np.array([1], np.int64)), "y", [64, 1])
    return graph.model()


@pytest.mark.parametrize("between", (True, False))
def test_a_model_may_be_off_by_what_its_own_results_move_where_inputs_do(between: bool) -> None:
    """Of numbers between two integers the last bit decides; of others it decides nothing."""
    random = np.random.default_rng(0)
    steps = random.integers(-60, 60, (64, 64)) + (0.5 if between else 0.1)
    one, other = (reference_session(quantised_logits(off)) for off in (0.0, 1e-7 if between else 0.045))
    verdict = verify(one, other, [{"x": (steps * 0.1).astype(np.float32)}], whole=True)
    assert verdict.passed is between
    told = verdict.note if between else verdict.problem
    assert "onnxruntime's own result moves where inputs move by their last bit" in told


def test_a_nan_in_the_place_of_an_infinity_is_counted() -> None:
    expected, found = np.array([np.inf, -np.inf, np.nan, 1.0]), np.array([np.nan, np.inf, np.nan, 1.0])
    assert compare("y", expected, found).problem == "y has NaN or infinity in other places (2 elements)"
