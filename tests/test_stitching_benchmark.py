"""The benchmark of stitched reductions: what it counts, and that what it compares computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from apollo_fuse import onnx_io
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.measure import Timing
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.symbolic import infer_shapes
from benchmarks.stitching import CHAINS, Chain, Result, measured, to_json, to_markdown
from benchmarks.traffic import compulsory_bytes, moved_bytes
from models import memory_bound


def group_of(model: onnx.ModelProto, folder: Path) -> KernelGroup:
    onnx.save(model, folder / "model.onnx")
    clean = onnx_io.load_clean(folder / "model.onnx", folder)
    infer_shapes(clean)
    (candidate,) = plan(clean, Options()).candidates
    return candidate.group


def test_compulsory_bytes_are_each_input_and_each_output_once(tmp_path: Path) -> None:
    group = group_of(memory_bound.layernorm(64, 512), tmp_path)
    assert compulsory_bytes(group) == 4 * (2 * 64 * 512 + 2 * 512)


def test_a_row_that_stays_near_is_counted_once(tmp_path: Path) -> None:
    group = group_of(memory_bound.layernorm(64, 512), tmp_path)
    assert moved_bytes(group) == compulsory_bytes(group)


def test_a_row_that_is_streamed_is_counted_each_time_it_is_read(tmp_path: Path) -> None:
    """The maximum, the sum and the result of a softmax each read it."""
    group = group_of(memory_bound.softmax(64, 400_000), tmp_path)
    assert moved_bytes(group) == 4 * (3 + 1) * 64 * 400_000


def test_open_extents_cannot_be_counted(tmp_path: Path) -> None:
    group = group_of(memory_bound.softmax("rows", 512), tmp_path)
    with pytest.raises(ValueError, match="without open extents"):
        moved_bytes(group)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: chain.name)
def test_kernels_written_by_hand_and_ours_agree_with_onnxruntime(chain: Chain, tmp_path: Path) -> None:
    """`measured` raises where they do not."""
    shape = (2, 64, 5, 7) if chain.name == "groupnorm" else (5, 301)
    result = measured(chain, shape, tmp_path, seconds=0.01, threads=2)
    assert (result.kernels, result.launches, result.bytes_ratio) == (1, 1, 1.0)
    assert f"| {chain.name} | {'x'.join(map(str, shape))} | 1 | 1 | 1.00x |" in to_markdown([result])
    (row,) = json.loads(to_json([result], {"CPU": "any"}))["rows"]
    assert row["shape"] == list(shape)


@pytest.mark.parametrize(
    ("least", "share", "holds"), [(1.0, 1.3, True), (1.3, 1.0, True), (1.2, 1.15, False)]
)
def test_a_row_is_over_the_bar_by_least_times_and_by_medians(least: float, share: float, holds: bool) -> None:
    by_hand, ours, unfused = Timing(1.0, 2.0, 9), Timing(least, 2.0, 9, share), Timing(3.0, 4.0, 9)
    result = Result("softmax", (64, 64), 1, 1, 100, 100, by_hand, ours, unfused, ours)
    assert result.holds == holds
    assert ("over the bar" in to_markdown([result])) == (not holds)
