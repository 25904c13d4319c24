"""onnxruntime's operators on small integers, bit for bit, on every pair of operands and odd scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.test_operators import Case, Dims, Table, check, fused, shapes, sized, values
from tests.test_symbolic import shapes_of

MICROSOFT = "com.microsoft"
KINDS = ("int8", "uint8")
EVERY = 256


def scaled(kind: str, seed: int, *names: str) -> dict[str, np.ndarray]:
    """For each name a scale and a zero point, `name`s and `name`z."""
    random, limits = np.random.default_rng(seed), np.iinfo(kind)
    found = {f"{name}s": np.array(random.uniform(0.001, 0.1), np.float32) for name in names}
    return found | {f"{name}z": np.array(random.integers(limits.min, limits.max + 1), kind) for name in names}


def pairs(kind: str, seed: int) -> Table:
    """Every pair of two operands, in each way that one can be repeated."""
    forms: dict[str, Dims] = {"row": [EVERY], "column": [EVERY, 1], "one": [], "longer": [2, 1, EVERY]}
    inputs: dict[str, tuple[str, Dims]] = {"a": (kind, ["n", EVERY]), "b": (kind, ["n", EVERY])}
    inputs |= {name: (kind, dims) for name, dims in forms.items()}
    cases = [
        Case(op, f"{a} as az {b} bs bz cs {last}".strip(), domain=MICROSOFT)
        for op in ("QLinearAdd", "QLinearMul")
        for a, b in (("a", "b"), ("row", "column"), ("column", "row"), ("a", "one"), ("one", "a"), ("longer", "column"))
        for last in ("cz", "")
    ]  # fmt: skip
    return Table(inputs, cases, scaled(kind, seed, "a", "b", "c"))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_sums_and_products(kind: str, seed: int, tmp_path: Path, cache: Path) -> None:
    table = pairs(kind, seed)
    model = fused(table, tmp_path, cache, {"a": (2, EVERY), "b": (2, EVERY)})
    every = np.arange(EVERY).astype(kind)
    feeds = {"row": every, "column": every[:, None], "longer": np.stack([every, every[::-1]])[:, None]}
    for n in (3, 1, 0):
        check(model, sized(table, {"n": n}) | feeds, exact=True)
    grid = {"a": np.repeat(every[:, None], EVERY, 1), "b": np.repeat(every[None], EVERY, 0)}
    for one in every[::51]:
        check(model, feeds | grid | {"one": np.array(one)}, exact=True)


def functions(kind: str, seed: int) -> Table:
    inputs: dict[str, tuple[str, Dims]] = {
        "x": (kind, ["n", 4, 64]), "y": (kind, ["n", 4, 64]), "row": (kind, [64]), "c": ("bool", ["n", 1, 64]),
    }  # fmt: skip
    constants = scaled(kind, seed, "x", "y", "z", "row")
    constants |= {"s": np.array(1 / 256, np.float32), "low": np.array(np.iinfo(kind).min, kind)}
    cases = [
        Case("QLinearSigmoid", "x xs xz s low", domain=MICROSOFT), Case("QLinearSigmoid", "x xs - ys yz", domain=MICROSOFT),
        Case("QLinearLeakyRelu", "x xs xz ys yz", {"alpha": 0.3}, MICROSOFT), Case("QLinearLeakyRelu", "x xs xz ys yz", domain=MICROSOFT),
        Case("QLinearWhere", "c x xs xz y ys yz zs zz", domain=MICROSOFT), Case("QLinearWhere", "c x xs xz row rows rowz xs xz", domain=MICROSOFT),
        Case("QLinearConcat", "zs zz x xs xz y ys yz", {"axis": 1}, MICROSOFT), Case("QLinearConcat", "ys yz x xs xz y ys yz", {"axis": -1}, MICROSOFT),
        Case("QLinearConcat", "ys yz x xs xz", {"axis": 0}, MICROSOFT),
    ]  # fmt: skip
    return Table(inputs, cases, constants)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_functions(kind: str, seed: int, tmp_path: Path, cache: Path) -> None:
    table = functions(kind, seed)
    model = fused(table, tmp_path, cache, shapes(sized(table, {"n": 2})))
    every = np.arange(EVERY).astype(kind).reshape(1, 4, 64)
    for n in (3, 1, 0):
        check(model, sized(table, {"n": n}), exact=True)
    check(model, sized(table, {"n": 1}) | {"x": every, "y": every[:, ::-1]}, exact=True)


def softmaxes(kind: str) -> Table:
    cases = [
        Case("QLinearSoftmax", f"x {scale} {zero} {result} low", {"opset": opset, **axis}, MICROSOFT)
        for scale, zero, result in (("xs", "xz", "s"), ("coarse", "-", "s"), ("xs", "xz", "odd"))
        for opset, axis in ((13, {}), (13, {"axis": 1}), (12, {"axis": 1}), (12, {}))
    ]
    constants = scaled(kind, 5, "x") | {
        "s": np.array(1 / 256, np.float32), "odd": np.array(0.0047, np.float32), "coarse": np.array(1.7, np.float32),
        "low": np.array(np.iinfo(kind).min, kind),
    }  # fmt: skip
    return Table({"x": (kind, ["n", 6, 37])}, cases, constants)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_softmax(kind: str, tmp_path: Path, cache: Path) -> None:
    """A row in which one is certain gives 256 steps, one more than there are."""
    model = fused(softmaxes(kind), tmp_path, cache, {"x": (2, 6, 37)})
    for n, special in ((3, False), (4, True), (1, False)):
        check(model, {"x": values(kind, (n, 6, 37), special=special)}, exact=True)
    random = np.random.default_rng(0)
    check(model, {"x": random.integers(0, EVERY, (16, 6, 37)).astype(np.uint8).view(kind)}, exact=True)


POOLED: Sequence[tuple[str, dict[str, object]]] = (
    ("x", {"kernel_shape": [2, 2], "strides": [2, 2]}), ("x", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("x", {"kernel_shape": [3, 2], "pads": [0, 1, 2, 0], "strides": [2, 1], "count_include_pad": 1}),
    ("x", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}), ("x", {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}),
    ("line", {"kernel_shape": [4], "strides": [3]}),
)  # fmt: skip


def pools(kind: str, seed: int = 0) -> Table:
    cases = [
        Case("QLinearAveragePool", f"{x} xs xz {scale}", attributes, MICROSOFT)
        for x, attributes in POOLED
        for scale in ("ys yz", "xs xz", "ys")
    ]
    cases += [
        Case("QLinearGlobalAveragePool", f"{x} xs xz {scale}", {"channels_last": last}, MICROSOFT)
        for x in ("x", "line")
        for scale in ("ys yz", "xs xz")
        for last in (0, 1)
    ]
    inputs: dict[str, tuple[str, Dims]] = {"x": (kind, ["n", 3, 7, 9]), "line": (kind, ["n", 5, 12])}
    return Table(inputs, cases, scaled(kind, seed, "x", "y"))


def test_pools_have_the_shapes_that_their_windows_leave(tmp_path: Path) -> None:
    table = pools("int8")
    cases = [case for case in table.cases if case.reads == "x xs xz ys yz"]
    shapes = shapes_of(table.model(cases), tmp_path).values()
    last = ("3, 3, 4", "3, 7, 9", "3, 4, 9", "3, 3, 4", "3, 7, 9", "3, 1, 1", "1, 1, 9")
    assert list(shapes) == [f"1, s0, {extents}" for extents in last]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_pools(kind: str, seed: int, tmp_path: Path, cache: Path) -> None:
    """Where both scales are one, every other mean of two lies between two integers."""
    table = pools(kind, seed)
    model = fused(table, tmp_path, cache, shapes(sized(table, {"n": 2})))
    for n, special in ((3, False), (4, True), (1, False)):
        check(model, sized(table, {"n": n}, special=special), exact=True)
    random = np.random.default_rng(0)
    feeds = {name: random.integers(0, EVERY, x.shape).astype(np.uint8).view(kind) for name, x in sized(table, {"n": 9}).items()}  # fmt: skip
    check(model, feeds, exact=True)
