"""How far a fused result may lie from onnxruntime's: the one table, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apollo_fuse.dtypes import DType

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

# Relative to the value, and absolute in units of the largest magnitude that went into it.  Fused and
# unfused kernels round at different places and sum in different orders; neither is nearer the truth.
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
    dtype = next((d for d in RELATIVE if d.numpy == expected.dtype), None)
    if dtype is None:
        wrong = int(np.count_nonzero(expected != found))
        problem = f"{name} differs in {wrong} of {expected.size} elements" if wrong else ""
        return Difference(float(wrong > 0), float(wrong > 0), problem)
    if coarsest is not None and RELATIVE[coarsest] > RELATIVE[dtype]:
        dtype = coarsest
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    same = np.array_equal(np.isnan(a), np.isnan(b)) and np.array_equal(a[np.isinf(a)], b[np.isinf(a)])
    if not same or not np.isfinite(b[finite]).all():
        where = int(np.count_nonzero(np.isfinite(a) != np.isfinite(b)))
        return Difference(np.inf, np.inf, f"{name} has NaN or infinity in other places ({where} elements)")
    a, b = a[finite], b[finite]
    if not a.size:
        return Difference(0.0, 0.0, "")
    error = np.abs(a - b)
    scale = min(float(np.abs(a).max()), 1e30)
    allowed = RELATIVE[dtype] * np.abs(a) + ABSOLUTE[dtype] * scale + FLOOR[dtype]
    worst = int(np.argmax(error - allowed))
    relative = float((error / np.maximum(np.abs(a), scale * 1e-3 + FLOOR[dtype])).max())
    problem = ""
    if error[worst] > allowed[worst]:
        problem = f"{name} is {b[worst]:.9g} where {a[worst]:.9g} is expected"
    return Difference(float(error.max()), relative, problem)
