"""What is elementwise on a concatenation: written in its parts, in one kernel with what they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.kernel import Compute, walk, written_by
from apollo_fuse.tolerance import compare
from tests.fusing import fuse_to_session, kernels, lane_loops, planned
from tests.interpreted import interpreted
from tests.interpreter import Interpreter
from tests.test_end_to_end import normal, text_model

ROTARY = """g (float[2, 3, 20, 64] x, float[20, 64] c, float[20, 64] s) => (float[2, 3, 20, 64] y)
  { a = Slice(x, zero, half, last) b = Slice(x, half, all, last) n = Neg(b)
    r = Concat<axis = 3>(n, a) p = Mul(r, s) q = Mul(x, c) y = Add(q, p) }"""
ENDS = {"zero": np.array([0]), "half": np.array([32]), "all": np.array([64]), "last": np.array([3])}


def dense(results: str = "float[1, 48, 9, 9] y") -> onnx.ModelProto:
    """A block of DenseNet: what there is and what is new, normalised and bent."""
    text = f"""g (float[1, 32, 9, 9] x, float[1, 16, 9, 9] z) => ({results})
      {{ v = Concat<axis = 1>(x, z) n = BatchNormalization(v, a, b, m, w) y = Relu(n) }}"""
    return text_model(text, a=normal(48), b=normal(48), m=normal(48), w=np.abs(normal(48)) + 1)


OPEN = text_model(
    """g (float[N, 20] x, float[M, 20] z, float[20] c) => (float[P, 20] y)
      { e = Exp(x) v = Concat<axis = 0>(e, z, x) s = Sigmoid(v) p = Mul(v, s) y = Add(p, c) }"""
)
MODELS = {
    "rotary": text_model(ROTARY, **ENDS),
    "dense": dense(),
    "dense, and the whole is needed": dense("float[1, 48, 9, 9] y, float[1, 48, 9, 9] v"),
    "open": OPEN,
    "broadcast along the parts": text_model(
        """g (float[4, 32] x, float[4, 16] z, float[4, 1] c) => (float[4, 48] y)
          { v = Concat<axis = 1>(x, z) p = Mul(v, c) r = Concat<axis = 1>(z, x) q = Sub(p, r) y = Tanh(q) }"""
    ),
}
SHAPES = {
    "rotary": {"x": (2, 3, 20, 64), "c": (20, 64), "s": (20, 64)},
    "open": {"x": (5, 20), "z": (7, 20), "c": (20,)},
    "broadcast along the parts": {"x": (4, 32), "z": (4, 16), "c": (4, 1)},
}
BLOCK = {"x": (1, 32, 9, 9), "z": (1, 16, 9, 9)}


@pytest.mark.parametrize("name", MODELS)
def test_they_compute_what_onnxruntime_does(name: str, tmp_path: Path, cache: Path) -> None:
    shapes = SHAPES.get(name, BLOCK)
    fused = fuse_to_session(MODELS[name], tmp_path, cache, shapes=shapes if name == "open" else {})
    assert not fused.unfused_nodes
    for expected, found in fused.run({x: normal(*shape) for x, shape in shapes.items()}).values():
        difference = compare(name, expected, found)
        assert difference.passed, difference


@pytest.mark.parametrize("name", MODELS)
def test_triton_computes_the_same(name: str, interpreter: Interpreter, tmp_path: Path) -> None:
    shapes = SHAPES.get(name, BLOCK)
    found = interpreted(MODELS[name], tmp_path, interpreter).run({x: normal(*s) for x, s in shapes.items()})
    for expected, result in found.values():
        difference = compare(name, expected, result)
        assert difference.passed, difference


@pytest.mark.parametrize("rows", [(5, 7), (0, 3), (3, 0), (0, 0), (1, 1), (40, 3)])
def test_parts_of_open_extent(rows: tuple[int, int], tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(OPEN, tmp_path, cache, shapes=SHAPES["open"])
    feeds = {"x": normal(rows[0], 20), "z": normal(rows[1], 20), "c": normal(20)}
    ((expected, found),) = fused.run(feeds).values()
    assert expected.shape == found.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["rotary", "dense", "open"])
def test_the_concatenation_is_not_made(name: str, tmp_path: Path) -> None:
    steps = [step for kernel in kernels(MODELS[name], tmp_path) for step in walk(kernel.body)]
    computes = [step for step in steps if isinstance(step, Compute)]
    assert len({target.buffer for step in computes for target in step.targets}) == 1


def test_the_whole_is_written_beside_what_is_made_of_it(tmp_path: Path) -> None:
    """In the loop that reads the part, for both results."""
    (candidate,) = planned(MODELS["dense, and the whole is needed"], tmp_path).candidates
    assert len(candidate.group.outputs) == 2 and not candidate.group.temporaries
    loops = [loop for kernel in candidate.group.kernels for loop in lane_loops(kernel)]
    assert len(loops) == 2
    assert all({"out0", "out1"} <= written_by(loop.body) for loop in loops)


def test_blocks_of_other_widths_share_a_kernel(tmp_path: Path) -> None:
    """Where a part starts is as wide as the parts before it."""
    text = """g (float[1, 64, 9, 9] x, float[1, 32, 9, 9] z, float[1, 96, 9, 9] u, float[1, 128, 9, 9] w)
      => (float[1, 96, 9, 9] y, float[1, 160, 9, 9] t)
      { v = Concat<axis = 1>(x, z) y = Relu(v) q = Concat<axis = 1>(w, z) t = Relu(q) }"""
    first, second = planned(text_model(text), tmp_path).candidates
    assert str(first.group) == str(second.group)


@pytest.mark.parametrize(
    "parts",
    [
        "Concat<axis = 1>(x, c)",  # a column beside the others
        "Concat<axis = 0>(x, x, x, x, x, x, x, x, x)",
    ],
)
def test_parts_that_are_many_or_small_are_not_followed(parts: str, tmp_path: Path) -> None:
    text = f"g (float[40, 30] x, float[40, 1] c) => (float[P, Q] y) {{ v = {parts} y = Tanh(v) }}"
    model = text_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    chosen = planned(onnx.shape_inference.infer_shapes(model), tmp_path)
    assert [[n.op_type for n in c.part.nodes] for c in chosen.candidates] == [["Concat"], ["Tanh"]]


def test_a_reduction_reads_all_parts_of_what_was_made_whole(tmp_path: Path) -> None:
    text = (
        "g (float[8, 32] x, float[8, 16] z) => (float[8, 48] y) { v = Concat<axis = 1>(x, z) y = Softmax(v) }"
    )
    chosen = planned(text_model(text), tmp_path)
    assert [[n.op_type for n in c.part.nodes] for c in chosen.candidates] == [["Concat"], ["Softmax"]]
