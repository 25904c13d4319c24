"""The elementary functions of kernels against double precision, over all magnitudes and the edge values."""

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.headers import LEVELS, TOOLCHAIN, compile_library

Array = np.ndarray


def exp_nonpositive(x: Array) -> Array:
    """Without results that would be denormal."""
    return np.asarray(np.where(x < np.float32(-87.3), 0.0, np.exp(x)))


def sigmoid(x: Array) -> Array:
    e = exp_nonpositive(-np.abs(x))
    return np.asarray(np.where(x < 0, e, 1.0) / (1.0 + e))


def softplus(x: Array) -> Array:
    return np.asarray(np.maximum(x, 0) + np.log1p(exp_nonpositive(-np.abs(x))))


# The reference and the largest error allowed, in ulp: what vmath.h states, rounded up.
UNARY: dict[str, tuple[Callable[[Array], Array], float]] = {
    "expf": (np.exp, 1.1),
    "exp_nonpositivef": (exp_nonpositive, 1.1),
    "expm1f": (np.expm1, 1.7),
    "logf": (np.log, 0.9),
    "log1pf": (np.log1p, 1.0),
    "tanhf": (np.tanh, 2.6),
    "erff": (np.vectorize(math.erf, otypes=[np.float64]), 2.2),
    "sigmoidf": (sigmoid, 2.4),
    "softplusf": (softplus, 1.7),
    "sinf": (np.sin, 1.6),
    "cosf": (np.cos, 1.6),
    "near_sinf": (np.sin, 1.6),
    "near_cosf": (np.cos, 1.6),
    "rintf": (np.rint, 0.0),
    "floorf": (np.floor, 0.0),
    "ceilf": (np.ceil, 0.0),
}
TO_AND_FROM_OTHERS = {
    "half_to_float": ("uint16_t", "float"),
    "float_to_half": ("float", "uint16_t"),
    "bfloat16_to_float": ("uint16_t", "float"),
    "float_to_bfloat16": ("float", "uint16_t"),
    "is_far": ("float", "int32_t"),
}
LOOP = (
    "void loop_{name}(const {source} *restrict x, {target} *restrict y, long n) {{\n"
    '_Pragma("omp simd") for (long i = 0; i < n; i++) y[i] = af_{name}(x[i]);\n}}\n'
)
SOURCE = (
    '#include "vmath.h"\n'
    + "".join(LOOP.format(name=name, source="float", target="float") for name in UNARY)
    + "".join(
        LOOP.format(name=name, source=source, target=target)
        for name, (source, target) in TO_AND_FROM_OTHERS.items()
    )
    + "void loop_powf(const float *restrict x, const float *restrict y, float *restrict z, long n) {\n"
    '_Pragma("omp simd") for (long i = 0; i < n; i++) z[i] = af_powf(x[i], y[i]);\n}\n'
)


@pytest.fixture(scope="module", params=LEVELS, ids=lambda level: f"level{level}")
def loops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("loops")
    compile_library(SOURCE, folder, "loops", request.param)
    return ctypes.CDLL(str(folder / "loops.so"))


def call(loops: ctypes.CDLL, name: str, inputs: list[Array], dtype: type[np.generic]) -> Array:
    output = np.empty(inputs[0].shape, dtype)
    function = loops[f"loop_{name}"]
    function.argtypes = [ctypes.c_void_p] * (len(inputs) + 1) + [ctypes.c_long]
    function.restype = None
    function(*(array.ctypes.data for array in [*inputs, output]), output.size)
    return output


