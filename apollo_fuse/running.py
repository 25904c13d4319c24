"""Runs sessions on NumPy arrays, those of bfloat16 and float8 included.

Python's onnxruntime takes and gives tensors of these types as its own values alone, since it knows no names
for them in NumPy; the ml_dtypes package has the types.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

_OWN: dict[str, np.dtype[np.generic]] = {
    f"tensor({onnx.TensorProto.DataType.Name(onnx.helper.np_dtype_to_tensor_dtype(dtype)).lower()})": dtype
    for dtype in map(
        np.dtype,
        (
            ml_dtypes.bfloat16,
            *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz),
            *(ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz),
        ),
    )
}
"""The types that NumPy has by ml_dtypes, by onnxruntime's names for them."""


def is_own(dtype: np.dtype[np.generic]) -> bool:
    """Whether arrays of this type pass to onnxruntime as its own values alone."""
    return dtype in _OWN.values()


def run(
    session: ort.InferenceSession, feeds: Mapping[str, object], options: ort.RunOptions | None = None
) -> list[object]:
    """What the session gives for each of its outputs; raises as onnxruntime does."""
    arguments = (*session.get_inputs(), *session.get_outputs())
    if not any(argument.type in _OWN for argument in arguments):
        found: list[object] = session.run(None, dict(feeds), options)
        return found
    values = {n: ort_value(v) if isinstance(v, np.ndarray) else v for n, v in feeds.items()}
    return list(map(_array, session.run_with_ort_values(None, values, options)))


def ort_value(array: np.ndarray, device: str = "cpu") -> ort.OrtValue:
    """The array as onnxruntime takes it; a type of its own is on the CPU only."""
    contiguous = np.ascontiguousarray(array).reshape(array.shape)
    if not is_own(contiguous.dtype):
        return ort.OrtValue.ortvalue_from_numpy(contiguous, device)
    kind = onnx.helper.np_dtype_to_tensor_dtype(contiguous.dtype)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, kind)


def _array(value: ort.OrtValue) -> object:
    if not value.is_tensor():
        return value
    dtype = _OWN.get(value.data_type())
    if dtype is None:
        return value.numpy()
    shape = value.shape()
    content = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape).copy()
