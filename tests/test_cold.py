"""What moves between a GPU and its memory where caches hold nothing at first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from apollo_fuse.cold import ColdTraffic, cold_traffic
from apollo_fuse.descriptions import a100
from apollo_fuse.machine import Level, Machine
from models import memory_bound
from tests.interpreted import candidates_of, emitted


def with_cache(size: int) -> Machine:
    """An A100 whose second level has another size, and that has next to nothing nearer."""
    machine = a100()
    near, second, memory = machine.levels
    near = replace(near, size=256)
    return replace(machine, levels=(near, Level("L2", size, True, second.read, second.write), memory))


def moved(model: onnx.ModelProto, folder: Path, machine: Machine) -> ColdTraffic:
    _, (candidate,) = candidates_of(model, folder)
    return cold_traffic(candidate.group, emitted(candidate).launches, {}, machine)


def test_what_fits_a_cache_still_comes_from_memory_once(tmp_path: Path) -> None:
    tensor = 4 * 64 * 1024
    assert moved(memory_bound.softmax(64, 1024), tmp_path, a100()) == ColdTraffic(2 * tensor, 2 * tensor)


def test_a_later_pass_over_rows_finds_them_in_a_cache_that_is_large_enough(tmp_path: Path) -> None:
    model = memory_bound.softmax(4096, 1024)
    small, large = (moved(model, tmp_path, with_cache(size)) for size in (1 << 10, 1 << 30))
    assert large.moved == large.compulsory == small.compulsory
    assert small.moved > 1.4 * small.compulsory


def test_what_kernels_pass_on_moves_only_where_no_cache_holds_it(tmp_path: Path) -> None:
    text = "g (float[4, 1048576] x) => (float[4, 1] y) { y = ReduceSum <keepdims = 1> (x, axes) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    _, (candidate,) = candidates_of(model, tmp_path)
    assert candidate.group.temporaries, "long rows are split into parts"
    small, large = (moved(model, tmp_path, with_cache(size)) for size in (1 << 10, 1 << 30))
    assert large.moved == pytest.approx(large.compulsory, abs=256)
    assert small.moved > large.moved
