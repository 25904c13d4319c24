"""Reductions and what is computed from them, row by row, in one kernel: scopes, budgets, lengths of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from apollo_fuse import onnx_io
from apollo_fuse.kernel import Compute, KernelGroup, Scope, walk
from apollo_fuse.measure import session_options
from apollo_fuse.options import Options
from apollo_fuse.passes.split_reductions import PARTS
from models import chains, memory_bound
from models.writing import LAST_AXIS, Graph
from tests.fusing import fuse_to_session, planned, reference_session
from tests.test_end_to_end import text_model

Build = Callable[[], onnx.ModelProto]
Array = np.ndarray
EVERY_AXIS = np.array([0, 1], np.int64)


def group_of(model: onnx.ModelProto, folder: Path) -> KernelGroup:
    (candidate,) = planned(model, folder, Options()).candidates
    return candidate.group


def shared_of(group: KernelGroup) -> list[str | None]:
    """The hosts of the SHARED buffers of all kernels, None for one with memory of its own."""
    return [b.host for kernel in group.kernels for b in kernel.buffers if b.scope is Scope.SHARED]


def softmax_chain(rows: int, columns: int) -> onnx.ModelProto:
    """The softmax of the softmax of a softmax."""
    graph = Graph("softmax_chain")
    value = graph.input("x", [rows, columns])
    for _ in range(3):
        exponential = graph.op("Exp", graph.op("Sub", value, graph.op("ReduceMax", value, LAST_AXIS)))
        value = graph.op("Div", exponential, graph.op("ReduceSum", exponential, LAST_AXIS))
    graph.output(value, "out", [rows, columns])
    return graph.model()


def normalised(rows: int, columns: int, functions: tuple[str, ...]) -> onnx.ModelProto:
    """The functions of x in a row, and their results divided by the sum of the row."""
    graph = Graph("normalised")
    value = graph.input("x", [rows, columns])
    for function in functions:
        value = graph.op(function, value)
    result = graph.op("Div", value, graph.op("ReduceSum", value, LAST_AXIS))
    graph.output(result, "out", [rows, columns])
    return graph.model()


def mean_of_squares(rows: int | str, columns: int | str) -> onnx.ModelProto:
    graph = Graph("mean_of_squares")
    x = graph.input("x", [rows, columns])
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), EVERY_AXIS, keepdims=0)
    graph.output(mean, "out", [])
    return graph.model()


def clipped_by_norm(length: int) -> onnx.ModelProto:
    """A gradient divided by its norm where that is above 1, as optimisers do it."""
    graph = Graph("clipped_by_norm")
    x = graph.input("x", [length])
    norm = graph.op("Sqrt", graph.op("ReduceSum", graph.op("Mul", x, x), np.array([0], np.int64)))
    graph.output(graph.op("Div", x, graph.op("Max", norm, 1.0)), "out", [length])
    return graph.model()


def standardised(*shape: int | str) -> onnx.ModelProto:
    """Everything at a distance from the one mean, by the one deviation."""
    graph = Graph("standardised")
    x = graph.input("x", list(shape))
    every = np.arange(len(shape))
    centred = graph.op("Sub", x, graph.op("ReduceMean", x, every))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), every)
    graph.output(graph.op("Div", centred, graph.op("Sqrt", variance)), "out", list(shape))
    return graph.model()


def column_sums(rows: int, columns: int) -> onnx.ModelProto:
    """The gradient of a bias."""
    graph = Graph("column_sums")
    x = graph.input("x", [rows, columns])
    sums = graph.op("ReduceSum", graph.op("Mul", x, 2.0), np.array([0], np.int64), keepdims=0)
    graph.output(sums, "out", [columns])
    return graph.model()


def greatest(length: int) -> onnx.ModelProto:
    graph = Graph("greatest")
    x = graph.input("x", [1, length])
    graph.output(graph.op("ReduceMax", graph.op("Neg", x), LAST_AXIS, keepdims=0), "out", [1])
    return graph.model()


def one_hot_loss(rows: int, classes: int) -> onnx.ModelProto:
    """The cross entropy with the labels as rows of a unit matrix, as older exporters write it."""
    graph = Graph("one_hot_loss")
    x = graph.input("x", [rows, classes])
    target = graph.input("target", [rows, classes])
    shifted = graph.op("Sub", x, graph.op("ReduceMax", x, LAST_AXIS))
    total = graph.op("ReduceSum", graph.op("Exp", shifted), LAST_AXIS)
    logs = graph.op("Sub", shifted, graph.op("Log", total))
    chosen = graph.op("ReduceSum", graph.op("Mul", logs, target), LAST_AXIS, keepdims=0)
    loss = graph.op("Neg", graph.op("ReduceMean", chosen, np.array([0], np.int64), keepdims=0))
    graph.output(loss, "out", [])
    return graph.model()


ONE_KERNEL: dict[str, Build] = {
    "softmax": memory_bound.softmax,
    "log_softmax": chains.log_softmax,
    "masked_softmax": chains.masked_softmax,
    "softmax of any extents": partial(memory_bound.softmax, "rows", "columns"),
    "layernorm": memory_bound.layernorm,
    "rmsnorm": memory_bound.rmsnorm,
    "group_norm": chains.group_norm,
    "group_norm of any batch": partial(chains.group_norm, "batch"),
    "group_norm with a channel each": partial(chains.group_norm, groups=64),
    "cross_entropy": chains.cross_entropy,
    "cross_entropy of any batch": partial(chains.cross_entropy, "batch", 1000),
    "one_hot_loss": partial(one_hot_loss, 64, 1000),
    "batch_norm_training": chains.batch_norm_training,
    "long softmax": partial(memory_bound.softmax, 4, 1_000_000),
    "long log_softmax": partial(chains.log_softmax, 4, 1_000_000),
    "long layernorm": partial(memory_bound.layernorm, 1, 2_000_000),
    "a norm over everything": partial(clipped_by_norm, 3_000_001),
    "a mean over everything": partial(mean_of_squares, 4000, 1000),
    "a variance over four axes": partial(standardised, 8, 16, 20, 30),
    "a variance over five open axes": partial(standardised, *"abcde"),
}


@pytest.mark.parametrize("name", ONE_KERNEL)
def test_a_chain_of_reductions_is_one_operator(name: str, tmp_path: Path) -> None:
    found = planned(ONE_KERNEL[name](), tmp_path, Options())
    assert len(found.candidates) == 1
    made = found.candidates[0].micro_graph.operators
    nodes = len(onnx_io.load_clean(tmp_path / "model.onnx", tmp_path).graph)
    assert len(made) == nodes


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 2), (3, 16, 20, 30)])
def test_reductions_over_four_open_axes_are_right(
    shape: tuple[int, ...], tmp_path: Path, cache: Path
) -> None:
    fused = fuse_to_session(standardised(*"abcd"), tmp_path, cache, shapes={"x": (2, 8, 9, 10)})
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (expected, found), *_ = fused.run({"x": x}).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def pooled_and_normalised(channels: int, length: int) -> onnx.ModelProto:
    """The greatest Tanh of each channel, then a normalisation over the channels."""
    graph = Graph("pooled_and_normalised")
    x = graph.input("x", ["N", channels, length])
    pooled = graph.op("ReduceMax", graph.op("Tanh", x), LAST_AXIS, keepdims=0)
    centred = graph.op("Sub", pooled, graph.op("ReduceMean", pooled, LAST_AXIS))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), LAST_AXIS)
    graph.output(graph.op("Div", centred, graph.op("Sqrt", variance)), "out", ["N", channels])
    return graph.model()


def test_a_reduction_inside_the_loop_of_another_is_added_up_in_a_register(
    tmp_path: Path, cache: Path
) -> None:
    """What the outer one keeps of it goes to memory once, and lanes share an accumulator."""
    model = pooled_and_normalised(24, 50)
    (kernel,) = group_of(model, tmp_path).kernels
    kept = {b.name for b in kernel.buffers if b.scope is Scope.SHARED}
    combined = {
        t.buffer for s in walk(kernel.body) if isinstance(s, Compute) and s.combine for t in s.targets
    }
    assert kept and not kept & combined
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (2, 24, 50)})
    x = np.random.default_rng(0).standard_normal((3, 24, 50)).astype(np.float32)
    ((expected, found),) = fused.run({"x": x}).values()
    pooled = np.tanh(x.astype(np.float64)).max(-1)
    exact = (pooled - pooled.mean(-1, keepdims=True)) / pooled.std(-1, keepdims=True)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=5e-5)  # the last bits of a tanh, over deviations of 0.02
    x[1, 4, 17] = np.nan
    ((_, found),) = fused.run({"x": x}).values()
    assert np.isnan(found[1]).all() and not np.isnan(found[[0, 2]]).any()


def test_what_several_loops_need_is_computed_in_the_first(tmp_path: Path) -> None:
    """A mask is added to the scores once, for the maximum and for the exponentials."""
    model = text_model(
        """g (float[N, 50] x, int64[N, 50] mask) => (float[N, 50] y) {
        f = Cast <to = 1> (mask) o = Sub(one, f) b = Mul(o, much) d = Div(x, scale) s = Add(d, b)
        y = Softmax <axis = -1> (s) }""",
        one=np.array(1, np.float32),
        much=np.array(-10000, np.float32),
        scale=np.array(8, np.float32),
    )
    (kernel,) = group_of(model, tmp_path).kernels
    readers = [
        s
        for s in walk(kernel.body)
        if isinstance(s, Compute) and {"in0", "in1"} & {x.tensor for x in s.block.loads}
    ]
    assert len(readers) == 1


def test_buffers_whose_lifetimes_do_not_overlap_share_memory(tmp_path: Path) -> None:
    assert shared_of(group_of(softmax_chain(64, 1000), tmp_path)) == [None, None, "t1"]


def test_a_buffer_that_is_needed_longer_keeps_its_memory(tmp_path: Path) -> None:
    graph = Graph("kept")
    x = graph.input("x", [64, 1000])
    first = graph.op("Exp", x)
    second = graph.op("Exp", graph.op("Div", first, graph.op("ReduceSum", first, LAST_AXIS)))
    result = graph.op("Add", graph.op("Div", second, graph.op("ReduceSum", second, LAST_AXIS)), first)
    graph.output(result, "out", [64, 1000])
    assert set(shared_of(group_of(graph.model(), tmp_path))) == {None}


def test_a_long_row_lies_in_the_output_that_takes_its_place(tmp_path: Path) -> None:
    (kernel,) = group_of(memory_bound.softmax(64, 16384), tmp_path).kernels
    (buffer,) = (b for b in kernel.buffers if b.scope is Scope.SHARED)
    assert (buffer.host, str(buffer.base)) == ("out0", "16384*g0")
    assert str(kernel.shared_bytes) == "65536"


def test_what_overflows_is_computed_again_where_that_is_cheap(tmp_path: Path) -> None:
    group = group_of(memory_bound.softmax(64, 200_000), tmp_path)
    assert len(group.kernels) == 1
    assert not shared_of(group)


def test_only_as_much_is_computed_again_as_overflows(tmp_path: Path) -> None:
    """Two rows do not fit, and one does."""
    graph = Graph("two_rows")
    x = graph.input("x", [64, 40_000])
    first, second = graph.op("Exp", x), graph.op("Tanh", x)
    sums = graph.op("Add", graph.op("ReduceSum", first, LAST_AXIS), graph.op("ReduceSum", second, LAST_AXIS))
    graph.output(graph.op("Div", graph.op("Mul", first, second), sums), "out", [64, 40_000])
    assert len(shared_of(group_of(graph.model(), tmp_path))) == 1


def test_what_overflows_and_is_dear_passes_through_memory(tmp_path: Path) -> None:
    found = planned(normalised(64, 200_000, ("Sin", "Tanh", "Erf", "Cos", "Sigmoid")), tmp_path, Options())
    assert [r.refused.reason for r in found.rounds] == ["intermediates overflow on-chip memory"]
    short = planned(normalised(64, 2_000, ("Sin", "Tanh", "Erf", "Cos", "Sigmoid")), tmp_path, Options())
    assert not short.rounds
    assert len(short.candidates) == 1


def test_an_open_row_length_has_a_form_for_rows_that_fit_and_one_for_others(tmp_path: Path) -> None:
    group = group_of(memory_bound.softmax("rows", "columns"), tmp_path)
    assert [str(form) for form in group.forms] == ["4*n1 <= 262144"]
    by_form = [[b.scope for b in kernel.buffers] for kernel in group.kernels]
    assert [kernel.form for kernel in group.kernels] == [0, 1]
    assert Scope.SHARED in by_form[0]
    assert Scope.SHARED not in by_form[1]


def test_an_open_number_of_long_rows_is_split_only_where_they_are_few(tmp_path: Path) -> None:
    group = group_of(memory_bound.softmax("rows", 1_000_000), tmp_path)
    assert [str(form) for form in group.forms] == ["n0 <= 15"]
    assert [kernel.form for kernel in group.kernels] == [0, 0, 0, 1]
    assert all(extent.constant for value in group.temporaries for extent in value.shape)


@pytest.mark.parametrize("rows", [0, 1, 15, 16])
def test_an_open_number_of_long_rows_is_right_split_or_not(rows: int, tmp_path: Path, cache: Path) -> None:
    build = memory_bound.softmax("rows", 200_000)
    fused = fuse_to_session(build, tmp_path, cache, shapes={"x": [2, 200_000]})
    x = np.random.default_rng(0).standard_normal((rows, 200_000)).astype(np.float32)
    np.testing.assert_allclose(fused.fused.run(None, {"x": x})[0], softmax64(x), rtol=3e-5)


def test_what_is_kept_and_written_behind_a_split_reduction_has_two_names(tmp_path: Path, cache: Path) -> None:
    """A result that is an output and is read again is computed once for each, in one scope of the C text."""
    model = text_model(
        """g (float[1, 2, N] x, float[2, N] z) => (float[1, 2, N] y, float[1, 1] total, float[1, 1] positive)
        { a = Add(x, z) t = ReduceSum(a, axes) total = ReduceSum <keepdims = 0> (t, first)
          positive = Relu(total) y = Add(a, x) }""",
        axes=np.array([0, 1, 2], np.int64),
        first=np.array([0], np.int64),
    )
    assert len(group_of(model, tmp_path).forms) == 1
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (1, 2, 7), "z": (2, 7)})
    for length in (7, 3_000_000):
        values = np.random.default_rng(0).random((1, 2, length), np.float32)
        total = 2 * values.sum(dtype=np.float64).reshape(1, 1)
        results = fused.run({"x": values, "z": values[0]})
        for name in ("total", "positive"):
            np.testing.assert_allclose(results[name][1], total, rtol=1e-6)


def test_many_rows_are_not_split_and_few_short_ones_neither(tmp_path: Path) -> None:
    assert len(group_of(memory_bound.softmax(64, 200_000), tmp_path).kernels) == 1
    assert len(group_of(memory_bound.softmax(4, 1000), tmp_path).kernels) == 1


def test_few_long_rows_are_split_into_a_number_of_parts_that_lengths_alone_give(tmp_path: Path) -> None:
    group = group_of(memory_bound.softmax(4, 1_000_000), tmp_path)
    parts = [kernel.grid[-1].extent.constant for kernel in group.kernels]
    assert len(parts) == 3
    assert all(part is not None and 1 < part <= PARTS for part in parts)


def softmax64(x: Array) -> Array:
    wide = x.astype(np.float64)
    exponential = np.exp(wide - wide.max(-1, keepdims=True))
    return np.asarray(exponential / exponential.sum(-1, keepdims=True))


def log_softmax64(x: Array) -> Array:
    wide = x.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def layernorm64(x: Array) -> Array:
    """Without scale and bias."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5))


