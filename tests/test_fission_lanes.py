"""Long lane loops become several, each short, that compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.kernel import Compute, Loop, Scope
from apollo_fuse.passes.fission_lanes import BODY
from apollo_fuse.tolerance import compare
from tests.fusing import fuse_to_session, kernels, lane_loops
from tests.test_end_to_end import normal, text_model

CHAIN = " ".join(f"a{i} = Tanh(m{i}) m{i + 1} = Mul(a{i}, w)" for i in range(12))
LONG = f"g (float[N, 64] x) => (float[N, 64] m12) {{ m0 = Add(x, w) {CHAIN} }}"
"""Each function needs the one before."""

LIVE = """g (float[N, 48] x, float[N, 48] z) => (float[N, 48] y, float[N, 48] early, bool[N, 48] chosen) {
  a = Sin(x) b = Cos(x) c = Sin(z) d = Cos(z) early = Mul(a, d) s = Less(a, c) n = Not(s)
  e = Tanh(a) f = Tanh(b) g = Tanh(c) h = Tanh(d) i = Exp(e) j = Exp(f) k = Exp(g) l = Exp(h)
  o = Where(s, i, j) p = Where(n, k, l) q = Add(o, p) r = Add(q, a) t = Sub(r, b) u = Mul(t, c)
  v = Div(u, i) y = Add(v, early) chosen = And(s, n)
}"""
"""Many values are needed again later, truth values among them."""

HALF = LONG.replace("float[", "float16[")
INTEGERS = (
    "g (int64[N, 40] x) => (int64[N, 40] r29) { r0 = Add(x, x) "
    + " ".join(f"q{i} = Div(r{i}, k) p{i} = Mul(q{i}, r{i}) r{i + 1} = Sub(p{i}, x)" for i in range(29))
    + " }"
)


def cost(loop: Loop) -> int:
    return sum(step.block.cost for step in loop.body if isinstance(step, Compute))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        (LONG, {"w": normal(64)}),
        (LIVE, {}),
        (HALF, {"w": normal(64).astype(np.float16)}),
        (INTEGERS, {"k": np.array(3)}),
    ],
)
def test_parts_compute_what_the_whole_does(
    text: str, weights: dict[str, np.ndarray], tmp_path: Path, cache: Path
) -> None:
    model = text_model(text, **weights)
    (kernel,) = kernels(model, tmp_path)
    loops = lane_loops(kernel)
    assert len(loops) > 2 and max(map(cost, loops)) <= BODY
    random = np.random.default_rng(1)
    for rows in (1, 7, 40):
        feeds = {}
        for value in model.graph.input:
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            feeds[value.name] = (
                9 * random.standard_normal((rows, value.type.tensor_type.shape.dim[1].dim_value))
            ).astype(kind)
        shapes = {name: array.shape for name, array in feeds.items()}
        fused = fuse_to_session(model, tmp_path, cache, shapes=shapes)
        assert not fused.unfused_nodes
        for name, (expected, found) in fused.run(feeds).items():
            assert not compare(name, expected, found).problem


def test_the_fewest_values_go_through_memory(tmp_path: Path) -> None:
    (kernel,) = kernels(text_model(LONG, w=normal(64)), tmp_path)
    buffers = [b for b in kernel.buffers if b.scope is Scope.SHARED]
    assert len(lane_loops(kernel)) == 12 and len(buffers) == 2  # one is read, and one is written


def test_a_short_body_stays_whole(tmp_path: Path) -> None:
    text = "g (float[N, 64] x) => (float[N, 64] y) { a = Tanh(x) b = Exp(a) c = Sin(b) y = Add(c, x) }"
    (kernel,) = kernels(text_model(text), tmp_path)
    assert len(lane_loops(kernel)) == 1 and not any(b.scope is Scope.SHARED for b in kernel.buffers)
