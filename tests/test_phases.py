"""Short rows go through a kernel together: as one by one, to the bit, whatever their number."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.codegen import c
from apollo_fuse.expressions import Op
from apollo_fuse.index import ZERO
from apollo_fuse.kernel import Initialise, Kernel, Loop, Target
from apollo_fuse.passes import phases as passes
from apollo_fuse.passes.phases import items_together, phases, through_a_phase
from apollo_fuse.tolerance import compare
from tests.fusing import fuse_to_session, kernels, planned
from tests.headers import LEVELS, compile_library
from tests.test_end_to_end import normal, text_model

CHAINS = {
    "softmax": "y = Softmax(x)",
    "log-softmax": "s = Mul(x, x) y = LogSoftmax(s)",
    "layer norm": "y = LayerNormalization(x, w, b)",
    "norm and softmax": "n = LayerNormalization(x, w, b) y = Softmax(n)",
    "a sum of exponentials": "m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) y = ReduceSum(e, last)",
}


def rows_of(name: str, rows: int | str, columns: int | str) -> onnx.ModelProto:
    text = f"g (float[{rows}, {columns}] x) => (float[] y) {{ {CHAINS[name]} }}"
    scales = {} if isinstance(columns, str) else {"w": normal(columns), "b": normal(columns)}
    model = text_model(text, last=np.array([-1]), **scales)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


@pytest.mark.parametrize("columns", [7, 49, 64, 197])
@pytest.mark.parametrize("name", CHAINS)
def test_rows_are_what_they_are_one_by_one(
    name: str, columns: int, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rows_of(name, "N", columns)
    for folder in ("together", "apart"):
        (tmp_path / folder).mkdir()
    together = fuse_to_session(model, tmp_path / "together", cache, shapes={"x": (9, columns)})
    monkeypatch.setattr(passes, "_MOST", 1)
    apart = fuse_to_session(model, tmp_path / "apart", cache, shapes={"x": (9, columns)})
    assert not together.unfused_nodes
    for rows in (1, 7, 8, 9, 100):
        x = normal(rows, columns)
        x[0, 0] = np.nan if rows == 9 else x[0, 0]
        (found,), (expected,) = (f.fused.run(None, {"x": x}) for f in (together, apart))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["softmax", "log-softmax", "a sum of exponentials"])
def test_how_many_rows_of_open_length_go_together_follows_from_it(
    name: str, tmp_path: Path, cache: Path
) -> None:
    fused = fuse_to_session(rows_of(name, "N", "M"), tmp_path, cache, shapes={"x": (9, 30)})
    for shape in ((9, 30), (17, 1), (3, 5000), (20, 700), (5, 0)):
        ((expected, found),) = fused.run({"x": normal(*shape)}).values()
        difference = compare(name, expected, found)
        assert difference.passed, (shape, difference)


def test_a_phase_starts_with_what_waits(tmp_path: Path) -> None:
    (kernel,) = kernels(rows_of("softmax", 100, 49), tmp_path)
    parts = phases(kernel)
    assert [len(_loops(part.steps)) for part in parts] == [1, 1, 1]
    assert [(len(part.takes), len(part.leaves)) for part in parts] == [(0, 1), (1, 1), (1, 0)]
    assert [isinstance(part.steps[0], Initialise) for part in parts] == [True, True, False]


@pytest.mark.parametrize(
    ("columns", "with_avx2", "with_avx512"), [(16, 8, 8), (49, 5, 8), (128, 2, 4), (256, 1, 2), (768, 1, 1)]
)
def test_long_rows_go_one_by_one(columns: int, with_avx2: int, with_avx512: int, tmp_path: Path) -> None:
    (candidate,) = planned(rows_of("layer norm", 100, columns), tmp_path).candidates
    (kernel,) = candidate.group.kernels
    turns = through_a_phase(kernel, phases(kernel))
    assert turns.constant == columns
    assert [items_together(columns, vector) for vector in (32, 64)] == [with_avx2, with_avx512]
    text = c.emit(candidate.group, "norm", "a layer norm")
    assert (f"af_items_together({columns}, " in text) == (with_avx512 > 1) == ("item++" not in text)


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_take_as_many_together_as_is_predicted(level: int, tmp_path: Path) -> None:
    call = "int together(int turns) { return (int)af_items_together(turns, 32, 8); }"
    compile_library(f'#include "kernel.h"\n{call}', tmp_path, "together", level)
    together = ctypes.CDLL(str(tmp_path / "together.so")).together
    for turns in range(1000):
        assert together(turns) == items_together(turns, {4: 64, 3: 32}.get(level, 16))


def test_nothing_that_waits_is_one_phase(tmp_path: Path) -> None:
    model = text_model("g (float[64, 48] x) => (float[64, 48] y) { e = Exp(x) y = Tanh(e) }")
    for kernel in kernels(model, tmp_path):
        assert [part.steps for part in phases(kernel)] == [kernel.body]


def test_a_register_that_is_used_again_keeps_rows_apart(tmp_path: Path) -> None:
    (kernel,) = kernels(rows_of("softmax", 100, 49), tmp_path)
    start = next(s for s in kernel.body if isinstance(s, Initialise))
    again = (*kernel.body, Initialise(Target(start.target.buffer, ZERO), Op.MAX), *_loops(kernel.body)[:1])
    twice = Kernel(kernel.name, kernel.buffers, kernel.grid, again)
    assert [part.steps for part in phases(twice)] == [again]


def _loops(steps: tuple[object, ...]) -> list[Loop]:
    return [step for step in steps if isinstance(step, Loop)]