def plain_layernorm(rows: int | str, columns: int | str) -> onnx.ModelProto:
    graph = Graph("plain_layernorm")
    x = graph.input("x", [rows, columns])
    centred = graph.op("Sub", x, graph.op("ReduceMean", x, LAST_AXIS))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), LAST_AXIS)
    result = graph.op("Div", centred, graph.op("Sqrt", graph.op("Add", variance, 1e-5)))
    graph.output(result, "out", [rows, columns])
    return graph.model()


EXACT: dict[str, tuple[Callable[[int, int], onnx.ModelProto], Callable[[Array], Array], float]] = {
    "softmax": (memory_bound.softmax, softmax64, 1e-5),  # relative
    "log_softmax": (chains.log_softmax, log_softmax64, 1e-5),
    "layernorm": (plain_layernorm, layernorm64, 1e-3),  # of numbers near 0 too
}


@pytest.mark.parametrize("shape", [(3, 1), (3, 17), (5, 1000), (2, 100_003), (2, 400_003), (1, 1_000_003)])
@pytest.mark.parametrize("name", EXACT)
def test_rows_of_any_length_are_as_exact_as_doubles_let_expect(
    name: str, shape: tuple[int, int], tmp_path: Path, cache: Path
) -> None:
    build, exact, within = EXACT[name]
    fused = fuse_to_session(build(*shape), tmp_path, cache)
    assert not fused.unfused_nodes
    x = (3 * np.random.default_rng(0).standard_normal(shape) + 1).astype(np.float32)
    (found,) = fused.fused.run(None, {"x": x})
    expected = exact(x)
    np.testing.assert_allclose(found, expected, rtol=within, atol=1e-6 * np.abs(expected).max())


