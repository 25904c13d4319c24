"""Operators that look through a sliding window: pooling, and normalisation across neighbouring channels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from collections.abc import Iterator as Generator
from dataclasses import dataclass
from functools import partial, reduce

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Op
from apollo_fuse.extents import is_empty
from apollo_fuse.graph import Shape
from apollo_fuse.index import ONE, ZERO, Index, clamped, maximum, minimum, non_negative
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported, floating
from apollo_fuse.operators.quantized import MICROSOFT, numbers_at, rounded_to, scale_at, zero_at
from apollo_fuse.operators.registry import operator

FEW_TAPS = 25
"""Elements of a window that are read one by one; more are a loop."""
_MOST_TAPS_IN_ORDER = 64


@dataclass(frozen=True, slots=True)
class Window:
    """How a window slides along an axis: tap `k` of `i` is element ``i*stride + k*dilation - before``."""

    extent: Index  # of the operand
    result: Index  # extent of the result
    size: int
    stride: int
    dilation: int
    before: int  # padding in front of the axis
    after: int

    @property
    def reach(self) -> int:
        """Elements from the first tap to the last."""
        return (self.size - 1) * self.dilation + 1

    def place(self, at: Index, tap: Index) -> Index:
        return at * self.stride + tap * self.dilation - self.before

    def nearest(self, at: Index, tap: Index) -> Index:
        """The tap's place, or the end of the axis that it lies beside."""
        return clamped(self.place(at, tap), self.extent)

    def beyond(self, at: Index, tap: Index) -> Index:
        """How far a tap lies outside of the axis; 0 for one that is on it."""
        return self.place(at, tap) - self.nearest(at, tap)

    @property
    def reaches_out(self) -> bool:
        """Whether some tap may lie beside the axis."""
        return not (self.is_inside(0) and self.is_inside(self.size - 1))

    def is_inside(self, tap: int) -> bool:
        """Whether this tap lies on the axis for every result."""
        first, last = (self.place(at, Index.of(tap)) for at in (ZERO, self.result - 1))
        return non_negative(first) and non_negative(self.extent - 1 - last)

    @property
    def holds_borders(self) -> bool:
        """Whether a window that reaches out holds the element at the border that it reaches out over."""
        lowest, highest = self.place(self.result - 1, ZERO), self.place(ZERO, Index.of(self.size - 1))
        meets = non_negative(self.extent - 1 - lowest) and non_negative(highest)
        return self.dilation == 1 and meets

    def taps_inside(self, at: Index, padded: bool) -> Index:
        """How many taps of result `at` fall on the axis, or with `padded` on it and its padding."""
        low, high = (Index.of(-self.before), self.extent + self.after) if padded else (ZERO, self.extent)
        start = self.place(at, ZERO)
        skipped = maximum((low - start + self.dilation - 1) // self.dilation, ZERO)
        reached = minimum((high - start + self.dilation - 1) // self.dilation, Index.of(self.size))
        return reached - skipped


def windows_of(o: Opener, x: Tensor, sizes: tuple[int, ...] = ()) -> tuple[Window, ...]:
    """One for each axis behind batch and channels; `sizes` where the node need not say them."""
    sizes = o.numbers("kernel_shape", sizes)
    rank = len(sizes)
    if len(x.shape) != rank + 2:
        raise Unsupported(f"rank {len(x.shape)} for a window of rank {rank}")
    strides, dilations = o.numbers("strides", (1,) * rank), o.numbers("dilations", (1,) * rank)
    pads = o.numbers("pads", (0,) * (2 * rank))
    automatic = o.text("auto_pad", "NOTSET")
    found: list[Window] = []
    for n, result in enumerate(o.output_shape()[2:]):
        extent, reach = x.shape[2 + n], (sizes[n] - 1) * dilations[n] + 1
        before, after = pads[n], pads[n + rank]
        if automatic == "VALID":
            before = after = 0
        elif automatic != "NOTSET":
            before, after = _same(automatic, extent, result, strides[n], reach)
        found.append(Window(extent, result, sizes[n], strides[n], dilations[n], before, after))
        o.require_equal(is_empty(extent), ZERO)  # as onnxruntime does
    return tuple(found)


def _same(automatic: str, extent: Index, result: Index, stride: int, reach: int) -> tuple[int, int]:
    """The padding that makes as many results as there are strides in the axis."""
    total = ((result - 1) * stride + reach - extent).constant
    if total is None:
        raise Unsupported(f"{automatic} padding of the open extent {extent}")
    less, more = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
    return (less, more) if automatic == "SAME_UPPER" else (more, less)


def slide(x: Tensor, axes: Sequence[int], windows: Sequence[Window], outside: float | int) -> Tensor:
    """The taps of every window as further axes behind the others; `outside` is what padding holds."""
    o, rank = x.opener, len(x.shape)
    results = list(x.shape)
    for axis, window in zip(axes, windows, strict=True):
        results[axis] = window.result
    shape = (*results, *(Index.of(w.size) for w in windows))

    def access(at: tuple[Index, ...]) -> tuple[Index, ...]:
        read = list(at[:rank])
        for n, (axis, window) in enumerate(zip(axes, windows, strict=True)):
            read[axis] = window.nearest(at[axis], at[rank + n])
        return tuple(read)

    taps = x.view(shape, access)
    inside: list[Tensor] = []
    for n, (axis, window) in enumerate(zip(axes, windows, strict=True)):
        if window.reaches_out:
            line = tuple(e if place in (axis, rank + n) else ONE for place, e in enumerate(shape))
            inside.append(o.computed(line, partial(_beyond, window, axis, rank + n)).equal(0))
    if not inside:
        return taps
    return reduce(lambda a, b: o.apply(Op.AND, a, b), inside).select(taps, outside)


def _beyond(window: Window, axis: int, tap: int, at: Shape) -> Index:
    return window.beyond(at[axis], at[tap])


def _pooled(x: Tensor, op: Op, outside: float | int, windows: Sequence[Window]) -> Tensor:
    """Each window's elements combined; those of a small one in one expression, for lanes side by side."""
    rank = len(x.shape)
    if math.prod(w.size for w in windows) <= FEW_TAPS:
        taps = (tap.cast(x.dtype.compute) for tap in _taps(x, op, outside, windows))
        return reduce(partial(x.opener.apply, op), taps).cast(x.dtype)
    every = slide(x, range(2, rank), windows, outside)
    return every.reduce(op, range(rank, len(every.shape)), keepdims=False)


def _taps(x: Tensor, op: Op, outside: float | int, windows: Sequence[Window]) -> Generator[Tensor]:
    """One tensor for each place in a window, in the order of memory."""
    choices = itertools.product(*(range(w.size) for w in windows))
    return (tap_of(x, op, outside, windows, choice) for choice in choices)


def tap_of(x: Tensor, op: Op, outside: float | int, windows: Sequence[Window], taps: Sequence[int]) -> Tensor:
    """The same element of every window. For a maximum, one at the border may stand for those beyond it."""
    o, results = x.opener, tuple(w.result for w in windows)

    def access(at: Shape) -> Shape:
        return (
            *at[:2],
            *(w.nearest(i, Index.of(tap)) for w, i, tap in zip(windows, at[2:], taps, strict=True)),
        )

    found = x.view((*x.shape[:2], *results), access)
    for axis, (window, tap) in enumerate(zip(windows, taps, strict=True)):
        if not (window.is_inside(tap) or (op is Op.MAX and window.holds_borders)):
            line = tuple(e if n == axis else ONE for n, e in enumerate(results))
            found = o.computed(line, partial(_beyond_at, window, axis, tap)).equal(0).select(found, outside)
    return found


def _beyond_at(window: Window, axis: int, tap: int, at: Shape) -> Index:
    return window.beyond(at[axis], Index.of(tap))


@operator("MaxPool")
def max_pool(o: Opener) -> Tensor:
    """A NaN is passed on from any place; onnxruntime does so in some places and not in others."""
    x = o.tensor(0)
    least = float("-inf") if x.dtype.is_float else x.dtype.integer_range[0]
    return _pooled(x, Op.MAX, least, windows_of(o, x))


@operator("AveragePool")
def average_pool(o: Opener) -> Tensor:
    """Over the taps on the axis; with `count_include_pad` over those on its padding too."""
    x = floating(o.tensor(0))
    windows = windows_of(o, x)
    total = _pooled(x, Op.ADD, 0.0, windows)
    return total / _sizes(x, windows, bool(o.integer("count_include_pad", 0)))


@operator("QLinearAveragePool", domain=MICROSOFT)
def qlinear_average_pool(o: Opener) -> Tensor:
    """With `count_include_pad` over all taps of a window, those beside the padding included."""
    if o.integer("channels_last", 0):
        raise Unsupported("channels behind the other axes")
    x, dtype = numbers_at(o, 0), o.tensor(0).dtype
    windows = windows_of(o, x)
    total = _added_in_order(x, windows)
    if o.integer("count_include_pad", 0):
        average = total.quotient(float(math.prod(window.size for window in windows)))
    else:
        average = total.quotient(_sizes(x, windows, padded=False))
    zero = zero_at(o, 4, dtype).cast(DType.FLOAT32)
    return rounded_to(average.quotient(scale_at(o, 3)) + zero, dtype)


def _added_in_order(x: Tensor, windows: Sequence[Window]) -> Tensor:
    """The sum of each window, tap after tap, for where the last bit of it counts."""
    sizes = [window.size for window in windows]
    if math.prod(sizes) > _MOST_TAPS_IN_ORDER:
        raise Unsupported(f"sums of {math.prod(sizes)} numbers, whose order counts")
    zero = x.opener.scalar(0.0, x.dtype)
    return reduce(lambda total, tap: total + tap, _taps(x, Op.ADD, 0.0, windows), zero)


def _sizes(x: Tensor, windows: Sequence[Window], padded: bool) -> Tensor:
    """How many taps of each window fall on the tensor, or with `padded` on it and its padding."""
    lines = [partial(_count, w, n + 2, padded) for n, w in enumerate(windows)]
    counts = [x.opener.computed(_line(x, n, windows[n]), count) for n, count in enumerate(lines)]
    return reduce(lambda a, b: a * b, counts).cast(x.dtype.compute).cast(x.dtype)


def _line(x: Tensor, axis: int, window: Window) -> Shape:
    """The shape of something that varies along one of the result's spatial axes only."""
    return tuple(window.result if place == axis + 2 else ONE for place in range(len(x.shape)))


def _count(window: Window, axis: int, padded: bool, at: Shape) -> Index:
    return window.taps_inside(at[axis], padded)


@operator("LpPool")
def lp_pool(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    p = float(o.integer("p", 2))
    return _norm(p, lambda powers: _pooled(powers, Op.ADD, 0.0, windows_of(o, x)), x)


def _norm(p: float, add_up: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    magnitude = x.call(Op.ABS)
    match p:
        case 1.0:
            return add_up(magnitude)
        case 2.0:
            return add_up(x * x).call(Op.SQRT)
        case _:
            return x.opener.apply(Op.POW, add_up(x.opener.apply(Op.POW, magnitude, p)), 1.0 / p)


@operator("LRN")
def lrn(o: Opener) -> Tensor:
    """Squares are added up over the neighbouring channels.

    The usual power, 0.75, of what is not negative is two roots, which take a tenth of the time.
    """
    x = floating(o.tensor(0))
    size = o.integer("size", 1)
    window = Window(x.shape[1], x.shape[1], size, 1, 1, (size - 1) // 2, size // 2)
    taps = slide(x, (1,), (window,), 0.0)
    squares = (taps * taps).reduce(Op.ADD, (len(x.shape),), keepdims=False)
    alpha, beta, bias = o.number("alpha", 0.0001), o.number("beta", 0.75), o.number("bias", 1.0)
    base = squares * (alpha / size) + bias
    if beta == 0.75 and alpha >= 0 and bias >= 0:
        root = base.call(Op.SQRT)
        return x / (root * root.call(Op.SQRT))
    return x / o.apply(Op.POW, base, beta)
