"""The bodies of If, Loop and Scan are fused inside, and compute what they computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import models
from apollo_fuse.tolerance import compare
from tests.fusing import Fused, fuse_to_session, nodes_of
from tests.test_end_to_end import normal, text_model

Feeds = Mapping[str, np.ndarray]
Fuse = Callable[..., Fused]

X = normal(5, 64)
YES, NO = np.array(True), np.array(False)
IN = "float[N, 64] x, bool c"


@pytest.fixture
def fuse(cache: Path, tmp_path: Path) -> Fuse:
    def run(model: onnx.ModelProto, **shapes: tuple[int, ...]) -> Fused:
        return fuse_to_session(model, tmp_path, cache, shapes={"x": (5, 64)} | shapes)

    return run


def times(count: int) -> np.ndarray:
    return np.array(count)


def kernels(fused: Fused) -> list[str]:
    """Kernels of the model and the bodies in it."""
    graph = onnx.load(fused.report.output).graph
    return [node.op_type for node in nodes_of(graph) if node.domain == "apollo_fuse"]


def assert_same(fused: Fused, *cases: Feeds) -> None:
    """The fused model is valid, and computes the same with its kernels and with its functions."""
    path = fused.report.output
    onnx.checker.check_model(str(path), full_check=True)
    functions = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for feeds in cases:
        without = functions.run(None, dict(feeds))
        for place, (name, (expected, found)) in enumerate(fused.run(feeds).items()):
            if expected.dtype == object:
                assert expected.tolist() == found.tolist() == without[place].tolist()
                continue
            assert not compare(name, expected, found).problem
            assert not compare(name, expected, np.asarray(without[place])).problem


# -- If -----------------------------------------------------------------------------------------------

BOTH = text_model(
    f"g ({IN}) => (float[N, 64] y) {{ h = Mul(x, w) y0 = If (c) <"
    "then_branch = a () => (float[N, 64] r) { t = Mul(h, w) u = Tanh(t) r = Add(u, h) }, "
    "else_branch = b () => (float[N, 64] r) { t = Exp(h) u = ReduceSum(t, axis) r = Div(t, u) }> "
    "y = Neg(y0) }",
    w=normal(64),
    axis=np.array([-1]),
)
"""Its branches use the same names, and both read what is computed outside."""


def test_both_branches_are_fused_whichever_runs(fuse: Fuse) -> None:
    fused = fuse(BOTH)
    assert fused.unfused_nodes == ("If",)
    assert len(kernels(fused)) == 4
    assert_same(fused, {"x": X, "c": YES}, {"x": X, "c": NO}, {"x": normal(3, 64), "c": NO})


# -- Loop ---------------------------------------------------------------------------------------------

LOOP = text_model(
    "g (float[N, 64] x, int64 n, bool c) => (float[N, 64] y, float[T, N, 64] o) { "
    "y, all = Loop (n, c, x) <body = b (int64 i, bool go, float[N, 64] s) => "
    "(bool more, float[N, 64] r, float[N, 64] q) "
    "{ more = Identity(go) a = Mul(s, x) d = Tanh(a) r = Add(d, s) e = Exp(d) q = Sub(e, x) }> "
    "p = Abs(all) o = Mul(p, all) }"
)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_loop_carries_and_stacks_what_it_did(fuse: Fuse, count: int) -> None:
    fused = fuse(LOOP)
    assert set(fused.unfused_nodes) <= {"Loop", "Identity"}
    assert_same(fused, {"x": X, "n": times(count), "c": YES}, {"x": normal(2, 64), "n": times(2), "c": YES})


GROWING = text_model(
    "g (float[N, 64] x, int64 n, bool c) => (float[M, 64] y) { "
    "z = Loop (n, c, x) <body = b (int64 i, bool go, s) => (bool more, r) "
    "{ more = Identity(go) a = Mul(s, s) d = Tanh(a) r = Concat <axis = 0> (d, x) }> "
    "e = Exp(z) y = Mul(e, z) }"
)


def test_what_a_loop_carries_may_grow(fuse: Fuse) -> None:
    fused = fuse(GROWING)
    assert kernels(fused)
    assert_same(fused, *({"x": X, "n": times(count), "c": YES} for count in (0, 1, 4)))


def test_a_loop_may_end_by_its_own_condition(fuse: Fuse) -> None:
    fused = fuse(
        text_model(
            "g (float[N, 64] x, float limit) => (float[N, 64] y, float[T, N, 64] all) { "
            "y, all = Loop ( , , x) <body = b (int64 i, bool go, float[N, 64] s) => "
            "(bool more, float[N, 64] r, float[N, 64] q) { d = Exp(s) e = Tanh(d) r = Add(e, s) "
            "m = ReduceMax <keepdims = 0> (r) more = Less(m, limit) q = Mul(r, r) }> }"
        )
    )
    assert kernels(fused)
    assert_same(fused, *({"x": X, "limit": np.array(limit, np.float32)} for limit in (-9, 4, 6)))


def test_a_loop_may_carry_what_changes_its_rank(fuse: Fuse) -> None:
    fused = fuse(
        text_model(
            "g (float[N, 64] x, int64 n, bool c) => (float[] y) { "
            "z = Loop (n, c, x) <body = b (int64 i, bool go, s) => (bool more, r) "
            "{ more = Identity(go) a = Mul(s, s) d = Tanh(a) r = Unsqueeze(d, axis) }> "
            "y = Neg(z) }",
            axis=np.array([0]),
        )
    )
    feeds = [{"x": X, "n": times(count), "c": YES} for count in (0, 1, 3)]
    for case in feeds:
        for name, (expected, found) in fused.run(case).items():
            assert not compare(name, expected, found).problem


# -- Scan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("backwards", [0, 1])
def test_a_scan_sees_the_slices_it_saw(fuse: Fuse, axis: int, backwards: int) -> None:
    sizes = "T, N, 64" if axis == 0 else "N, T, 64"
    fused = fuse(
        text_model(
            f"g (float[{sizes}] x, float[N, 64] s0) => (float[N, 64] y, float[{sizes}] all) {{ "
            f"y, all = Scan <num_scan_inputs = 1, scan_input_axes = [{axis}], scan_output_axes = [{axis}], "
            f"scan_input_directions = [{backwards}], body = b (float[N, 64] s, float[N, 64] e) => "
            "(float[N, 64] r, float[N, 64] q) "
            "{ t = Mul(s, e) u = Tanh(t) r = Add(u, e) q = Exp(u) }> (s0, x) }"
        ),
        x=(4, 5, 64) if axis == 0 else (5, 4, 64),
        s0=(5, 64),
    )
    assert fused.unfused_nodes == ("Scan",)
    first = {"x": normal(4, 5, 64) if axis == 0 else normal(5, 4, 64), "s0": X}
    other = {"x": normal(2, 2, 64), "s0": normal(2, 64)}
    assert_same(fused, first, other)


def test_a_scan_over_numbers_sees_one_after_the_other(fuse: Fuse) -> None:
    fused = fuse(
        text_model(
            "g (float[T] x, float[64] s0) => (float[64] y) { y = Scan <num_scan_inputs = 1, "
            "body = b (float[64] s, float e) => (float[64] r) { t = Mul(s, e) r = Tanh(t) }> (s0, x) }"
        ),
        x=(4,),
        s0=(64,),
    )
    assert fused.unfused_nodes == ("Scan",)
    assert_same(fused, {"x": normal(4), "s0": normal(64)})


def test_the_body_of_a_scan_over_batches_is_left_alone(fuse: Fuse) -> None:
    fused = fuse(
        text_model(
            "g (float[B, T, 64] x, float[B, 64] x0) => (float[B, 64] y, float[B, T, 64] all) { "
            "h = Tanh(x) k = Neg(h) y0, all0 = Scan <num_scan_inputs = 1, "
            "body = b (float[64] s, float[64] e) => (float[64] r, float[64] q) "
            "{ t = Mul(s, e) r = Add(t, e) q = Exp(r) }> ( , x0, k) y = Neg(y0) all = Abs(all0) }",
            opset=8,
        ),
        x=(2, 3, 64),
        x0=(2, 64),
    )
    assert len(kernels(fused)) == 1 and "Mul" in fused.unfused_nodes
    assert_same(fused, {"x": normal(2, 3, 64), "x0": normal(2, 64)})


# -- bodies in bodies ---------------------------------------------------------------------------------

NESTED = text_model(
    "g (float[N, 64] x, int64 n, bool c) => (float[N, 64] y) { h = Abs(x) "
    "z = Loop (n, c, x) <body = b (int64 i, bool go, float[N, 64] s) => (bool more, float[N, 64] r) "
    "{ more = Identity(go) one = Constant <value_int = 1> () odd = Mod(i, two) o = Equal(odd, one) "
    "k = Mul(s, w) l = Add(k, h) "
    "r = If (o) <then_branch = p () => (float[N, 64] v) { t = Mul(l, s) v = Tanh(t) }, "
    "else_branch = q () => (float[N, 64] v) { "
    "v = Loop (two, , l) <body = d (int64 j, bool on, float[N, 64] a) => (bool again, float[N, 64] e) "
    "{ again = Identity(on) f = Sub(a, h) g2 = Sigmoid(f) e = Mul(g2, s) }> }> }> "
    "y = Neg(z) }",
    two=np.array(2),
    w=normal(64),
)


def test_bodies_in_bodies_read_from_all_graphs_around_them(fuse: Fuse) -> None:
    fused = fuse(NESTED)
    assert len(kernels(fused)) >= 5
    assert_same(fused, *({"x": X, "n": times(count), "c": YES} for count in (0, 1, 2, 3)))


# -- what may lie around and in a body ----------------------------------------------------------------

ODD = {
    "a body that hands on what it gets": text_model(
        "g (float[N, 64] x, int64 n, bool c) => (float[N, 64] y) { h = Exp(x) k = Neg(h) "
        "z = Loop (n, c, k) <body = b (int64 i, bool go, float[N, 64] s) => (bool go, float[N, 64] s) { }> "
        "t = Abs(z) y = Sub(t, x) }"
    ),
    "bodies of Identity alone": text_model(
        f"g ({IN}) => (float[N, 64] y) {{ h = Exp(x) z = If (c) <"
        "then_branch = a () => (float[N, 64] r) { r = Identity(h) }, "
        "else_branch = b () => (float[N, 64] r) { r = Identity(x) }> t = Abs(z) y = Sub(t, x) }"
    ),
    "one value twice among the inputs and the results": text_model(
        "g (float[N, 64] x, int64 n, bool c) => (float[N, 64] y, float[N, 64] z, float[T, N, 64] all) { "
        "y, z, all = Loop (n, c, x, x) <body = b (int64 i, bool go, float[N, 64] s, float[N, 64] t) => "
        "(bool more, float[N, 64] r, float[N, 64] q, float[N, 64] r) "
        "{ more = Identity(go) a = Mul(s, s) r = Sub(a, t) d = Add(r, r) q = Tanh(d) }> }"
    ),
    "an output that is used inside": text_model(
        f"g ({IN}) => (float[N, 64] y, float[N, 64] h) {{ g0 = Exp(x) h = Neg(g0) y = If (c) <"
        "then_branch = a () => (float[N, 64] r) { t = Mul(h, x) r = Tanh(t) }, "
        "else_branch = b () => (float[N, 64] r) { t = Mul(h, h) r = Abs(t) }> }"
    ),
    "results that nothing uses": text_model(
        f"g ({IN}) => (float[N, 64] y) {{ y, unused = If (c) <"
        "then_branch = a () => (float[N, 64] r, float[N, 64] q) "
        "{ t = Mul(x, x) r = Tanh(t) q = Exp(r) u = Neg(q) }, "
        "else_branch = b () => (float[N, 64] r, float[N, 64] q) { q = Neg(x) r = Abs(q) }> }"
    ),
    "optional inputs and outputs": text_model(
        f"g ({IN}, float top) => (float[N, 1] y) {{ y = If (c) <"
        "then_branch = a () => (float[N, 1] r) { t = Clip(x, , top) u = Exp(t) r, i = TopK(u, one) }, "
        "else_branch = b () => (float[N, 1] r) { t = Mul(x, x) u = Clip(t, top) v = Neg(u) "
        "w, , j = LayerNormalization(v, h) k, i = TopK(w, one) r = Mul(k, j) }> }",
        one=np.array([1]),
        h=normal(64),
    ),
    "strings and sequences": text_model(
        f"g ({IN}) => (float[M, 64] y, string[1] label) {{ h = Exp(x) k = Neg(h) s = SequenceConstruct(h, k) "
        "y, label = If (c) <then_branch = a () => (float[M, 64] r, string[1] l) "
        "{ t = SequenceAt(s, zero) u = Mul(t, h) v = Tanh(u) e = SequenceInsert(s, v) "
        "r = ConcatFromSequence <axis = 0> (e) l = Identity(yes) }, "
        "else_branch = b () => (float[M, 64] r, string[1] l) "
        "{ t = Mul(x, h) r = Tanh(t) l = Identity(no) }> }",
        zero=np.array(0),
        yes=np.array(["yes"], object),
        no=np.array(["no"], object),
    ),
    "a loop over a sequence": text_model(
        "g (float[N, 64] x, int64 n, bool c) => (float[M, 64] y) { s0 = SequenceConstruct(x) "
        "s = Loop (n, c, s0) <body = b (int64 i, bool go, seq(float[N, 64]) s) => "
        "(bool more, seq(float[N, 64]) r) "
        "{ more = Identity(go) a = SequenceAt(s, i) d = Mul(a, x) e = Tanh(d) r = SequenceInsert(s, e) }> "
        "y = ConcatFromSequence <axis = 0> (s) }"
    ),
    "weights in the branches": text_model(
        f"g ({IN}) => (float[N, 64] y) {{ y = If (c) <"
        "then_branch = a () => (float[N, 64] r) "
        "{ w = Constant <value = float[2] {1.5, -0.3}> () m = ReduceSum(w) t = Mul(x, m) r = Tanh(t) }, "
        "else_branch = b () => (float[N, 64] r) "
        "{ w = Constant <value = float[1] {0.7}> () t = Mul(x, w) u = Add(t, h) r = Exp(u) }> }",
        h=normal(64),
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_bodies_go_through(name: str, fuse: Fuse) -> None:
    fused = fuse(ODD[name])
    assert kernels(fused)
    known = {"x": X, "top": np.array(0.5, np.float32), "n": times(3), "c": YES}
    feeds = {value.name: known[value.name] for value in fused.original.get_inputs()}
    assert_same(fused, feeds, feeds | {"c": NO})


def test_a_default_of_an_input_is_no_constant_in_a_body(fuse: Fuse) -> None:
    model = text_model(
        f"g ({IN}, float scale) => (float[N, 64] y) {{ y = If (c) <"
        "then_branch = a () => (float[N, 64] r) { t = Mul(x, scale) r = Tanh(t) }, "
        "else_branch = b () => (float[N, 64] r) { t = Sub(x, scale) r = Exp(t) }> }",
        scale=np.float32(2),
    )
    fused = fuse(model)
    assert len(kernels(fused)) == 2
    feeds = {"x": X, "c": YES}
    own = {"scale": np.array(-3, np.float32)}
    assert_same(fused, feeds, feeds | own, feeds | own | {"c": NO})


def test_an_if_in_a_function_of_the_model_is_fused(fuse: Fuse) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18, "own": 1]> '
        f"g ({IN}) => (float[N, 64] y) {{ h = Neg(x) y = own.choose(h, c) }} "
        '<domain: "own", opset_import: ["": 18]> choose (v, c) => (y) { y = If (c) <'
        "then_branch = a () => (r) { t = Mul(v, v) r = Tanh(t) }, "
        "else_branch = b () => (r) { t = Exp(v) r = Sub(t, v) }> }"
    )
    fused = fuse(model)
    assert fused.unfused_nodes == ("If",)
    assert_same(fused, {"x": X, "c": YES}, {"x": X, "c": NO})


# -- a model that people use --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_op15", "silero_vad_sequence"])
def test_silero_computes_what_it_did_at_both_rates(name: str, cache: Path, tmp_path: Path) -> None:
    """The network of silero_vad lies in branches of an If, one for each rate, with more of them inside."""
    model = models.load(name)
    entry = models.REAL[name]
    feeds = models.feeds_of(entry, model)
    given = {key: feeds[key] for key in entry.values}
    fused = fuse_to_session(model, tmp_path, cache, shapes=entry.shapes, given=given)
    assert kernels(fused)
    cases = [feeds]
    if "sr" in feeds and name == "silero_vad":
        cases.append(feeds | {"input": feeds["input"][:, :288], "sr": np.array(8000)})
    assert_same(fused, *cases)
