"""Scalar operations whose Triton operators do not have the meaning ONNX gives them, for emitted kernels.

What `apollo_fuse/runtime/scalar.h` is to kernels in C.  Maxima and minima pass a NaN on.  Integer division
truncates, never traps (x / 0 is 0) and wraps.  Conversions from floating point to integers give what x86-64's
instructions give, also outside of the target's range.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def maximum(a, b):
    """Of equal numbers the first, so that zeros keep their signs as they do in C."""
    return tl.where(b != b, b, tl.where(a < b, b, a))


@triton.jit
def minimum(a, b):
    return tl.where(b != b, b, tl.where(a > b, b, a))


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def greatest(x, axis: tl.constexpr, keep_dims: tl.constexpr = False):
    """The maximum of a block of floats; `tl.max` would pass over NaNs."""
    return tl.reduce(x, axis, maximum, keep_dims=keep_dims)


@triton.jit
def least(x, axis: tl.constexpr, keep_dims: tl.constexpr = False):
    return tl.reduce(x, axis, minimum, keep_dims=keep_dims)


@triton.jit
def product(x, axis: tl.constexpr, keep_dims: tl.constexpr = False):
    return tl.reduce(x, axis, _multiply, keep_dims=keep_dims)


@triton.jit
def sign(x):
    """-1, 0 or 1; of floats a NaN stays one, and a zero keeps its sign."""
    return tl.where(x > 0, 1, tl.where(x < 0, -1, x)).to(x.dtype)


@triton.jit
def unsigned_sign(x):
    return tl.where(x > 0, 1, 0).to(x.dtype)


@triton.jit
def softplus(x):
    return maximum(x, 0.0) + libdevice.log1p(tl.exp(-tl.abs(x)))


@triton.jit
def float_floor_mod(a, b):
    rest = libdevice.fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def divide(a, b):
    """Signed integers.  The processor need not divide by 0, nor the least number by -1."""
    safe = tl.where((b == 0) | (b == -1), 1, b).to(a.dtype)
    return tl.where(b == 0, 0, tl.where(b == -1, 0 - a, a // safe)).to(a.dtype)


@triton.jit
def unsigned_divide(a, b):
    return tl.where(b == 0, 0, a // tl.where(b == 0, 1, b).to(a.dtype)).to(a.dtype)


@triton.jit
def trunc_mod(a, b):
    safe = tl.where((b == 0) | (b == -1), 1, b).to(a.dtype)
    return tl.where(safe == b, a % safe, 0).to(a.dtype)


@triton.jit
def unsigned_mod(a, b):
    return tl.where(b == 0, 0, a % tl.where(b == 0, 1, b).to(a.dtype)).to(a.dtype)


@triton.jit
def floor_mod(a, b):
    rest = trunc_mod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest).to(a.dtype)


@triton.jit
def shift_left(a, b):
    """A shift by the width or more, or by a negative number, leaves nothing."""
    inside = (b >= 0) & (b < a.dtype.primitive_bitwidth)
    return tl.where(inside, a << tl.where(inside, b, 0).to(a.dtype), 0).to(a.dtype)


@triton.jit
def shift_right(a, b):
    """A shift by the width or more, or by a negative number, leaves nothing but the sign."""
    inside = (b >= 0) & (b < a.dtype.primitive_bitwidth)
    rest = tl.where(a < 0, -1, 0).to(a.dtype)
    return tl.where(inside, a >> tl.where(inside, b, 0).to(a.dtype), rest).to(a.dtype)


@triton.jit
def unsigned_shift_right(a, b):
    inside = b < a.dtype.primitive_bitwidth
    return tl.where(inside, a >> tl.where(inside, b, 0).to(a.dtype), 0).to(a.dtype)


@triton.jit
def to_int32(x):
    """The least number for a NaN, and for what lies outside of the range."""
    inside = (x >= -2147483648.0) & (x < 2147483648.0)
    return tl.where(inside, tl.where(inside, x, 0.0).to(tl.int32), -2147483648)


@triton.jit
def to_int64(x):
    """The least number for a NaN, and for what lies outside of the range."""
    inside = (x >= -9223372036854775808.0) & (x < 9223372036854775808.0)
    return tl.where(inside, tl.where(inside, x, 0.0).to(tl.int64), -9223372036854775808)


@triton.jit
def to_uint64(x):
    """Negative numbers wrap; the upper half of the range is converted from its lower end on."""
    upper = x >= 9223372036854775808.0
    half = to_int64(tl.where(upper, x - 9223372036854775808.0, x))
    return tl.where(upper, half ^ -9223372036854775808, half).to(tl.uint64)


@triton.jit
def floor_divide(a, b):
    """Of indices, of which one may be negative; Triton's own division truncates."""
    return a // b - ((a % b != 0) & ((a < 0) != (b < 0))).to(tl.int32)


@triton.jit
def wrap(index, extent):
    """An index that may count from the end of an axis; one outside of it is taken to the nearest element."""
    return tl.maximum(tl.minimum(tl.where(index < 0, index + extent, index), extent - 1), 0)


@triton.jit
def member(members, count):
    """Of `count` members in one launch the program's own: each has a range of programs.

    `members` holds the first program of each, then for each where its arguments lie behind these and, in the
    upper half of the number, its kind; kinds do not fall. An empty range begins where the next one does.
    Gives the program's number in its range, where the arguments lie, and the kind.
    """
    place = tl.arange(0, 256)
    first = tl.load(members + place, mask=place < count, other=2147483647).to(tl.int32)
    begun = first <= tl.program_id(0)
    found = tl.load(members + count + place, mask=place < count, other=0)
    own = tl.max(tl.where(begun, found, 0), 0)
    number = tl.program_id(0) - tl.max(tl.where(begun, first, 0), 0)
    return number, members + 2 * count + (own & 4294967295), own >> 32


@triton.jit
def tensor(argument, dtype: tl.constexpr):
    """The tensor whose address lies there, aligned as onnxruntime's are."""
    return tl.multiple_of(tl.load(argument).to(tl.pointer_type(dtype)), 16)
