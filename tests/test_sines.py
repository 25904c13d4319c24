"""Sines of near angles take the short way, and of others the long one, whatever stands beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apollo_fuse.codegen import c
from tests.fusing import fuse_to_session, planned
from tests.test_end_to_end import normal, text_model

SNAKE = "g (float[N, 300] x) => (float[N, 300] y) { t = Mul(x, a) s = Sin(t) q = Mul(s, s) y = Add(x, q) }"
FAR = (3e5, -1e9, 3e38, np.inf, -np.inf, np.nan)


def emitted(text: str, folder: Path, **weights: np.ndarray) -> str:
    candidates = planned(text_model(text, **weights), folder).candidates
    return "".join(c.emit(candidate.group, "sines", "sines") for candidate in candidates)


def test_far_angles_beside_near_ones(tmp_path: Path, cache: Path) -> None:
    a = 1 + np.abs(normal(300))
    fused = fuse_to_session(text_model(SNAKE, a=a), tmp_path, cache, shapes={"x": (9, 300)})
    assert not fused.unfused_nodes
    for place, far in enumerate((None, *FAR)):
        x = 10 * normal(3, 300)
        if far is not None:
            x[1, 40 * place] = far
        with np.errstate(all="ignore"):
            exact = x + np.sin((x * a).astype(np.float64)) ** 2
        (found,) = fused.fused.run(None, {"x": x})
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)


def test_a_function_of_an_angle_beside_another_function(tmp_path: Path, cache: Path) -> None:
    text = """
        g (float[N, 64] x, float[N, 64] z) => (float[N, 64] y, float[N] m)
        { s = Sin(x) c = Cos(z) y = Mul(s, c) m = ReduceMean<keepdims = 0>(y, last) }
    """
    model = text_model(text, last=np.array([-1]))
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (9, 64), "z": (9, 64)})
    for far in (0.0, *FAR):
        x, z = normal(5, 64), normal(5, 64)
        z[3, 63] = far
        with np.errstate(all="ignore"):
            exact = np.sin(x.astype(np.float64)) * np.cos(z.astype(np.float64))
        found, mean = fused.fused.run(None, {"x": x, "z": z})
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(mean, exact.mean(axis=-1), rtol=1e-5, atol=1e-5)


def test_far_angles_in_the_memory_of_the_result(tmp_path: Path, cache: Path) -> None:
    """Rows of open length are kept where the result is written over them, and cannot be read again then."""
    text = "g (float[N, M] x, float[N, M] z) => (float[N, M] y) { a = Softmax(x) d = Add(a, z) y = Sin(d) }"
    model = text_model(text)
    (candidate,) = planned(model, tmp_path).candidates
    assert any(buffer.host == "out0" for kernel in candidate.group.kernels for buffer in kernel.buffers)
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (9, 64), "z": (9, 64)})
    x, z = normal(5, 64), normal(5, 64)
    z[2, 7] = np.inf
    powers = np.exp(x.astype(np.float64))
    with np.errstate(all="ignore"):
        exact = np.sin(powers / powers.sum(axis=-1, keepdims=True) + z)
    (found,) = fused.fused.run(None, {"x": x, "z": z})
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


def test_half_types_are_as_near(tmp_path: Path) -> None:
    text = "g (float16[N, 64] x) => (float16[N, 64] y) { e = Exp(x) y = Sin(e) }"
    assert "af_near_sinf(" in emitted(text, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "g (double[N, 64] x) => (double[N, 64] y) { e = Exp(x) y = Sin(e) }",
        "g (float[N, 64] x) => (float[N] y) { s = Sin(x) y = ReduceSum<keepdims = 0>(s, last) }",
    ],
    ids=["of doubles", "in a sum"],
)
def test_what_cannot_be_computed_twice_takes_the_long_way(text: str, tmp_path: Path) -> None:
    source = emitted(text, tmp_path, last=np.array([-1]))
    assert "af_sin" in source
    assert "near" not in source
