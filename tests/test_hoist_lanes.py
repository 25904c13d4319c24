"""What each lane has for itself is computed before the loop that uses it again and again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apollo_fuse.expressions import Apply, Op
from apollo_fuse.kernel import Compute, Kernel, Loop, LoopKind, walk
from apollo_fuse.passes.hoist_lanes import hoist_lanes
from tests.fusing import fuse_to_session
from tests.test_end_to_end import normal, text_model
from tests.test_memory_stitching import group_of

NORM = """g (float[N, {rows}, {columns}] x) => (float[N, {rows}, {columns}] y)
  <int64[1] axes = {{1}}, float epsilon = {{1e-5}}> {{
    e = ReduceMean(x, axes) d = Sub(x, e) q = Mul(d, d) v = ReduceMean(q, axes)
    w = Add(v, epsilon) r = Sqrt(w) y = Div(d, r) }}"""
SUMMED = """g (float[N, {rows}, {columns}] x) => (float[N, {rows}, {columns}] y) <int64[1] axes = {{1}}> {{
    s = ReduceSum(x, axes) y = Sub(x, s) }}"""


def turns_of(kernel: Kernel, op: Op) -> list[int]:
    """For each statement with this operation, how many loops other than lanes it is within."""

    def found(steps: tuple[object, ...], depth: int) -> list[int]:
        depths: list[int] = []
        for step in steps:
            if isinstance(step, Loop):
                depths += found(step.body, depth + (step.kind is LoopKind.SEQUENTIAL))
            elif isinstance(step, Compute):
                items = step.block.instructions
                depths += [depth] * any(isinstance(x, Apply) and x.op is op for x in items)
        return depths

    return found(kernel.body, 0)


def columns_of(text: str, rows: int, columns: str, folder: Path) -> Kernel:
    (kernel,) = group_of(text_model(text.format(rows=rows, columns=columns)), folder).kernels
    return kernel


@pytest.mark.parametrize("columns", ["64", "100", "C"])
def test_a_deviation_is_computed_once_a_column(columns: str, tmp_path: Path) -> None:
    kernel = columns_of(NORM, 30, columns, tmp_path)
    assert turns_of(kernel, Op.SQRT) == [1]
    assert turns_of(hoist_lanes(kernel), Op.SQRT) == [0]


def test_what_is_cheap_or_seldom_used_stays(tmp_path: Path) -> None:
    for kernel in (columns_of(SUMMED, 30, "64", tmp_path), columns_of(NORM, 3, "64", tmp_path)):
        assert hoist_lanes(kernel) == kernel


def test_what_the_loop_itself_computes_stays(tmp_path: Path) -> None:
    text = NORM.replace("w = Add(v, epsilon) r = Sqrt(w) y = Div(d, r)", "w = Exp(d) y = Div(w, v)")
    kernel = columns_of(text, 30, "64", tmp_path)
    assert turns_of(hoist_lanes(kernel), Op.EXP) == [1]


@pytest.mark.parametrize("columns", [1, 5, 64, 100, 1000])
def test_results_are_the_same(columns: int, tmp_path: Path, cache: Path) -> None:
    model = text_model(NORM.format(rows=30, columns="C"))
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (2, 30, 64)})
    assert not fused.unfused_nodes
    for expected, found in fused.run({"x": normal(3, 30, columns)}).values():
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_last_tile_of_an_open_axis_is_not_full(tmp_path: Path) -> None:
    kernel = hoist_lanes(columns_of(NORM, 30, "C", tmp_path))
    loops = [s for s in walk(kernel.body) if isinstance(s, Loop) and s.kind is LoopKind.LANE]
    (before,) = [s for s in loops if isinstance(c := s.body[0], Compute) and c.targets[0].buffer == "lane0"]
    assert before.limit is not None
