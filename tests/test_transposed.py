"""Tiles that are read along one axis and written along another are moved as a whole, unchanged."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_fuse.codegen.transposed import in_blocks, transposed
from apollo_fuse.kernel import Loop, walk
from apollo_fuse.tolerance import compare
from tests.fusing import fuse_to_session, kernels
from tests.headers import LEVELS, compile_library
from tests.test_end_to_end import text_model

BITS = (8, 16, 32, 64)
SOURCE = '#include "transpose.h"\n' + "".join(
    f"void turn{bits}(void *to, int64_t to_row, const void *from, int64_t from_row, "
    "int64_t rows, int64_t columns) {"
    f"\n  af_transpose_{bits}(to, to_row, from, from_row, rows, columns);\n}}\n"
    f"void turn_at{bits}(void *to, const int64_t *to_at, const void *from, const int64_t *from_at, "
    "int64_t rows, int64_t columns) {"
    f"\n  af_transpose_at_{bits}(to, 0, to_at, from, 0, from_at, rows, columns);\n}}\n"
    for bits in BITS
)


@pytest.fixture(scope="module", params=LEVELS, ids=lambda level: f"level{level}")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("transpose")
    compile_library(SOURCE, folder, "turn", request.param)
    return ctypes.CDLL(str(folder / "turn.so"))


@pytest.mark.parametrize("bits", BITS)
def test_a_tile_of_any_size_is_turned_and_nothing_beside_it_is_touched(
    library: ctypes.CDLL, bits: int
) -> None:
    function = library[f"turn{bits}"]
    number = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p, number, ctypes.c_void_p, number, number, number]
    function.restype = None
    dtype = np.dtype(f"u{bits // 8}")

    @given(st.integers(0, 40), st.integers(0, 70), st.integers(0, 3), st.integers(0, 3))
    def check(rows: int, columns: int, beside: int, below: int) -> None:
        generator = np.random.default_rng(rows * 100 + columns)
        source = generator.integers(0, 256, (columns + 1, (rows + below) * dtype.itemsize), np.uint8)
        before = generator.integers(0, 256, (rows + 1, (columns + beside) * dtype.itemsize), np.uint8)
        source, target = source.view(dtype), before.view(dtype).copy()
        expected = target.copy()
        expected[:rows, :columns] = source[:columns, :rows].T
        function(target.ctypes.data, columns + beside, source.ctypes.data, rows + below, rows, columns)
        np.testing.assert_array_equal(target, expected)

    check()


@pytest.mark.parametrize("bits", BITS)
def test_rows_may_lie_anywhere(library: ctypes.CDLL, bits: int) -> None:
    function = library[f"turn_at{bits}"]
    number = ctypes.c_int64
    function.argtypes = [ctypes.c_void_p] * 4 + [number, number]
    function.restype = None
    dtype = np.dtype(f"u{bits // 8}")
    for rows, columns in ((16, 64), (5, 9), (40, 3), (1, 1), (19, 33)):
        generator = np.random.default_rng(rows)
        source = generator.integers(0, 256, (columns, rows * dtype.itemsize), np.uint8).view(dtype)
        target = np.zeros((rows, columns), dtype)
        from_at, to_at = (np.int64(generator.permutation(n)) for n in (columns, rows))
        tables = [np.ascontiguousarray(at * n) for at, n in ((to_at, columns), (from_at, rows))]
        function(
            target.ctypes.data,
            tables[0].ctypes.data,
            source.ctypes.data,
            tables[1].ctypes.data,
            rows,
            columns,
        )
        np.testing.assert_array_equal(target[to_at], source[from_at].T)


def values(dtype: str) -> Callable[..., np.ndarray]:
    generator = np.random.default_rng(3)
    kind = np.dtype(dtype)

    def make(*shape: int) -> np.ndarray:
        if kind.kind in "iu":
            return generator.integers(0, 100, shape).astype(kind)
        if kind.kind == "b":
            return generator.integers(0, 2, shape).astype(kind)
        return generator.standard_normal(shape).astype(kind)

    return make


READ = """g ({T}[A, B, C] x) => ({T}[A, C, B] y)
  {{ t = Transpose<perm = [0, 2, 1]>(x) y = Add(t, t) }}"""
TWO = """g ({T}[A, B] x, {T}[A, B] z, {T}[B, A] w) => ({T}[B, A] y, {T}[A, B] v)
  {{ a = Mul(x, z) v = Add(a, x) t = Transpose<perm = [1, 0]>(a) y = Add(t, w) }}"""
"""One tensor is written turned, or another read so: whichever the lanes run along."""
BOTH = """g ({T}[A, B] x, {T}[A, B] z) => ({T}[B, A] y)
  {{ s = Transpose<perm = [1, 0]>(x) t = Transpose<perm = [1, 0]>(z) m = Mul(s, t) y = Sub(m, s) }}"""
MASK = """g (bool[A, B] x, bool[B, A] z) => (bool[B, A] y)
  {{ s = Transpose<perm = [1, 0]>(x) n = Not(s) y = And(n, z) }}"""


EXTENTS = ((1, 1, 1), (3, 5, 7), (2, 33, 65), (2, 64, 32), (1, 100, 130), (0, 4, 9))


@pytest.mark.parametrize("text", [READ, TWO, BOTH], ids=["read", "two", "both"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("float", "f4"), ("double", "f8"), ("float16", "f2"), ("int32", "i4"), ("int64", "i8")],
)
def test_kernels_that_turn_tensors(text: str, name: str, dtype: str, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(text_model(text.format(T=name)), tmp_path, cache)
    assert not fused.unfused_nodes
    make = values(dtype)
    for extents in EXTENTS:
        sizes = dict(zip("ABC", extents, strict=True))
        inputs = fused.original.get_inputs()
        feeds = {x.name: make(*(sizes[str(axis)] for axis in x.shape)) for x in inputs}
        for output, (expected, found) in fused.run(feeds).items():
            difference = compare(output, expected, found)
            assert difference.passed, difference


def test_masks_are_turned_as_the_bytes_they_are(tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(text_model(MASK.format()), tmp_path, cache)
    make = values("?")
    for expected, found in fused.run({"x": make(70, 45), "z": make(45, 70)}).values():
        np.testing.assert_array_equal(found, expected)


COLUMNS = """g (float[N, {rows}, 64] x) => (float[N, 64, {rows}] y) <int64[1] axes = {{1}}>
  {{ s = ReduceSum(x, axes) d = Sub(x, s) t = Tanh(d) y = Transpose<perm = [0, 2, 1]>(t) }}"""


@pytest.mark.parametrize(
    ("rows", "blocks"), [(32, 0), (64, 0), (512, 1), (500, 1), ("R", 1)], ids=lambda value: str(value)
)
def test_tiles_of_long_loops_are_turned_block_by_block(
    rows: int | str, blocks: int, tmp_path: Path, cache: Path
) -> None:
    """What is written turned would fill an array of `rows` by 64, which is not to leave the nearest cache."""
    model = text_model(COLUMNS.format(rows=rows))
    (kernel,) = kernels(model, tmp_path)
    found = in_blocks(kernel)
    loops = [s for s in walk(found.body) if isinstance(s, Loop) and transposed(found, s) is not None]
    assert loops[0].iterator.extent.constant == (32 if blocks else rows)
    assert (found == kernel) == (not blocks)
    fused = fuse_to_session(
        model, tmp_path, cache, shapes={"x": (2, rows if isinstance(rows, int) else 77, 64)}
    )
    assert not fused.unfused_nodes
    for extent in (rows,) if isinstance(rows, int) else (0, 1, 31, 32, 33, 500):
        x = np.random.default_rng(0).standard_normal((3, extent, 64)).astype(np.float32) / 30
        for expected, result in fused.run({"x": x}).values():
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
