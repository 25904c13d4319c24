"""Convolutions of each channel by itself: what they compute, in which kernels, and which stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse import Options
from apollo_fuse.kernel import Compute, Loop, LoopKind, walk
from apollo_fuse.passes.jam_rows import jam_rows
from apollo_fuse.passes.overlap_tails import overlap_tails
from apollo_fuse.passes.split_borders import split_borders
from apollo_fuse.passes.sum_columns import sum_columns
from apollo_fuse.tolerance import compare
from tests.fusing import fuse_to_session, kernels, lane_loops, planned
from tests.test_end_to_end import normal, text_model


def convolved(
    body: str, more: str = "", x: str = "2, 6, 28, 30", w: tuple[int, ...] = (6, 1, 3, 3)
) -> onnx.ModelProto:
    """`body` makes y of x, of weights w and a bias b; CONV stands for a convolution of six channels."""
    text = f"g (float[{x}] x) => (float[] y) {{ {body} }}".replace("CONV", f"Conv<group = 6{more}>")
    model = text_model(text, w=normal(*w), b=normal(w[0]))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model)


SAME = ", pads = [1, 1, 1, 1]"
AROUND = "a = HardSwish(x) c = CONV(a, w, b) y = HardSwish(c)"
FORMS = {
    "padded": convolved("c = CONV(x, w, b) y = Neg(c)", SAME),
    "no bias, no padding": convolved("c = CONV(x, w) y = Neg(c)"),
    "padded on one side": convolved("c = CONV(x, w, b) y = Neg(c)", ", pads = [0, 2, 1, 0]"),
    "dilated": convolved("c = CONV(x, w, b) y = Neg(c)", ", dilations = [2, 3], pads = [2, 3, 2, 3]"),
    "same": convolved("c = CONV(x, w, b) y = Neg(c)", ', auto_pad = "SAME_UPPER"'),
    "a line": convolved("c = CONV(x, w, b) y = Neg(c)", ", pads = [2, 2]", x="2, 6, 57", w=(6, 1, 5)),
    "a line of many": convolved(
        "c = CONV(x, w, b) y = Neg(c)", ", pads = [15, 15]", x="2, 6, 49", w=(6, 1, 31)
    ),
    "a causal line": convolved(
        "c = CONV(x, w, b) y = Neg(c)", ", dilations = [4], pads = [12, 0]", x="2, 6, 40", w=(6, 1, 4)
    ),
    "a line in strides": convolved(
        "c = CONV(x, w, b) y = Neg(c)", ", strides = [3], pads = [4, 4]", x="2, 6, 100", w=(6, 1, 9)
    ),
    "a volume": convolved("c = CONV(x, w, b) y = Neg(c)", x="1, 6, 9, 10, 11", w=(6, 1, 2, 2, 2)),
    "between activations": convolved(AROUND, SAME),
    "of small images": convolved(AROUND, SAME, x="2, 6, 11, 11"),
    "of odd rows": convolved(AROUND, SAME, x="1, 6, 15, 23"),
    "with its mean": convolved(
        f"{AROUND} m = GlobalAveragePool(y)".replace("y", "z").replace("m =", "y ="), SAME
    ),
    "of a shuffle": convolved(
        """r = Reshape(x, s) t = Transpose<perm = [0, 2, 1, 3, 4]>(r) u = Reshape(t, q)
        c = CONV(u, w, b) y = Neg(c)""",
        SAME,
    ),
}
for array, name in ((np.array([2, 3, 2, 28, 30]), "s"), (np.array([2, 6, 28, 30]), "q")):
    FORMS["of a shuffle"].graph.initializer.append(onnx.numpy_helper.from_array(array, name))


@pytest.mark.parametrize("name", FORMS)
def test_they_compute_what_onnxruntime_does(name: str, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(FORMS[name], tmp_path, cache)
    assert not fused.unfused_nodes
    shape = [d.dim_value for d in FORMS[name].graph.input[0].type.tensor_type.shape.dim]
    ((expected, found),) = fused.run({"x": normal(*shape)}).values()
    difference = compare(name, expected, found)
    assert difference.passed, difference


def test_what_is_no_number_spreads_as_far_as_windows_reach(tmp_path: Path, cache: Path) -> None:
    """A weight times the zero beside an image is a zero; times an infinity in it, it is none."""
    fused = fuse_to_session(FORMS["between activations"], tmp_path, cache)
    x = normal(2, 6, 28, 30)
    x[0, 1, 0, 0], x[1, 2, 13, 29] = np.nan, np.inf
    ((expected, found),) = fused.run({"x": x}).values()
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))


@pytest.mark.parametrize("name", ["between activations", "with its mean", "of a shuffle"])
def test_one_kernel_holds_them_and_what_is_around(name: str, tmp_path: Path) -> None:
    """The image with its padding is made once, a channel at a time, in a work item's own memory."""
    (candidate,) = planned(FORMS[name], tmp_path).candidates
    (kernel,) = candidate.group.kernels
    held = {node.op_type for node in candidate.part.nodes} - {"HardSigmoid", "Mul"}
    assert held == {node.op_type for node in FORMS[name].graph.node} - {"HardSwish"}
    (image,) = (b for b in kernel.buffers if b.size.constant == 30 * 32)
    assert image.scope.name == "SHARED" and not candidate.group.temporaries


