"""Columns beside wide parts of the same rows are written in the work items of those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from apollo_fuse.kernel import Compute
from apollo_fuse.passes import join_columns
from models.writing import Graph
from tests.fusing import Array, fuse_to_session, kernels
from tests.interpreted import Kernels, candidates_of
from tests.interpreter import Interpreter

PARTS = 3
WIDE = 8


def encoded(rows: int | str, count: int = PARTS) -> onnx.ModelProto:
    """Numbers one-hot over eight places, each beside another number."""
    graph = Graph("encoded")
    places = np.arange(WIDE, dtype=np.float32)[None]
    parts: list[str] = []
    for n in range(count):
        hot = graph.op("Equal", graph.input(f"x{n}", [rows, 1]), places)
        parts += [graph.input(f"y{n}", [rows, 1]), graph.op("Cast", hot, to=TensorProto.FLOAT)]
    graph.output(graph.op("Concat", *parts, axis=1), "out", [rows, count * (1 + WIDE)])
    return graph.model()


def inputs(rows: int, count: int = PARTS) -> dict[str, Array]:
    random = np.random.default_rng(rows)
    x = {f"x{n}": random.integers(0, WIDE, (rows, 1)).astype(np.float32) for n in range(count)}
    return x | {f"y{n}": random.standard_normal((rows, 1)).astype(np.float32) for n in range(count)}


@pytest.mark.parametrize("rows", [1024, "rows"])
def test_cheap_columns_join_the_rows(rows: int | str, tmp_path: Path) -> None:
    (kernel,) = kernels(encoded(rows), tmp_path)
    (axis,) = kernel.grid
    assert axis.extent.constant == (rows if isinstance(rows, int) else None)
    assert sum(isinstance(step, Compute) for step in kernel.body) == PARTS


def test_a_concatenation_takes_in_more_parts_than_an_area_has_operators(tmp_path: Path) -> None:
    """Equal and Cast of each: 300 operators, and isl is asked for what is read alike just once."""
    (kernel,) = kernels(encoded(1024, 150), tmp_path)
    assert sum(isinstance(step, Compute) for step in kernel.body) == 150


def test_dear_columns_are_computed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_columns, "_CHEAP", -1)
    rows, columns = kernels(encoded(1024), tmp_path)
    assert (rows.name, columns.name) == ("k0", "k1")
    assert not any(isinstance(step, Compute) for step in (*rows.body, *columns.body))


@pytest.mark.parametrize("rows", [0, 1, 37, 1024])
def test_every_element_is_written(rows: int, tmp_path: Path, cache: Path) -> None:
    shapes = {name: array.shape for name, array in inputs(100).items()}
    fused = fuse_to_session(encoded("rows"), tmp_path, cache, shapes=shapes)
    assert not fused.unfused_nodes
    for expected, found in fused.run(inputs(rows)).values():
        np.testing.assert_array_equal(found, expected)


def test_on_a_gpu(tmp_path: Path, interpreter: Interpreter) -> None:
    clean, candidates = candidates_of(encoded(37), tmp_path)
    given = inputs(37)
    (found,) = Kernels(clean, candidates, interpreter).run(None, given)
    hot = [(given[f"x{n}"] == np.arange(WIDE)).astype(np.float32) for n in range(PARTS)]
    expected = np.concatenate([part for n in range(PARTS) for part in (given[f"y{n}"], hot[n])], axis=1)
    np.testing.assert_array_equal(found, expected)
