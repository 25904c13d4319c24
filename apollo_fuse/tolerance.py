"""How far a fused result may lie from onnxruntime's: the one table, and who is right beyond it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apollo_fuse.dtypes import DType

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]
Doubles = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# Relative to the value, and absolute in units of the largest magnitude that went into it.  Fused and
# unfused kernels round at different places and sum in different orders; neither is nearer the truth.
# Where they differ by more, `nearer` asks which is.
RELATIVE = {
    DType.FLOAT64: 1e-10,
    DType.FLOAT32: 2e-4,
    DType.FLOAT16: 1e-2,
    DType.BFLOAT16: 5e-2,
}
ABSOLUTE = {
    DType.FLOAT64: 1e-11,
    DType.FLOAT32: 2e-5,
    DType.FLOAT16: 5e-3,
    DType.BFLOAT16: 2e-2,
}
# Allowed whatever the magnitude: onnxruntime's sigmoid and tanh are this near to saturation, no nearer.
FLOOR = {DType.FLOAT64: 1e-14, DType.FLOAT32: 1e-6, DType.FLOAT16: 1e-4, DType.BFLOAT16: 1e-3}
NEARER = 1.0
"""A result that differs by more is right where its errors against doubles, the greatest and the root of their
mean square, are at most this share of onnxruntime's."""
FARTHEST = 10.0
"""Tolerances from doubles beyond which a result is wrong, however far onnxruntime's is."""


UNSTEADY = 2.0
"""A result may be off by this many times as much as onnxruntime's own is where inputs move by a last bit."""


@dataclass(frozen=True, slots=True)
class Difference:
    """`absolute` and `relative` are the greatest found; `problem` says what exceeds its tolerance, if so."""

    absolute: float
    relative: float
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem


def compare(name: str, expected: Array, found: Array, coarsest: DType | None = None) -> Difference:
    """Integers and booleans must be equal; NaN must meet NaN, and infinities their like.

    `coarsest` is the floating-point type of least precision on the way to the result, where that is another
    than the result's own: doubles that were computed in single precision agree to single precision.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        wanted, got = f"{expected.dtype}{list(expected.shape)}", f"{found.dtype}{list(found.shape)}"
        return Difference(np.inf, np.inf, f"{name} is {got}, expected {wanted}")
    dtype = _precision(expected, coarsest)
    if dtype is None:
        wrong = int(np.count_nonzero(_comparable(expected) != _comparable(found)))
        problem = f"{name} differs in {wrong} of {expected.size} elements" if wrong else ""
        return Difference(float(wrong > 0), float(wrong > 0), problem)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if where := _unlike(a, b):
        return Difference(np.inf, np.inf, f"{name} has NaN or infinity in other places ({where} elements)")
    a, b = a[finite], b[finite]
    if not a.size:
        return Difference(0.0, 0.0, "")
    error = np.abs(a - b)
    scale, allowed = _allowed(a, dtype)
    worst = int(np.argmax(error - allowed))
    relative = float((error / np.maximum(np.abs(a), scale * 1e-3 + FLOOR[dtype])).max())
    problem = ""
    if error[worst] > allowed[worst]:
        problem = f"{name} is {b[worst]:.9g} where {a[worst]:.9g} is expected"
    return Difference(float(error.max()), relative, problem)


def _comparable(array: Array) -> Array:
    """Floats of 8 bits as their bits, so that a NaN equals itself."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 and array.dtype.kind in "fV" else array


@dataclass(frozen=True, slots=True)
class Nearer:
    """`right` says whether a result that differs from onnxruntime's is the better one, and `evidence` why."""

    right: bool
    evidence: str