@pytest.mark.parametrize(
    ("more", "w", "reason"),
    [
        (", strides = [2, 2]", (6, 1, 3, 3), "strides"),
        ("", (6, 1, 7, 5), "7 x 5"),
        ("", (12, 1, 3, 3), "channels"),
        (", group = 3", (6, 2, 3, 3), "channels"),
    ],
)
def test_others_are_onnxruntimes(more: str, w: tuple[int, ...], reason: str, tmp_path: Path) -> None:
    model = convolved("a = HardSwish(x) c = CONV(a, w) y = HardSwish(c)", w=w)
    conv = model.graph.node[1]
    if "group" in more:
        conv.attribute[0].i = 3
    elif more:
        conv.attribute.append(onnx.helper.make_attribute("strides", [2, 2]))
    (refused,) = (r for r in planned(onnx.shape_inference.infer_shapes(model), tmp_path).unknown)
    assert "Conv" in refused.reason and reason in refused.evidence


def test_a_small_image_is_mostly_padding(tmp_path: Path) -> None:
    (refused,) = planned(convolved(AROUND, SAME, x="2, 6, 7, 7"), tmp_path).unknown
    assert "padding" in refused.evidence


@pytest.mark.parametrize(("taps", "tried"), [(64, ["Conv"]), (65, [])])
def test_along_lines_one_alone_is_tried(taps: int, tried: list[str], tmp_path: Path) -> None:
    """They have one layout only, and no kernel of onnxruntime's."""
    plan = planned(convolved("y = CONV(x, w, b)", x="1, 6, 100", w=(6, 1, taps)), tmp_path, Options())
    assert [node.op_type for candidate in plan.candidates for node in candidate.part.nodes] == tried


def test_lines_of_any_length(tmp_path: Path, cache: Path) -> None:
    model = convolved(
        "c = CONV(x, w, b) y = Relu(c)", ", pads = [3, 3], strides = [2]", x="N, 6, L", w=(6, 1, 7)
    )
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (2, 6, 50)})
    assert not fused.unfused_nodes
    for length in (50, 1, 2, 7, 333):
        ((expected, found),) = fused.run({"x": normal(3, 6, length)}).values()
        difference = compare("any length", expected, found)
        assert difference.passed, (length, difference)


@pytest.mark.parametrize("w", [3, 5])
def test_images_of_any_size(w: int, tmp_path: Path, cache: Path) -> None:
    model = convolved(AROUND, f", pads = {[w // 2] * 4}", x="N, 6, H, W", w=(6, 1, w, w))
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (1, 6, 20, 30)})
    assert not fused.unfused_nodes
    for shape in ((1, 6, 20, 30), (3, 6, 5, 4), (2, 6, 2, 50), (1, 6, 1, 1), (1, 6, 300, 301)):
        ((expected, found),) = fused.run({"x": normal(*shape)}).values()
        difference = compare("any size", expected, found)
        assert difference.passed, (shape, difference)


POINTWISE = "p = Conv(x, v) {} q = Conv(z, v) y = Relu(q)"


@pytest.mark.parametrize(
    ("between", "held"),
    [
        ("a = Relu(p) c = CONV(a, w) z = Relu(c)", set()),
        ("c = CONV(p, w) z = Clip(c, zero, six)", set()),
        ("a = HardSwish(p) c = CONV(a, w) z = Relu(c)", {"HardSigmoid", "Mul", "Conv", "Relu"}),
        ("a = Relu(p) c = CONV(a, w) d = Relu(c) z = Softplus(d)", {"Conv", "Relu", "Softplus"}),
    ],
)
def test_between_convolutions_they_stay_in_their_layout(between: str, held: set[str], tmp_path: Path) -> None:
    """A kernel holds them where there is one beside them anyhow; then it holds their activation, too."""
    model = convolved(POINTWISE.format(between), SAME)
    more = {"v": normal(6, 6, 1, 1), "zero": np.float32(0), "six": np.float32(6)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in more.items())
    chosen = planned(onnx.shape_inference.infer_shapes(model), tmp_path, Options())
    assert {node.op_type for candidate in chosen.candidates for node in candidate.part.nodes} == held


