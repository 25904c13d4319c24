"""Chains of maxima and minima are taken among numbers, and a NaN in any place of them is still passed on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apollo_fuse.codegen.maxima import chains
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, BlockBuilder, Constant, Load, Op
from tests.fusing import fuse_to_session
from tests.test_end_to_end import text_model

F32 = DType.FLOAT32


def maxima_of(*values: Load | Constant, op: Op = Op.MAX) -> BlockBuilder:
    """The values combined one after the other."""
    builder = BlockBuilder()
    found, *others = [builder.add(value) for value in values]
    for other in others:
        found = builder.add(Apply(op, (found, other), F32))
    return builder


def loads(count: int, dtype: DType = F32) -> list[Load]:
    return [Load(f"in{n}", (), dtype) for n in range(count)]


def test_a_chain_ends_where_another_operator_reads_it() -> None:
    builder = maxima_of(*loads(3))
    middle, end = 3, 4
    builder.add(Apply(Op.ADD, (end, end), F32))
    found = chains(builder.build())
    assert (found.inner, found.values) == ({middle}, {end: (0, 1, 2)})


def test_what_is_needed_elsewhere_is_a_value_of_the_chain() -> None:
    builder = maxima_of(*loads(5))
    middle, end = 6, 8  # of three values, and of all
    builder.add(Apply(Op.ADD, (middle, end), F32))
    found = chains(builder.build())
    assert found.values == {middle: (0, 1, 2), end: (middle, 3, 4)}
    assert found.inner == {5, 7}


def test_constants_are_no_nans_to_look_for() -> None:
    assert not chains(maxima_of(*loads(2), Constant(0.0, F32)).build()).values
    unordered = maxima_of(*loads(2), Constant(float("nan"), F32)).build()
    assert list(chains(unordered).values.values()) == [(0, 1, 2)]


def test_maxima_of_minima_are_two_chains() -> None:
    builder = maxima_of(*loads(3), op=Op.MIN)
    least = 4
    others = [builder.add(Load(f"x{n}", (), F32)) for n in range(2)]
    first = builder.add(Apply(Op.MAX, (least, others[0]), F32))
    last = builder.add(Apply(Op.MAX, (first, others[1]), F32))
    assert chains(builder.build()).values == {least: (0, 1, 2), last: (least, *others)}


@pytest.mark.parametrize("op", ["Max", "Min"])
@pytest.mark.parametrize("kind", ["float", "double", "float16"])
def test_a_nan_in_any_operand_is_passed_on(op: str, kind: str, tmp_path: Path, cache: Path) -> None:
    names = "abcde"
    operands = ", ".join(f"{kind}[N, 40] {name}" for name in names)
    text = f"g ({operands}) => ({kind}[N, 40] y) {{ z = {op}(a, b, c, d, e) y = Neg(z) }}"
    fused = fuse_to_session(text_model(text), tmp_path, cache, shapes={n: (6, 40) for n in names})
    dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
    values = np.random.default_rng(5).standard_normal((5, 6, 40)).astype(dtype)
    for place in range(5):
        values[place, place, :7] = np.nan
    values[:, 5, :3], values[:, 5, 3:6] = np.inf, -np.inf
    values[:2, 5, 9] = np.nan
    found = fused.fused.run(None, dict(zip(names, values, strict=True)))[0]
    combined = values.max(axis=0) if op == "Max" else values.min(axis=0)
    np.testing.assert_array_equal(found, -combined)


def test_a_nan_at_any_tap_of_a_padded_window_is_passed_on(tmp_path: Path, cache: Path) -> None:
    window = "kernel_shape = [3, 3], pads = [1, 1, 1, 1]"
    text = f"g (float[1, 2, 24, 40] x) => (float[1, 2, 24, 40] y) {{ z = MaxPool <{window}> (x) y = Neg(z) }}"
    fused = fuse_to_session(text_model(text), tmp_path, cache)
    x = np.random.default_rng(6).standard_normal((1, 2, 24, 40)).astype(np.float32)
    for row, column in ((0, 0), (0, 20), (12, 39), (23, 5), (9, 17)):
        x[0, 1, row, column] = np.nan
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=-np.inf)
    taps = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    np.testing.assert_array_equal(fused.fused.run(None, {"x": x})[0], -taps.max(axis=(-1, -2)))