def test_a_variance_beside_a_large_mean_is_not_cancelled(tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(plain_layernorm(1, 1_000_003), tmp_path, cache)
    x = (1000 + np.random.default_rng(0).standard_normal((1, 1_000_003))).astype(np.float32)
    (found,) = fused.fused.run(None, {"x": x})
    assert np.abs(found - layernorm64(x)).max() < 1e-3


@pytest.mark.parametrize("columns", [0, 1, 63, 1000, 65_536, 65_537, 300_001])
def test_open_rows_of_every_length_are_right(columns: int, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(memory_bound.softmax("rows", "columns"), tmp_path, cache, shapes={"x": [4, 100]})
    x = np.random.default_rng(0).standard_normal((3, columns)).astype(np.float32)
    (found,) = fused.fused.run(None, {"x": x})
    expected = softmax64(x) if columns else np.zeros((3, 0))
    np.testing.assert_allclose(found, expected, rtol=3e-5)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (1000, 999), (2000, 1501)])
def test_a_mean_over_open_extents_is_right_split_or_not(
    shape: tuple[int, int], tmp_path: Path, cache: Path
) -> None:
    fused = fuse_to_session(mean_of_squares("rows", "columns"), tmp_path, cache, shapes={"x": [4, 100]})
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (found,) = fused.fused.run(None, {"x": x})
    with np.errstate(invalid="ignore"):
        expected = np.divide((x.astype(np.float64) ** 2).sum(), x.size)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


