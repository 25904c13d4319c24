"""What whole vectors leave of a row is covered by one that starts early, whatever the row's length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, BlockBuilder, Load, Op
from apollo_fuse.index import Index, Iterator, Symbol
from apollo_fuse.kernel import Buffer, Compute, Kernel, Loop, LoopKind, Scope, Target, walk
from apollo_fuse.passes.overlap_tails import SHORTEST, overlap_tails
from models.writing import Graph
from tests.fusing import fuse_to_session
from tests.test_end_to_end import normal, text_model

SOFTMAX = "g (float[N, L] x) => (float[N, L] y) { y = Softmax<axis = -1>(x) }"
LENGTHS = [0, 1, 7, 8, 9, 15, 16, 17, 20, 24, 25, 31, 33, 100]
OPEN = Index.of(Symbol("n1"))


def windows() -> onnx.ModelProto:
    """A depthwise convolution of images of any height and width."""
    graph = Graph("windows")
    x = graph.input("x", ["N", 3, "H", "W"])
    weights = normal(3, 1, 3, 3)
    y = graph.op("Conv", graph.op("Sigmoid", x), weights, kernel_shape=[3, 3], pads=[1] * 4, group=3)
    graph.output(graph.op("Tanh", y), "y", ["N", 3, "H", "W"])
    return graph.model()


def row(length: Index, op: Op, combine: Op | None = None, target: str = "out0") -> Kernel:
    lane = Iterator("r0", length)
    builder = BlockBuilder()
    builder.add(Apply(op, (builder.add(Load("in0", (Index.of(lane),), DType.FLOAT32)),), DType.FLOAT32))
    place = Index.of(lane) if combine is None else Index.of(0)
    compute = Compute("S0", builder.build(), (Target(target, place),), combine)
    buffers = tuple(Buffer(name, DType.FLOAT32, length, Scope.GLOBAL) for name in ("in0", "out0"))
    return Kernel("k0", buffers, (), (Loop(lane, LoopKind.LANE, (compute,)),))


def lanes(kernel: Kernel) -> list[int | None]:
    """Turns of each lane loop; None where a run decides."""
    loops = [s for s in walk(kernel.body) if isinstance(s, Loop) and s.kind is LoopKind.LANE]
    return [loop.iterator.extent.constant for loop in loops]


@pytest.mark.parametrize(
    ("length", "parts"), [(20, [16, 8]), (24, [16, 8]), (30, [16, 16]), (12, [8, 8]), (100, [96, 8])]
)
def test_the_last_vector_is_the_shortest_that_does(length: int, parts: list[int]) -> None:
    assert lanes(overlap_tails(row(Index.of(length), Op.NEG))) == parts


def test_a_row_of_open_length_has_a_last_vector_too() -> None:
    assert lanes(overlap_tails(row(OPEN, Op.EXP))) == [None, SHORTEST, None]


@pytest.mark.parametrize(
    "kernel",
    [
        row(Index.of(32), Op.EXP),
        row(Index.of(7), Op.EXP),
        row(OPEN, Op.NEG),  # what is left of it takes no time
        row(OPEN, Op.EXP, Op.ADD),
        row(OPEN, Op.EXP, target="in0"),  # a second time would be another result
    ],
)
def test_other_rows_are_as_they_were(kernel: Kernel) -> None:
    assert overlap_tails(kernel) == kernel


def test_rows_of_any_length_are_whole(tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(text_model(SOFTMAX), tmp_path, cache, shapes={"x": (3, 40)})
    assert not fused.unfused_nodes
    for length in LENGTHS:
        for expected, found in fused.run({"x": normal(3, length)}).values():
            np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_windows_over_rows_of_any_length_are_whole(tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(windows(), tmp_path, cache, shapes={"x": (1, 3, 9, 20)})
    assert not fused.unfused_nodes
    for length in LENGTHS[1:]:
        for height in (1, 6):
            for expected, found in fused.run({"x": normal(2, 3, height, length)}).values():
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
