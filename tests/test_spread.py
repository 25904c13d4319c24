"""Loops of kernels in the grid of a GPU: which may be, and what the cost model makes of them."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx.parser
import pytest

from apollo_fuse.codegen.triton.spread import spreads
from apollo_fuse.cost import cost_of
from apollo_fuse.descriptions import h100
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import KNOWN
from apollo_fuse.gpu_tiles import extents_of, group_of, tiled
from apollo_fuse.kernel import Kernel
from apollo_fuse.summary import solve
from tests.interpreted import candidates_of

MASK = """g (float[n, 12, m, m] scores, int64[n, m] mask) => (float[n, 1, 1, m] added, float[n, 12, m, m] y) {
  scale = Constant <value_float = 8.0> ()
  one = Constant <value_float = 1.0> ()
  low = Constant <value_float = -10000.0> ()
  axes = Constant <value_ints = [1, 2]> ()
  wide = Unsqueeze(mask, axes)
  kept = Cast <to = 1> (wide)
  dropped = Sub(one, kept)
  added = Mul(dropped, low)
  scaled = Div(scores, scale)
  y = Add(scaled, added)
}"""


def only(text: str, folder: Path) -> Candidate:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    _, (candidate,) = candidates_of(model, folder)
    return candidate


def grids(kernel: Kernel) -> list[str]:
    return [" ".join(f"{axis}<{axis.extent}" for axis in spread.grid) for spread in spreads(kernel)]


@pytest.fixture
def mask(tmp_path: Path) -> Candidate:
    """A mask that is added to the scores of twelve heads, which an item does in turn."""
    return only(MASK, tmp_path)


def test_heads_that_share_a_mask_can_be_programs(mask: Candidate) -> None:
    (kernel,) = mask.group.kernels
    items = "g0<n0 g1_block<floord(n1 + 127, 128)"
    assert grids(kernel) == [
        f"{items} r0_part<floord(3*n1 + 3, 4)",
        f"{items} r0_part<3*n1",
        f"{items} r0<12*n1",
    ]


def test_few_items_are_spread_and_many_are_left_alone(mask: Candidate) -> None:
    few, many = (
        solve(zip(mask.micro_graph.inputs, [(batch, 12, 128, 128), (batch, 128)], strict=True))
        for batch in (8, 100_000)
    )
    (kernel,) = mask.group.kernels
    (chosen,) = tiled([mask], few, KNOWN)[mask.name].kernels
    assert chosen in set(spreads(kernel))
    assert tiled([mask], many, KNOWN)[mask.name] == mask.group
    extents = extents_of(mask, few)
    before, after = (cost_of(group_of(mask.group, x), extents, h100()).seconds for x in (kernel, chosen))
    assert before > 10 * after


@pytest.mark.parametrize(
    "text",
    [
        # each turn adds to what the turns before it have left
        "g (float[n, 40, 128] x) => (float[n, 128] y) { axes = Constant <value_ints = [1]> () "
        "y = ReduceSum <keepdims = 0> (x, axes) }",
        # each element is the sum of those before
        "g (float[n, 40, 128] x) => (float[n, 40, 128] y) { axis = Constant <value_int = 1> () "
        "y = CumSum (x, axis) }",
        # rows are exponentials first, and divided by their sum behind all of these
        "g (float[n, 40, 128] x) => (float[n, 40, 128] y) { y = Softmax <axis = 1> (x) }",
    ],
)
def test_loops_whose_turns_need_each_other_stay_loops(text: str, tmp_path: Path) -> None:
    for kernel in only(text, tmp_path).group.kernels:
        assert not grids(kernel)
