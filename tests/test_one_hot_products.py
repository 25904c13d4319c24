"""A product with a one-hot matrix is read from a table, and gives the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from apollo_fuse.running import run
from tests.fusing import fuse_to_session, op_types, reference_session, with_shapes
from tests.test_end_to_end import normal, text_model

TABLE = normal(5, 8)
TABLE[1, 2] = -0.0
WEIGHTS = {
    "w": TABLE,
    "turned": np.ascontiguousarray(TABLE.T),
    "b": normal(8),
    "numbers": np.arange(5),
    "in_rank_3": np.arange(5).reshape(1, 1, 5),
    "hot": np.array([0, 1], np.float32),
    "whole": np.array([0, 1]),
    "depth": np.array(5),
    "depths": np.array([5]),
}
INDEX = np.array([[0], [4], [-1], [5], [2], [1], [-5], [-6], [2**40]])


def model_of(body: str, x: str = "int64[N, 1]", **weights: np.ndarray) -> onnx.ModelProto:
    return text_model(f"g ({x} x) => (float[] y) {{ {body} }}", **(WEIGHTS | weights))


def assert_same_bits(clean: ir.Model, model: onnx.ModelProto, x: np.ndarray) -> None:
    expects, finds = (reference_session(m) for m in (model, ir.to_proto(clean)))
    (expected,), (found,) = (run(session, {"x": x}) for session in (expects, finds))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    np.testing.assert_array_equal(np.signbit(np.asarray(found)), np.signbit(np.asarray(expected)))


COMPARED = "e = Equal(x, numbers) c = Cast <to = 1> (e) y = MatMul(c, w)"
READ = {
    "a comparison": COMPARED,
    "a comparison the other way round": "e = Equal(numbers, x) c = Cast <to = 1> (e) y = MatMul(c, w)",
    "a bias": "e = Equal(x, numbers) c = Cast <to = 1> (e) y = Gemm(c, w, b)",
    "weights that are turned": "e = Equal(x, numbers) c = Cast <to = 1> (e) "
    "y = Gemm <transB = 1> (c, turned, b)",
    "OneHot": "s = Squeeze(x, last) c = OneHot(s, depth, hot) y = MatMul(c, w)",
    "OneHot of integers": "s = Squeeze(x, last) c = OneHot(s, depths, whole) d = Cast <to = 1> (c) "
    "y = Gemm(d, w, b)",
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_rows_are_read(name: str, tmp_path: Path) -> None:
    model = model_of(READ[name], last=np.array([-1]))
    clean = with_shapes(model, tmp_path)
    assert "Gather" in op_types(clean)
    assert not {"MatMul", "Gemm", "OneHot", "Equal"} & set(op_types(clean))
    assert_same_bits(clean, model, INDEX)
    assert_same_bits(clean, model, INDEX[:0])


@pytest.mark.parametrize("name", ["uint8", "int32", "int64"])
def test_an_index_may_be_of_any_integer_type(name: str, tmp_path: Path) -> None:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(name))
    body = f"s = Cast <to = {kind}> (x) {COMPARED.replace('x,', 's,')}"
    model = model_of(body, numbers=np.arange(5).astype(name))
    clean = with_shapes(model, tmp_path)
    assert "MatMul" not in op_types(clean)
    assert_same_bits(clean, model, INDEX[:-1])


def test_an_index_may_have_more_axes(tmp_path: Path) -> None:
    model = model_of(COMPARED.replace("numbers", "in_rank_3"), "int64[N, T, 1]")
    clean = with_shapes(model, tmp_path)
    assert "MatMul" not in op_types(clean)
    assert_same_bits(clean, model, INDEX.reshape(3, 3, 1))


def test_a_matrix_that_is_needed_besides_stays(tmp_path: Path) -> None:
    model = model_of(
        "e = Equal(x, numbers) c = Cast <to = 1> (e) m = MatMul(c, w) s = ReduceSum(c) y = Mul(m, s)"
    )
    clean = with_shapes(model, tmp_path)
    assert {"Gather", "Equal"} <= set(op_types(clean)) and "MatMul" not in op_types(clean)
    assert_same_bits(clean, model, INDEX)


INFINITE = TABLE.copy()
INFINITE[3, 3] = np.inf
LEFT = {
    "weights that are not finite": (COMPARED, {"w": INFINITE}),
    "other numbers": (COMPARED, {"numbers": np.array([0, 1, 2, 4, 3])}),
    "another one": ("c = OneHot(s, depth, hot) y = MatMul(c, w)", {"hot": np.array([0, 2], np.float32)}),
    "another depth": ("c = OneHot(s, depth, hot) d = Pad(c, wider) y = MatMul(d, w)", {"depth": np.array(3)}),
    "another axis": ("c = OneHot <axis = 0> (s, depth, hot) y = MatMul(w2, c)", {"w2": normal(3, 5)}),
    "half of a product": ("e = Equal(x, numbers) c = Cast <to = 1> (e) y = Gemm <alpha = 0.5> (c, w)", {}),
    "a batch of weights": (COMPARED, {"w": TABLE.reshape(1, 5, 8)}),
}


@pytest.mark.parametrize("name", LEFT)
def test_other_products_stay(name: str, tmp_path: Path) -> None:
    body, weights = LEFT[name]
    extra = {"last": np.array([-1]), "wider": np.array([0, 0, 0, 2])}
    model = model_of(f"s = Squeeze(x, last) {body}", **weights, **extra)
    clean = with_shapes(model, tmp_path)
    assert {"MatMul", "Gemm"} & set(op_types(clean))
    assert_same_bits(clean, model, INDEX)


@pytest.mark.parametrize("sizes", ["N, 5", "N, M"])
def test_rows_of_several_ones_are_multiplied(sizes: str, tmp_path: Path) -> None:
    model = model_of(COMPARED, f"int64[{sizes}]")
    clean = with_shapes(model, tmp_path)
    assert "MatMul" in op_types(clean)
    assert_same_bits(clean, model, np.tile(np.arange(5), (3, 1)))


def test_weights_that_a_caller_may_replace_are_multiplied(tmp_path: Path) -> None:
    model = text_model(f"g (int64[N, 1] x, float[5, 8] w) => (float[] y) {{ {COMPARED} }}", **WEIGHTS)
    assert "MatMul" in op_types(with_shapes(model, tmp_path))


def test_an_index_may_be_read_so_itself(tmp_path: Path) -> None:
    model = text_model(
        "g (int64[N] x) => (float[N, 8] y) { c = OneHot(x, depth, whole) q = MatMul(c, places) "
        "e = Equal(q, numbers) f = Cast <to = 1> (e) y = MatMul(f, w) }",
        **WEIGHTS,
        places=np.array([[4], [2], [0], [1], [7]]),
    )
    clean = with_shapes(model, tmp_path)
    assert "OneHot" not in op_types(clean)
    assert_same_bits(clean, model, INDEX[:, 0])


def test_results_keep_the_shape_that_the_model_states(tmp_path: Path) -> None:
    model = text_model(f"g (int64[N, 1] x) => (float[3, 8] y) {{ {COMPARED} }}", **WEIGHTS)
    clean = with_shapes(model, tmp_path)
    assert "MatMul" not in op_types(clean)
    assert clean.graph.outputs[0].shape == (3, 8)


def test_a_table_of_nothing_stays(tmp_path: Path) -> None:
    model = model_of(COMPARED, numbers=np.zeros(0, np.int64), w=np.zeros((0, 8), np.float32))
    assert_same_bits(with_shapes(model, tmp_path), model, INDEX)


def test_older_opsets_are_left_alone(tmp_path: Path) -> None:
    model = text_model(f"g (int64[N, 1] x) => (float[] y) {{ {COMPARED} }}", 11, **WEIGHTS)
    assert "MatMul" in op_types(with_shapes(model, tmp_path))


def test_the_kernels_read_the_rows_too(cache: Path, tmp_path: Path) -> None:
    """In a branch as well, of which a model may have several."""
    model = text_model(
        "g (int64[N, 1] x, bool c) => (float[N, 8] y, float[N, 8] z) { "
        "e = Equal(x, numbers) h = Cast <to = 1> (e) m = MatMul(h, w) a = Add(m, b) y = Tanh(a) "
        "z = If (c) <then_branch = t () => (float[N, 8] r) "
        "{ f = Equal(x, numbers) k = Cast <to = 1> (f) l = Gemm(k, w, b) r = Exp(l) }, "
        "else_branch = o () => (float[N, 8] r) { r = Neg(y) }> }",
        **WEIGHTS,
    )
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (9, 1)})
    assert not {"MatMul", "Gemm"} & set(fused.unfused_nodes)
    for condition in (True, False):
        for expected, found in fused.run({"x": INDEX, "c": np.array(condition)}).values():
            np.testing.assert_allclose(found, expected, rtol=1e-6)