SPLIT: dict[str, Build] = {
    "softmax of one row": partial(memory_bound.softmax, 1, 2_000_003),
    "softmax of few rows": partial(memory_bound.softmax, 3, 700_001),
    "clipped by norm": partial(clipped_by_norm, 3_000_001),
    "mean over everything": partial(mean_of_squares, 1999, 2003),
    "column sums": partial(column_sums, 40_001, 70),
    "cross entropy": partial(chains.cross_entropy, 517, 1000),
}


def feeds_of(session: ort.InferenceSession) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    return {
        argument.name: (
            generator.integers(0, 1000, argument.shape)
            if argument.type == "tensor(int64)"
            else generator.standard_normal(argument.shape).astype(np.float32)
        )
        for argument in session.get_inputs()
    }


@pytest.mark.parametrize("name", SPLIT)
def test_split_reductions_do_not_depend_on_the_threads(name: str, tmp_path: Path, cache: Path) -> None:
    model = SPLIT[name]()
    fused = fuse_to_session(model, tmp_path, cache)
    assert not fused.unfused_nodes
    feeds = feeds_of(fused.fused)
    results: list[Array] = []
    for threads in (1, 2, 3, 5):
        options = session_options(threads)
        assert fused.report.library is not None
        options.register_custom_ops_library(str(fused.report.library))
        session = ort.InferenceSession(str(tmp_path / "fused.onnx"), options)
        results += [session.run(None, feeds)[0] for _ in range(3)]
    assert all(result.tobytes() == results[0].tobytes() for result in results)
    (expected,) = reference_session(model).run(None, feeds)
    np.testing.assert_allclose(results[0], expected, rtol=2e-3, atol=1e-6 * np.abs(expected).max())


