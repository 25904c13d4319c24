"""Lane loops with clamped indices become borders and what lies between them, and compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.index import ZERO, Index, Maximum
from apollo_fuse.kernel import Compute, Kernel, Loop, LoopKind, walk
from apollo_fuse.passes.split_borders import split_borders
from apollo_fuse.tolerance import compare
from tests.fusing import fuse_to_session, kernels
from tests.test_end_to_end import normal, text_model

POOL = """g (float[N, 3, H, W] x) => (float[N, 3, P, Q] y)
  {{ p = {op}<kernel_shape = [{size}, {size}], strides = [{stride}, {stride}], pads = [{pads}], {more}>(x)
     y = Neg(p) }}"""
PAD = """g (float[N, W] x) => (float[N, V] y) <int64[4] pads = {{0, 2, 0, 3}}>
  {{ p = Pad<mode = "{mode}">(x, pads) y = Neg(p) }}"""


def pool(op: str, size: int, stride: int, pads: str, more: str = "ceil_mode = 0") -> onnx.ModelProto:
    return text_model(POOL.format(op=op, size=size, stride=stride, pads=pads, more=more), opset=19)


def split(model: onnx.ModelProto, folder: Path) -> list[tuple[Kernel, Kernel]]:
    """Each kernel as it was planned, and with its borders split."""
    return [(kernel, split_borders(kernel)) for kernel in kernels(model, folder)]


def clamps_along_lanes(kernel: Kernel) -> int:
    """The reads whose index is a choice of the lane's."""
    found = 0
    for loop in walk(kernel.body):
        if isinstance(loop, Loop) and loop.kind is LoopKind.LANE:
            computes = [step for step in walk(loop.body) if isinstance(step, Compute)]
            offsets = (load.indices[0] for step in computes for load in step.block.loads)
            atoms = (atom for offset in offsets for atom in offset.atoms())
            found += sum(
                isinstance(a, Maximum) and loop.iterator in (a.left - a.right).atoms() for a in atoms
            )
    return found


FORMS = {
    "max": pool("MaxPool", 3, 2, "1, 1, 1, 1"),
    "max of 2 beside the edge": pool("MaxPool", 2, 1, "1, 1, 0, 0"),
    "max that steps over": pool("MaxPool", 2, 3, "1, 1, 1, 1"),
    "max, dilated": pool("MaxPool", 3, 1, "2, 2, 2, 2", "dilations = [2, 2]"),
    "max of many": pool("MaxPool", 7, 2, "3, 3, 3, 3"),
    "mean": pool("AveragePool", 3, 1, "1, 1, 1, 1"),
    "mean with padding": pool("AveragePool", 3, 2, "1, 1, 1, 1", "count_include_pad = 1"),
    "mean of many": pool("AveragePool", 6, 3, "2, 2, 3, 3"),
}
PADS = {mode: text_model(PAD.format(mode=mode), opset=19) for mode in ("edge", "reflect")}


@pytest.mark.parametrize("name", FORMS)
def test_windows_of_every_form_compute_what_onnxruntime_does(name: str, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(FORMS[name], tmp_path, cache, shapes={"x": (2, 3, 12, 40)})
    assert not fused.unfused_nodes
    for height, width in ((12, 40), (9, 7), (7, 90), (8, 8)):
        ((expected, found),) = fused.run({"x": normal(2, 3, height, width)}).values()
        difference = compare(name, expected, found)
        assert difference.passed, (height, width, difference)


@pytest.mark.parametrize("name", ["max", "mean of many"])
def test_windows_over_nothing_are_an_error_as_they_were(name: str, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(FORMS[name], tmp_path, cache, shapes={"x": (2, 3, 12, 40)})
    for session in (fused.original, fused.fused):
        with pytest.raises(Exception, match="expected equal|Invalid input shape|pool_attributes"):
            session.run(None, {"x": normal(2, 3, 12, 0)})


def test_a_last_window_that_is_not_full(tmp_path: Path, cache: Path) -> None:
    text = POOL.format(op="MaxPool", size=3, stride=2, pads="0, 0, 0, 0", more="ceil_mode = 1")
    fixed = text.replace("N, 3, H, W", "2, 3, 12, 40").replace("N, 3, P, Q", "2, 3, 6, 20")
    fused = fuse_to_session(text_model(fixed), tmp_path, cache)
    assert not fused.unfused_nodes
    ((expected, found),) = fused.run({"x": normal(2, 3, 12, 40)}).values()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", PADS)
def test_edges_that_are_continued(mode: str, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(PADS[mode], tmp_path, cache, shapes={"x": (2, 50)})
    for width in (50, 4, 5, 1100):
        ((expected, found),) = fused.run({"x": normal(3, width)}).values()
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["max", "mean", "mean of many"])
def test_nothing_is_clamped_between_the_borders(name: str, tmp_path: Path) -> None:
    ((before, after),) = split(FORMS[name], tmp_path)
    assert clamps_along_lanes(before) and not clamps_along_lanes(after)


@pytest.mark.parametrize("width", [60, 300, 1000])
@pytest.mark.parametrize(
    "model", [FORMS["max of 2 beside the edge"], FORMS["mean"], PADS["edge"], PADS["reflect"]]
)
def test_borders_are_a_few_lanes_of_a_row_of_any_width(
    model: onnx.ModelProto, width: int, tmp_path: Path
) -> None:
    """In the first tile of many, of which each is longer than short rows are."""
    ((_, after),) = split(model, tmp_path)
    rows = [loop for loop in walk(after.body) if isinstance(loop, Loop)]
    borders = sum(turns(loop, width) for loop in rows if loop.kind is LoopKind.SEQUENTIAL)
    between = sum(turns(loop, width) for loop in rows if loop.kind is LoopKind.LANE)
    assert 0 < borders <= 5 and width - 5 <= between + borders <= width + 5


def test_what_may_be_one_row_is_read_along_all_of_a_row_of_as_many_times_another(tmp_path: Path) -> None:
    """Of a pyramid's levels, the broadcast of a finer one and one made finer is all between the borders."""
    model = text_model(
        """g (float[N, W] x, float[N, V] y) => (float[N, U] z)
        { a = Resize<mode = "nearest">(x, none, scales) z = Add(a, y) }""",
        none=np.zeros(0, np.float32),
        scales=np.array([1, 8], np.float32),
    )
    (kernel,) = kernels(model, tmp_path)
    assert clamps_along_lanes(kernel) and not clamps_along_lanes(split_borders(kernel))


def turns(loop: Loop, width: int) -> int:
    """How often it turns in the first blocks where each open extent is so many elements."""
    first = loop.turns.substitute({iterator: ZERO for iterator in loop.turns.iterators()})
    found = first.substitute({symbol: Index.of(width) for symbol in first.symbols()}).constant
    assert found is not None
    return found


def test_a_loop_that_is_all_border_stays_whole(tmp_path: Path) -> None:
    text = POOL.format(op="MaxPool", size=3, stride=1, pads="1, 1, 1, 1", more="ceil_mode = 0")
    model = text_model(text.replace("H, W", "3, 3").replace("P, Q", "3, 3"))
    ((before, after),) = split(model, tmp_path)
    assert before == after


def test_windows_of_what_was_computed_are_no_part_of_its_kernel(tmp_path: Path) -> None:
    """Each element would be computed once for every window that it lies in."""
    model = text_model(
        """g (float[2, 3, 20, 20] x) => (float[2, 3, 20, 20] y)
        { e = Exp(x) s = Sin(e) p = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(s) y = Neg(p) }"""
    )
    assert [len(before.body) for before, _ in split(model, tmp_path)] == [1, 1]
