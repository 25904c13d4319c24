"""What a tensor holds in a body is found out, whether a run comes to it or not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from apollo_fuse import driver, onnx_io
from apollo_fuse.bodies import graphs
from apollo_fuse.capture import Captures, capture
from apollo_fuse.options import InputShape, Options
from tests.test_bodies import IN, NO, YES, X
from tests.test_end_to_end import normal, text_model

Feeds = Mapping[str, np.ndarray]


def captured(model: onnx.ModelProto, names: list[str], feeds: Feeds, folder: Path) -> Captures:
    onnx.save(model, folder / "model.onnx")
    clean = onnx_io.load_clean(folder / "model.onnx", folder)
    known = {v.name for graph in graphs(clean.graph) for node in graph for v in node.outputs}
    assert known.issuperset(names)
    return capture(clean, names, feeds, 1)


def test_both_branches_of_an_if_are_seen(tmp_path: Path) -> None:
    model = text_model(
        f"g ({IN}) => (float[N, 64] y) {{ h = Neg(x) y = If (c) <"
        "then_branch = a () => (float[N, 64] r) { t = Mul(h, w) r = Tanh(t) }, "
        "else_branch = b () => (float[N, 64] q) { u = Exp(h) q = Sub(u, x) }> }",
        w=normal(64),
    )
    found = captured(model, ["h", "t", "u"], {"x": X, "c": YES}, tmp_path)
    assert not found.problems
    np.testing.assert_array_equal(found.arrays["h"], -X)
    np.testing.assert_allclose(found.arrays["t"], -X * normal(64))
    np.testing.assert_allclose(found.arrays["u"], np.exp(-X), rtol=1e-6)


def test_a_resize_by_the_sizes_of_what_is_fed_is_seen(tmp_path: Path) -> None:
    """onnxruntime refuses one where it knows no rank, and so not how many sizes there are."""
    model = text_model(
        "g (float[N, C, H, W] x) => (float[N, C, A, B] y) { h = Neg(x) s = Shape(h) r = Reshape(h, f) "
        'b = Slice(s, zero, two) z = Concat <axis = 0> (b, e) y = Resize <mode = "nearest"> (r, , , z) }',
        f=np.array([1, 2, 2, 3]),
        zero=np.array([0]),
        two=np.array([2]),
        e=np.array([4, 6]),
    )
    x = normal(1, 2, 2, 3)
    found = captured(model, ["y"], {"x": x}, tmp_path)
    np.testing.assert_array_equal(found.arrays["y"], -x.repeat(2, 2).repeat(2, 3))


def test_a_loop_is_seen_in_its_first_iteration_even_if_it_has_none(tmp_path: Path) -> None:
    model = text_model(
        "g (float[N, 64] x, int64 n, bool c) => (float[N, 64] y) { h = Neg(x) "
        "y = Loop (n, c, h) <body = b (int64 i, bool go, s) => (bool more, r) "
        "{ more = Not(go) k = Cast <to = 1> (i) l = Add(s, k) r = Mul(l, x) }> }"
    )
    found = captured(model, ["more", "k", "l"], {"x": X, "n": np.array(0), "c": NO}, tmp_path)
    assert not found.problems
    np.testing.assert_array_equal(found.arrays["l"], -X)
    assert found.arrays["k"] == 0 and not found.arrays["more"]


def test_a_scan_is_seen_with_the_slice_that_it_starts_with(tmp_path: Path) -> None:
    model = text_model(
        "g (float[N, T, 64] x, float[N, 64] x0) => (float[N, 64] y) { "
        "y = Scan <num_scan_inputs = 2, scan_input_axes = [1, -2], scan_input_directions = [0, 1], "
        "body = b (float[N, 64] s, float[N, 64] e, float[N, 64] f) => (float[N, 64] r) "
        "{ t = Sub(e, f) r = Add(s, t) }> (x0, x, x) }"
    )
    x = normal(5, 3, 64)
    found = captured(model, ["t"], {"x": x, "x0": X}, tmp_path)
    np.testing.assert_array_equal(found.arrays["t"], x[:, 0] - x[:, -1])


def test_a_body_in_a_body_is_seen(tmp_path: Path) -> None:
    model = text_model(
        "g (float[N, 64] x, int64 n, bool c) => (float[N, 64] y) { h = Neg(x) "
        "y = Loop (n, c, h) <body = b (int64 i, bool go, float[N, 64] s) => (bool go, float[N, 64] r) "
        "{ l = Add(s, s) r = If (c) <then_branch = p () => (float[N, 64] u) { t = Mul(l, h) u = Neg(t) }, "
        "else_branch = q () => (float[N, 64] v) { v = Abs(s) }> }> }"
    )
    found = captured(model, ["t"], {"x": X, "n": np.array(0), "c": NO}, tmp_path)
    np.testing.assert_array_equal(found.arrays["t"], 2 * X * X)


UNRUNNABLE = text_model(
    f"g ({IN}, int64[1] shape) => (float[M] y) {{ h = Exp(x) y = If (c) <"
    "then_branch = a () => (float[M] r) { t = Mul(h, x) u = Tanh(t) r = Reshape(u, flat) }, "
    "else_branch = b () => (float[M] q) { t = Reshape(h, shape) u = Mul(t, t) v = Tanh(u) q = Neg(v) }> }",
    flat=np.array([-1]),
)
"""The branch that does not run asks for a shape that fits, which the run with the other need not give."""


def test_what_does_not_run_is_said(tmp_path: Path) -> None:
    feeds = {"x": X, "c": YES, "shape": np.array([7])}
    found = captured(UNRUNNABLE, ["h", "t", "v"], feeds, tmp_path)
    assert {"h", "t"} <= found.arrays.keys() and "v" not in found.arrays
    assert "graph 'b' of If node" in found.problems["v"] and "Reshape" in found.problems["v"]


def test_kernels_of_a_body_that_does_not_run_are_left_out_and_named(tmp_path: Path, cache: Path) -> None:
    path, output = tmp_path / "net.onnx", tmp_path / "out.onnx"
    onnx.save(UNRUNNABLE, path)
    np.savez(tmp_path / "own.npz", c=YES, shape=np.array([7]))
    report = driver.fuse(
        path,
        output,
        Options(
            shapes=(InputShape("x", (5, 64)),), inputs=tmp_path / "own.npz", measure=False, strict=True,
            fuse_all=True, cache_dir=cache, threads=1,
        ),
    )  # fmt: skip
    (warning,) = report.warnings
    assert "graph 'b' of If node" in warning and warning.endswith("are left out")
    out = [kernel for kernel in report.kernels if not kernel.accepted]
    assert [kernel.ops for kernel in out] == [("Mul", "Tanh", "Neg")]
    assert "does not run by itself" in out[0].reason
    assert report.fused_nodes >= 1