def test_an_image_that_fits_no_work_item_is_not_made_again_for_each_window(tmp_path: Path) -> None:
    chosen = planned(convolved(AROUND, SAME, x="1, 6, 400, 400"), tmp_path, Options())
    held = [{node.op_type for node in candidate.part.nodes} for candidate in chosen.candidates]
    assert held == [{"HardSigmoid", "Mul"}, {"Conv"}, {"HardSigmoid", "Mul"}]


def test_rows_are_computed_in_fours(tmp_path: Path) -> None:
    (kernel,) = kernels(FORMS["of odd rows"], tmp_path)
    jammed = jam_rows(kernel)
    before, after = (
        [len(loop.body) for loop in lane_loops(k) if len(_reads(loop)) > 8] for k in (kernel, jammed)
    )
    assert before == [1] and after == [4, 3]
    four = max((loop for loop in lane_loops(jammed)), key=lambda loop: len(_reads(loop)))
    assert len(_reads(four)) == 18 + 9 + 1, "six rows of three, and the weights and the bias once"


def test_rows_of_open_number_are_computed_in_fours_and_the_rest_one_by_one(tmp_path: Path) -> None:
    (kernel,) = kernels(convolved(AROUND, SAME, x="N, 6, H, W"), tmp_path)
    windows = [loop for loop in lane_loops(jam_rows(kernel)) if len(_reads(loop)) > 8]
    assert [len(loop.body) for loop in windows] == [4, 1]


def _reads(loop: Loop) -> set[object]:
    computes = [step for step in loop.body if isinstance(step, Compute)]
    return {load for step in computes for load in step.block.loads}


def test_rows_that_have_nothing_in_common_stay_apart(tmp_path: Path) -> None:
    model = text_model(
        "g (float[8, 16, 24] x) => (float[8, 24] y) { s = ReduceSum<keepdims = 0>(x, a) y = Exp(s) }",
        a=np.array([1]),
    )
    for kernel in kernels(model, tmp_path):
        assert jam_rows(kernel) == kernel


def test_sums_over_short_rows_end_once(tmp_path: Path) -> None:
    (kernel,) = kernels(FORMS["with its mean"], tmp_path)
    spread = sum_columns(kernel)
    (added,) = (b for b in spread.buffers if b not in kernel.buffers)
    assert added.size.constant == 30
    sums = [s for loop in lane_loops(spread) for s in loop.body if isinstance(s, Compute) and s.combine]
    assert [s.targets[0].buffer == added.name for s in sums] == [True, False]


@pytest.mark.parametrize("name", ["padded", "of small images", "with its mean"])
def test_lanes_are_whole_vectors_between_the_borders(name: str, tmp_path: Path) -> None:
    for kernel in kernels(FORMS[name], tmp_path):
        covered = overlap_tails(split_borders(sum_columns(kernel)))
        loops = (loop for loop in lane_loops(covered) if isinstance(loop.body[0], Compute))
        lengths = [loop.iterator.extent.constant for loop in loops]
        assert all(n is not None and (n % 8 == 0 or n < 8) for n in lengths), lengths


def test_lanes_that_overwrite_what_they_read_run_once(tmp_path: Path) -> None:
    """Of a softmax, exponentials lie in the result's memory, and are divided there."""
    model = text_model("g (float[64, 5001] x) => (float[64, 5001] y) { y = Softmax(x) }")
    (kernel,) = kernels(model, tmp_path)
    assert any(buffer.host is not None for buffer in kernel.buffers)
    assert overlap_tails(kernel) == kernel


def test_lanes_that_jump_are_left_to_tiles(tmp_path: Path) -> None:
    model = text_model(
        "g (float[40, 28] x) => (float[28, 40] y) { t = Transpose<perm = [1, 0]>(x) y = Exp(t) }"
    )
    (kernel,) = kernels(model, tmp_path)
    assert overlap_tails(kernel) == kernel


def test_nothing_is_computed_on_the_borders(tmp_path: Path) -> None:
    (kernel,) = kernels(FORMS["between activations"], tmp_path)
    rows = [
        s for s in walk(split_borders(kernel).body) if isinstance(s, Loop) and s.kind is LoopKind.SEQUENTIAL
    ]
    borders = [loop for loop in rows if loop.iterator.extent.constant == 1]
    assert len(borders) == 2
    assert all(not step.block.loads for loop in borders for step in loop.body if isinstance(step, Compute))