def edges() -> Array:
    small = [0.0, 1e-45, 1e-40, 1.1754944e-38, 1e-20, 1e-8, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    large = [
        9.01,
        16.6,
        87.3,
        88.72283,
        88.72284,
        103.97,
        104.0,
        8388607.5,
        16777216.0,
        3.4028235e38,
        math.inf,
    ]
    values = np.array([*small, *large, math.nan], np.float32)
    with np.errstate(over="ignore"):
        near = [np.nextafter(values, np.float32(limit)) for limit in (0, math.inf)]
    positive = np.concatenate([values, *near])
    return np.concatenate([positive, -positive])


def samples() -> Array:
    """Bit patterns spread over every magnitude and sign, the interesting range densely, and the edges."""
    spread = np.arange(0, 2**32, 9973, dtype=np.uint64).astype(np.uint32).view(np.float32)
    dense = np.linspace(-20, 20, 200_001, dtype=np.float32)
    return np.concatenate([spread, dense, edges()])


def halves_of_turns() -> list[Array]:
    """Multiples of pi/2, where most of an angle is taken off, and their neighbours."""
    whole = (np.arange(1, 2**18, dtype=np.float64) * (np.pi / 2)).astype(np.float32)
    return [whole, *(np.nextafter(whole, np.float32(limit)) for limit in (0, math.inf))]


def assert_close(actual: Array, exact: Array, inputs: list[Array], ulp: float) -> None:
    """NaN, inf and the sign of zero alike, and the rest within `ulp` units in the last place of `exact`."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        unit = np.spacing(np.minimum(np.abs(rounded), np.finfo(np.float32).max)).astype(np.float64)
        # A result next to the largest float may round to inf and the other way round.
        ends = np.isinf(actual) != np.isinf(rounded)
        largest = float(np.finfo(np.float32).max)
        error = np.where(ends, np.abs(np.clip(actual, -largest, largest) - exact) / unit, 0.0)
        both = np.isfinite(actual) & np.isfinite(rounded)
        error = np.where(both, np.abs(actual.astype(np.float64) - exact) / unit, error)
    wrong = (error > ulp) | (np.isnan(actual) != np.isnan(rounded))
    wrong |= ~np.isnan(rounded) & (np.signbit(actual) != np.signbit(rounded))
    at = np.flatnonzero(wrong)[:5]
    found = [array[at].tolist() for array in inputs]
    assert not wrong.any(), f"at {found}: {actual[at]}, expected {exact[at]}, {error[at]} ulp"


@pytest.mark.parametrize("name", UNARY)
def test_a_function_is_accurate(loops: ctypes.CDLL, name: str) -> None:
    reference, ulp = UNARY[name]
    x = samples()
    if name == "exp_nonpositivef":
        x = x[~(x > 0)]
    if name.startswith("near_"):
        x = np.concatenate([x, *halves_of_turns()])
        x = x[np.abs(x) < 2**18]
    with np.errstate(all="ignore"):
        exact = reference(x.astype(np.float64))
    assert_close(call(loops, name, [x], np.float32), exact, [x], ulp)


def test_the_power_is_accurate(loops: ctypes.CDLL) -> None:
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(edges(), edges())).reshape(2, -1)
    wide = random.integers(0, 2**32, (2, 200_000), dtype=np.uint32).view(np.float32)
    usual = np.stack([random.uniform(0, 4, 200_000), random.uniform(-60, 60, 200_000)]).astype(np.float32)
    near_one = np.stack([random.uniform(0.999, 1.001, 200_000), random.uniform(-9e4, 9e4, 200_000)])
    whole = np.stack([random.uniform(-9, 9, 200_000), random.integers(-40, 40, 200_000)])
    x, y = np.concatenate([grid, wide, usual, near_one, whole], axis=1, dtype=np.float32)
    with np.errstate(all="ignore"):
        exact = np.power(x.astype(np.float64), y.astype(np.float64))
    assert_close(call(loops, "powf", [x.copy(), y.copy()], np.float32), exact, [x, y], 0.51)


def test_only_angles_that_the_near_form_holds_for_are_near(loops: ctypes.CDLL) -> None:
    x = samples()
    far = call(loops, "is_far", [x], np.int32)
    with np.errstate(all="ignore"):
        exact = np.sin(x.astype(np.float64))
    near = x[far == 0]
    assert_close(call(loops, "near_sinf", [near], np.float32), exact[far == 0], [near], 1.6)
    assert near.size > x.size / 3


@pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_a_narrow_format_is_widened_exactly(loops: ctypes.CDLL, name: str, dtype: type[np.generic]) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    expected = every.view(dtype).astype(np.float32)
    actual = call(loops, f"{name}_to_float", [every], np.float32)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(np.signbit(actual), np.signbit(expected))


@pytest.mark.parametrize(("name", "dtype"), [("half", np.float16), ("bfloat16", ml_dtypes.bfloat16)])
def test_a_narrow_format_is_rounded_to_nearest_even(
    loops: ctypes.CDLL, name: str, dtype: type[np.generic]
) -> None:
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    with np.errstate(over="ignore"):
        ties = ((every[:-1].astype(np.float64) + every[1:]) / 2).astype(np.float32)
    x = np.concatenate(
        [samples(), every, ties, np.nextafter(ties, np.float32(0)), ties * np.float32(1 + 2**-23)]
    )
    with np.errstate(all="ignore"):
        expected = x.astype(dtype)
    actual = call(loops, f"float_to_{name}", [x], np.uint16)
    number = ~np.isnan(x)
    np.testing.assert_array_equal(actual[number], expected.view(np.uint16)[number])
    assert np.isnan(actual[~number].view(dtype).astype(np.float32)).all()


@pytest.mark.skipif("Free Software Foundation" not in TOOLCHAIN.identification, reason="reads gcc's report")
@pytest.mark.skipif(TOOLCHAIN.cpu.level not in (3, 4), reason="sine and cosine need gathers")
def test_every_loop_is_vectorised(tmp_path: Path) -> None:
    report = compile_library(
        SOURCE, tmp_path, "loops", TOOLCHAIN.cpu.level, "-fopt-info-vec-optimized"
    ).stderr
    vectorised = {int(line.split(":")[1]) for line in report.splitlines() if "loop vectorized" in line}
    loops = {number for number, line in enumerate(SOURCE.splitlines(), 1) if "omp simd" in line}
    assert loops <= vectorised, [SOURCE.splitlines()[number - 2] for number in loops - vectorised]