def nearer(truth: Doubles, expected: Array, found: Array, coarsest: DType | None = None) -> Nearer:
    """Whether `found` is nearer than onnxruntime's `expected` to what both would be in doubles, `truth`.

    Of booleans none is nearer; nor of floats that are not finite in the same places. Integers are right where
    the truth rounds to them, give or take the tolerance of floats. For `coarsest` see `compare`.
    """
    dtype = _precision(expected, coarsest)
    if dtype is None:
        return _rounded(truth, found, coarsest or DType.FLOAT32)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    if truth.shape != a.shape or _unlike(truth, a) or _unlike(truth, b):
        return Nearer(False, "in doubles NaN or infinity is in other places")
    finite = np.isfinite(truth)
    _, allowed = _allowed(truth[finite], dtype)
    theirs, ours = (np.abs(x[finite] - truth[finite]) / allowed for x in (a, b))
    largest = float(ours.max()) <= min(NEARER * float(theirs.max()), FARTHEST)
    typical = float(np.square(ours).mean()) <= NEARER**2 * float(np.square(theirs).mean())
    evidence = f"off from doubles by {ours.max():.2g} tolerances, onnxruntime by {theirs.max():.2g}"
    return Nearer(largest and typical, evidence)


def unsteady(expected: Array, found: Array, moved: Sequence[Array]) -> Nearer:
    """Whether onnxruntime's `expected` is so uncertain that `found` is as good a result.

    `moved` are onnxruntime's results for inputs that differ in their last bit. The greatest difference and
    the root of the mean square decide, as in `nearer`; integers and booleans are certain.
    """
    if _precision(expected, None) is None:
        return Nearer(False, "")
    a = expected.astype(np.float64)
    finite = np.isfinite(a)

    def distances(other: Array) -> tuple[float, float]:
        b = other.astype(np.float64)
        if b.shape != a.shape or _unlike(a, b):
            return np.inf, np.inf
        error = np.abs(b[finite] - a[finite])
        return float(error.max(initial=0.0)), float(np.sqrt(np.square(error).mean()))

    ours, theirs = distances(found), [d for d in map(distances, moved) if np.isfinite(d).all()]
    if not theirs or not np.isfinite(ours).all():
        return Nearer(False, "")
    largest, typical = (max(column) for column in zip(*theirs, strict=True))
    evidence = f"by up to {largest:.2g} onnxruntime's own result moves where inputs move by their last bit"
    return Nearer(ours[0] <= UNSTEADY * largest and ours[1] <= UNSTEADY * typical, evidence)


def _rounded(truth: Doubles, found: Array, precision: DType) -> Nearer:
    """Whether these integers are what numbers round to that are within the tolerance of the truth."""
    kind = next((d for d in DType if d.is_integer and d.numpy == found.dtype), None)
    if kind is None or truth.shape != found.shape or not np.isfinite(truth).all():
        return Nearer(False, "")
    _, allowed = _allowed(truth, precision)
    beyond = np.abs(found - np.clip(truth, *kind.integer_range)) - 0.5
    if (beyond > allowed).any():
        return Nearer(False, "")
    return Nearer(
        True, f"{max(float(beyond.max()), 0.0):.2g} of a step from where doubles round to it at most"
    )


def _precision(expected: Array, coarsest: DType | None) -> DType | None:
    """The type whose tolerances hold; None for integers and booleans."""
    dtype = next((d for d in RELATIVE if d.numpy == expected.dtype), None)
    if dtype is None or coarsest is None or RELATIVE[coarsest] <= RELATIVE[dtype]:
        return dtype
    return coarsest


def _unlike(a: Doubles, b: Doubles) -> int:
    """The places where not NaN meets NaN, an infinity its like, or a number a number."""
    alike = (a == b) | (np.isnan(a) & np.isnan(b)) | (np.isfinite(a) & np.isfinite(b))
    return int(np.count_nonzero(~alike))


def _allowed(values: Doubles, dtype: DType) -> tuple[float, Doubles]:
    """The largest magnitude of these numbers, and how far from each of them a result may be."""
    scale = min(float(np.abs(values).max()), 1e30)
    return scale, RELATIVE[dtype] * np.abs(values) + ABSOLUTE[dtype] * scale + FLOOR[dtype]
