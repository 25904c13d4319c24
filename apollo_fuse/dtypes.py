"""Element types: the ONNX data types a kernel can hold, and how each is computed with."""

from __future__ import annotations

from enum import Enum

import ml_dtypes
import numpy as np
import onnx


class DType(Enum):
    """An element type; the value is its ONNX name in lower case."""

    FLOAT32 = "float"
    FLOAT64 = "double"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT16 = "int16"
    INT32 = "int32"
    INT64 = "int64"
    UINT8 = "uint8"
    UINT16 = "uint16"
    UINT32 = "uint32"
    UINT64 = "uint64"
    BOOL = "bool"

    @property
    def onnx(self) -> int:
        """The ``onnx.TensorProto.DataType`` number."""
        return int(onnx.TensorProto.DataType.Value(self.value.upper()))

    @property
    def numpy(self) -> np.dtype[np.generic]:
        match self:
            case DType.FLOAT32:
                return np.dtype(np.float32)
            case DType.FLOAT64:
                return np.dtype(np.float64)
            case DType.BFLOAT16:
                return _BFLOAT16
            case _:
                return _numpy(self.value)

    @property
    def size(self) -> int:
        """Bytes of one element."""
        return int(self.numpy.itemsize)

    @property
    def is_float(self) -> bool:
        return self in _FLOATS

    @property
    def is_integer(self) -> bool:
        return not self.is_float and self is not DType.BOOL

    @property
    def is_signed(self) -> bool:
        return self in _SIGNED

    @property
    def integer_range(self) -> tuple[int, int]:
        """The least and the greatest number of an integer type."""
        bits = 8 * self.size
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.is_signed else (0, 2**bits - 1)

    @property
    def greatest(self) -> float:
        """The greatest finite number of a floating-point type."""
        return float(ml_dtypes.finfo(self.numpy).max)  # type: ignore[no-untyped-call]

    @property
    def compute(self) -> DType:
        """The type arithmetic is done in: half types are widened, everything else stays as it is."""
        return DType.FLOAT32 if self in (DType.FLOAT16, DType.BFLOAT16) else self

    @staticmethod
    def of_onnx(number: int) -> DType | None:
        """The type with this ``TensorProto.DataType`` number, or None when kernels cannot hold it."""
        return _BY_NUMBER.get(number)


_BFLOAT16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)


def _numpy(name: str) -> np.dtype[np.generic]:
    dtype: np.dtype[np.generic] = np.dtype(name)
    return dtype


_FLOATS = frozenset({DType.FLOAT32, DType.FLOAT64, DType.FLOAT16, DType.BFLOAT16})
_SIGNED = frozenset({DType.INT8, DType.INT16, DType.INT32, DType.INT64})
_BY_NUMBER = {dtype.onnx: dtype for dtype in DType}