def test_every_split_model_has_parts(tmp_path: Path) -> None:
    assert all(any("_part" in str(k) for k in group_of(b(), tmp_path).kernels) for b in SPLIT.values())


@pytest.mark.parametrize("columns", [1000, 700_001])
def test_nan_and_infinities_stay_in_their_rows(columns: int, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(memory_bound.softmax(5, columns), tmp_path, cache)
    x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
    x[0, columns // 2] = np.nan
    x[1, columns - 1] = np.inf
    x[2, : columns - 1] = -np.inf
    x[3] = -np.inf
    (found,) = fused.fused.run(None, {"x": x})
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1, -1])
    assert found[2, -1] == 1
    assert not found[2, :-1].any()
    assert np.isnan(found[3]).all()
    np.testing.assert_allclose(found[4], softmax64(x[4]), rtol=1e-5)


@pytest.mark.parametrize("length", [37, 4_000_003])
def test_maxima_pass_on_nan_infinities_and_the_sign_of_zero(length: int, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(greatest(length), tmp_path, cache)

    def result(value: float, elsewhere: float) -> Array:
        x = np.full((1, length), -elsewhere, np.float32)
        x[0, length // 3] = -value
        return np.asarray(fused.fused.run(None, {"x": x})[0][0])

    assert np.isnan(result(np.nan, 1.0))
    assert np.isnan(result(np.nan, np.inf))
    assert result(np.inf, 1.0) == np.inf
    assert result(-np.inf, -np.inf) == -np.inf
    assert np.signbit(result(-0.0, -0.0))
    assert result(2.0, -5.0) == 2
