"""What is known of the shapes in and behind bodies holds in every iteration, and where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse import onnx_io
from apollo_fuse.bodies import graphs
from apollo_fuse.symbolic import infer_shapes
from tests.fusing import fuse_to_session
from tests.test_end_to_end import text_model

Shapes = dict[str, list[int | str] | None]


def shapes_in(model: onnx.ModelProto, folder: Path) -> Shapes:
    """The shapes of all values by name; extents that inference made up for lack of knowledge as "?"."""
    onnx.save(model, folder / "model.onnx")
    clean = onnx_io.load_clean(folder / "model.onnx", folder)
    infer_shapes(clean)
    found: Shapes = {}
    for graph in graphs(clean.graph):
        for value in (*graph.inputs, *(v for node in graph for v in node.outputs)):
            dims = None if value.shape is None else list(value.shape)
            found[value.name or ""] = dims and [d if isinstance(d, int) else str(d) for d in dims]
    return found


def loop(carried: str, body: str, inputs: str = "float[N, 64] x", start: str = "x") -> onnx.ModelProto:
    """A Loop that carries `s` of this type, which starts as `start`; its body ends in `r` and stacks `q`."""
    return text_model(
        f"g ({inputs}, int64 n, bool c) => (float[] y, float[] all) {{ "
        f"z, stacked = Loop (n, c, {start}) <body = b (int64 i, bool go, {carried}) => (bool go, r, q) "
        f"{{ {body} q = Neg(r) }}> y = Neg(z) all = Neg(stacked) }}",
        axes=np.array([0]),
        w=np.ones((3, 64), np.float32),
    )


def is_unknown(dim: int | str) -> bool:
    """Whether an extent is a symbol that inference made up."""
    return isinstance(dim, str) and dim[0] in "_b" and dim[1:].strip("d").isdigit()


@pytest.mark.parametrize("carried", ["s", "float[] s", "float[A, 64] s", "float[A, B] s"])
def test_a_shape_that_every_iteration_makes_again_holds(carried: str, tmp_path: Path) -> None:
    found = shapes_in(loop(carried, "a = Mul(s, x) r = Tanh(a)"), tmp_path)
    assert found["s"] == found["r"] == found["z"] == ["s0", 64]


@pytest.mark.parametrize("carried", ["s", "float[A, B] s"])
def test_an_extent_that_an_iteration_changes_is_unknown(carried: str, tmp_path: Path) -> None:
    found = shapes_in(loop(carried, "a = Tanh(s) r = Concat <axis = 0> (a, x)"), tmp_path)
    s, z = found["s"], found["z"]
    assert s and is_unknown(s[0]) and s[1] == 64
    assert z and is_unknown(z[0]) and z[1] == 64 and z[0] != s[0]


def test_a_rank_that_an_iteration_changes_is_unknown(tmp_path: Path) -> None:
    found = shapes_in(loop("s", "a = Tanh(s) r = Unsqueeze(a, axes)"), tmp_path)
    assert found["s"] is None and found["a"] is None and found["z"] is None


def test_values_that_change_places_have_no_extent_of_their_own(tmp_path: Path) -> None:
    model = text_model(
        "g (float[N, 64] x, float[M, 64] y, int64 n, bool c) => (float[A, 64] o, float[B, 64] p) { "
        "v, u = Loop (n, c, x, y) <body = b (int64 i, bool go, s, t) => (bool go, k, l) "
        "{ k = Neg(t) l = Abs(s) }> o = Neg(v) p = Neg(u) }"
    )
    found = shapes_in(model, tmp_path)
    for name in ("s", "t", "u", "v"):
        dims = found[name]
        assert dims and is_unknown(dims[0]) and dims[1] == 64, name
    assert found["s"] != found["t"]


def test_extents_in_the_type_of_an_input_hold(tmp_path: Path) -> None:
    found = shapes_in(loop("float[3, A] s", "r = Mul(s, w)", inputs="float[N, M] x"), tmp_path)
    s = found["s"]
    assert s and s[0] == 3 and is_unknown(s[1])


def test_extents_that_the_type_gives_wrongly_do_not_hold(tmp_path: Path) -> None:
    found = shapes_in(loop("float[3, 64] s", "r = Concat <axis = 0> (w, w)", start="w"), tmp_path)
    s = found["s"]
    assert s and is_unknown(s[0]) and s[1] == 64


def test_a_guess_that_does_not_fit_the_body_is_taken_back(tmp_path: Path) -> None:
    found = shapes_in(loop("s", "a = Neg(s) b = MatMul(a, w) r = Abs(b)", inputs="float[5, 7] x"), tmp_path)
    assert found["s"] is None


def test_what_a_loop_stacks_may_be_nothing(tmp_path: Path) -> None:
    found = shapes_in(loop("float[A, 64] s", "a = Mul(s, x) r = Tanh(a)"), tmp_path)
    stacked = found["stacked"]
    # onnxruntime gives open extents 0 where no iteration ran
    assert stacked and len(stacked) == 3 and all(map(is_unknown, stacked))


STEPS = {
    "Less": "t = Shape<start = 0, end = 1>(x) k = Squeeze(t) go = Less(none, k)",
    "floats": "t = Shape<start = 0, end = 1>(x) k = Squeeze(t) l = Cast<to = 1>(k) go = Less(nothing, l)",
    "Greater": "t = Shape<start = 0, end = 1>(x) k = Squeeze(t) go = Greater(k, none)",
    "trips": "n = Shape<start = 0, end = 1>(x)",
    "may be none": "t = Shape<start = 0, end = 1>(x) k = Squeeze(t) go = Less(two, k)",
    "turned": "t = Shape<start = 0, end = 1>(x) k = Squeeze(t) go = Less(k, none)",
    "given": "n = Identity(m)",
}


def steps(how: str, after: str = "y = Neg(stacked)") -> onnx.ModelProto:
    """A Loop over the first axis of x, which stacks what it makes of each element and of the one before."""
    inputs = "n, yes" if "n = " in STEPS[how] else ", go"
    return text_model(
        f"""g (float[T, N, 8] x, int64 m) => (float[] y)
        <int64 none = {{0}}, int64 one = {{1}}, int64 two = {{2}}, bool yes = {{1}}, float nothing = {{0}}> {{
          {STEPS[how]}
          e = Shape<start = 1>(x) z = Expand(nothing, e)
          last, stacked = Loop ({inputs}, z) <
            body = b (int64 i, bool c, float[A, B] s) => (bool d, float[A, B] r, float[C, D] q) {{
              a = Gather(x, i) p = Add(a, s) r = Tanh(p) q = Neg(r)
              u = Shape<start = 0, end = 1>(x) v = Squeeze(u) j = Add(i, one) d = Less(j, v) }}>
          {after} }}"""
    )


@pytest.mark.parametrize("how", STEPS)
def test_what_a_loop_stacks_has_the_extents_of_each_iteration_if_one_runs(how: str, tmp_path: Path) -> None:
    stacked = shapes_in(steps(how), tmp_path)["stacked"]
    assert stacked is not None and is_unknown(stacked[0])
    runs = how not in ("may be none", "turned", "given")
    assert (stacked[1] == "s1") == runs and is_unknown(stacked[1]) != runs


@pytest.mark.parametrize("how", ["Less", "trips"])
def test_a_loop_over_no_elements_stacks_none(how: str, tmp_path: Path, cache: Path) -> None:
    """Where its extents are not those that were deduced."""
    model = steps(how, "f = Neg(stacked) h = Exp(f) y = Mul(h, stacked)")
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (5, 3, 8)})
    for extent in (5, 1, 0):
        x = np.linspace(-1, 1, extent * 24, dtype=np.float32).reshape(extent, 3, 8)
        for expected, found in fused.run({"x": x, "m": np.array(extent, np.int64)}).values():
            assert expected.shape == found.shape
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_loops_in_loops_are_proved_together(tmp_path: Path) -> None:
    model = text_model(
        "g (float[N, 64] x, int64 n, bool c) => (float[A, 64] y) { "
        "z = Loop (n, c, x) <body = b (int64 i, bool go, s) => (bool go, r) "
        "{ a = Concat <axis = 0> (s, s) r = Loop (n, c, a) <body = d (int64 j, bool on, t) => (bool on, e) "
        "{ f = Mul(t, t) e = Add(f, a) }> }> "
        "y = Neg(z) }"
    )
    found = shapes_in(model, tmp_path)
    s, t = found["s"], found["t"]
    assert s and is_unknown(s[0])
    assert t == found["a"] == [f"2*{s[0]}", 64]


def test_slices_of_a_scan_lose_its_axis(tmp_path: Path) -> None:
    model = text_model(
        "g (float[N, T, 64] x, float[N, 64] x0) => (float[N, 64] y, float[N, 64, T] all) { "
        "y, all = Scan <num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [-1], "
        "body = b (s, float[A, B] e) => (r, q) { r = Add(s, e) q = Exp(r) }> (x0, x) }"
    )
    found = shapes_in(model, tmp_path)
    assert found["s"] == found["e"] == found["r"] == ["s0", 64]


def test_names_are_given_once(tmp_path: Path) -> None:
    branch = "{ t = Mul(x, x) r = Tanh(t) }"
    model = text_model(
        "g (float[N, 64] x, bool c) => (float[N, 64] y, float[N, 64] r_1) { r_1 = Abs(x) z = If (c) <"
        f"then_branch = a () => (float[N, 64] r) {branch}, else_branch = b () => (float[N, 64] r) "
        f"{branch.replace('Tanh', 'Exp')}> y = Add(z, r_1) }}"
    )
    onnx.save(model, tmp_path / "model.onnx")
    clean = onnx_io.load_clean(tmp_path / "model.onnx", tmp_path)
    names = [v.name for graph in graphs(clean.graph) for node in graph for v in node.outputs]
    assert len(names) == len(set(names)) == 7
    assert {"y", "r_1"} <= set(names)
