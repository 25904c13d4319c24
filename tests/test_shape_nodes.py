"""What is known of shapes is not computed, and everything is as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from apollo_fuse.bodies import nodes
from apollo_fuse.layout import Layout, load_clean_at
from apollo_fuse.running import run
from tests.fusing import assert_computes_as, op_types, reference_session, with_shapes
from tests.test_end_to_end import normal, text_model

WEIGHTS = {
    "zero": np.array([0]),
    "one": np.array([1]),
    "two": np.array([2]),
    "eight": np.array([8]),
    "whole": np.array([16]),
    "half": np.array(0.5, np.float32),
}


def model_of(body: str, x: str = "N, T, 16", **weights: np.ndarray) -> onnx.ModelProto:
    return text_model(f"g (float[{x}] x) => (float[] y) {{ {body} }}", **WEIGHTS, **weights)


EXTENTS = """e{0} = Shape({0}) n{0} = Gather(e{0}, zero) t{0} = Gather(e{0}, one)"""
HEADS = f"{EXTENTS.format('x')} heads = Concat<axis = 0>(nx, tx, two, eight) h = Reshape(x, heads)"


def target_of(model: ir.Model) -> list[int]:
    (target,) = (n.inputs[1] for n in nodes(model.graph) if n.op_type == "Reshape")
    assert target is not None and target.const_value is not None
    return list(target.const_value.numpy())


def test_a_target_that_repeats_extents_is_a_constant(tmp_path: Path) -> None:
    model = model_of(f"{HEADS} y = Exp(h)")
    clean = with_shapes(model, tmp_path)
    assert op_types(clean) == {"Reshape": 1, "Exp": 1}
    assert target_of(clean) == [0, 0, 2, 8]
    assert_computes_as(clean, model, normal(3, 5, 16), normal(1, 1, 16), normal(0, 5, 16))


def test_one_other_extent_follows_from_numbers(tmp_path: Path) -> None:
    body = (
        f"{EXTENTS.format('x')} m = Mul(nx, tx) t = Concat<axis = 0>(m, whole) r = Reshape(x, t) y = Exp(r)"
    )
    clean = with_shapes(model_of(body), tmp_path)
    assert op_types(clean) == {"Reshape": 1, "Exp": 1} and target_of(clean) == [-1, 16]
    assert_computes_as(clean, model_of(body), normal(3, 5, 16), normal(0, 5, 16))


@pytest.mark.parametrize(
    "target", ["Concat<axis = 0>(nx, two, tx, eight)", "Concat<axis = 0>(tx, nx, two, eight)"]
)
def test_a_target_stays_where_an_extent_of_zero_would_leave_it_open(target: str, tmp_path: Path) -> None:
    """With a copied extent that may be zero, another one does not follow."""
    model = model_of(f"{EXTENTS.format('x')} t = {target} r = Reshape(x, t) y = Exp(r)")
    clean = with_shapes(model, tmp_path)
    assert op_types(clean)["Concat"] == 1
    assert_computes_as(clean, model, normal(3, 5, 16))


def test_zeros_that_mean_zero_stay(tmp_path: Path) -> None:
    model = model_of(f"{HEADS.replace('Reshape', 'Reshape<allowzero = 1>')} y = Exp(h)")
    clean = with_shapes(model, tmp_path)
    assert op_types(clean)["Concat"] == 1
    assert_computes_as(clean, model, normal(3, 5, 16), normal(0, 5, 16))


def test_equal_extents_are_asked_for_once(tmp_path: Path) -> None:
    """Of each of three tensors, to expand something to them."""
    body = "a = Exp(x) b = Neg(a) " + " ".join(
        f"{EXTENTS.format(v)} s{v} = Concat<axis = 0>(t{v}, n{v}) z{v} = Expand(half, s{v})" for v in "xab"
    )
    model = model_of(
        f"""{body} p = Add(zx, za) q = Add(p, zb) r = Transpose<perm = [1, 0]>(q)
        u = Unsqueeze(r, two) y = Mul(b, u)"""
    )
    before, clean = rewritten_count(model, tmp_path), with_shapes(model, tmp_path)
    assert before["Shape"] == 3
    assert (op_types(clean)["Shape"], op_types(clean)["Gather"], op_types(clean)["Concat"]) == (1, 2, 1)
    assert_computes_as(clean, model, normal(3, 5, 16), normal(1, 7, 16))


def rewritten_count(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    onnx.save(model, folder / "model.onnx")
    return op_types(load_clean_at(folder / "model.onnx", Layout.PORTABLE, folder))


def test_what_is_returned_is_computed(tmp_path: Path) -> None:
    model = text_model(
        """g (float[N, 16] x) => (int64[2] y, int64[2] z)
        { a = Exp(x) y = Shape(x) z = Shape(a) }"""
    )
    clean = with_shapes(model, tmp_path)
    assert [value.name for value in clean.graph.outputs] == ["y", "z"]
    expected, found = (run(reference_session(m), {"x": normal(3, 16)}) for m in (model, ir.to_proto(clean)))
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))  # type: ignore[arg-type]


GRU = {"w": normal(1, 12, 16), "r": normal(1, 12, 4), "four": np.array([4])}


@pytest.mark.parametrize(
    ("filled", "kept"), [("", 0), ("<value = float[1] {0}>", 0), ("<value = float[1] {2}>", 1)]
)
def test_a_state_of_zeros_is_none(filled: str, kept: int, tmp_path: Path) -> None:
    """The sequence comes first, then the batch."""
    body = f"""{EXTENTS.format("x")} s = Concat<axis = 0>(one, tx, four) h = ConstantOfShape{filled}(s)
        all, last = GRU<hidden_size = 4>(x, w, r, , , h) y = Exp(last)"""
    model = model_of(body, **GRU)
    clean = with_shapes(model, tmp_path)
    assert op_types(clean)["ConstantOfShape"] == kept
    assert_computes_as(clean, model, normal(6, 2, 16), normal(1, 1, 16))


def test_a_long_memory_has_two_states(tmp_path: Path) -> None:
    weights: Mapping[str, np.ndarray] = {"w": normal(1, 8, 16), "r": normal(1, 8, 2)}
    body = f"""{EXTENTS.format("x")} s = Concat<axis = 0>(one, tx, two) h = ConstantOfShape(s)
        c = ConstantOfShape<value = float[1] {{1}}>(s)
        all, last, cell = LSTM<hidden_size = 2>(x, w, r, , , h, c) y = Add(last, cell)"""
    model = model_of(body, **weights)
    clean = with_shapes(model, tmp_path)
    (lstm,) = (n for n in nodes(clean.graph) if n.op_type == "LSTM")
    assert lstm.inputs[5] is None and lstm.inputs[6] is not None
    assert_computes_as(clean, model, normal(6, 2, 16))


def test_in_bodies_too(tmp_path: Path) -> None:
    """A body asks for itself."""
    model = model_of(
        f"""m = ReduceMean<keepdims = 0>(x) c = Greater(m, half) y = If (c)
        <then_branch = p () => (float[] b) {{ {HEADS} b = Exp(h) }}, else_branch = q () => (float[] d)
        {{ k = Neg(x) d = Unsqueeze(k, two) }}>"""
    )
    clean = with_shapes(model, tmp_path)
    assert op_types(clean)["Concat"] == 0 and op_types(clean)["If"] == 1
    assert_computes_as(clean, model, normal(3, 5, 16))
