"""Depthwise convolution: windows with weights, over one channel each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import add

from apollo_fuse.expressions import Op
from apollo_fuse.graph import Shape
from apollo_fuse.index import ONE, ZERO, Index, product
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported, floating
from apollo_fuse.operators.registry import operator
from apollo_fuse.operators.windows import FEW_TAPS, Window, tap_of, windows_of

_MOST_PADDED = 1.5  # elements of an image with what windows take beside it, for each of its own
_TAPS_OF_A_LINE = 64
"""At most; along lines onnxruntime has no kernel of its own, and calls a matrix product for each channel."""


@operator("Conv")
def convolution(o: Opener) -> Tensor:
    """One that looks at each channel by itself (depthwise); others are onnxruntime's."""
    x, weights = floating(o.tensor(0)), o.tensor(1, as_operand=True)
    channels, inner, *sizes = (extent.constant for extent in weights.shape)
    if not channels == o.integer("group", 1) == x.shape[1].constant or inner != 1:
        raise Unsupported("sums over channels")
    known = tuple(size for size in sizes if size is not None)
    windows = windows_of(o, x, known)
    size = " x ".join(map(str, known))
    if len(known) == 1:
        if known[0] > _TAPS_OF_A_LINE:
            raise Unsupported(f"a window of {size}")
    elif math.prod(known) > FEW_TAPS or windows[-1].stride > 1:
        raise Unsupported(f"a window of {size} or strides along rows, which onnxruntime is fast at")
    elif _is_mostly_border(windows):
        raise Unsupported("an image that is small beside its padding")
    padded, windows = _padded(x, windows)
    rank = len(known)

    def with_tap(total: Tensor | None, tap: tuple[int, ...]) -> Tensor:
        """The sum and a tap's product, rounded once as in onnxruntime's kernels."""
        element = tap_of(padded, Op.ADD, 0.0, windows, tap)
        weight = _of_channel(weights, (ZERO, *map(Index.of, tap)), rank)
        return element * weight if total is None else o.apply(Op.MULTIPLY_ADD, element, weight, total)

    bias = _of_channel(o.tensor(2, as_operand=True), (), rank) if o.has(2) else None
    lines: list[Tensor] = []  # of weights, one by one: a chain of as many additions is waited for
    for line in itertools.product(*map(range, known[:-1])):
        first, *others = ((*line, last) for last in range(known[-1]))
        lines.append(reduce(with_tap, others, with_tap(None if lines else bias, first)))
    return reduce(add, lines)


def _of_channel(x: Tensor, place: Shape, rank: int) -> Tensor:
    """Of each channel the element at `place`, for `rank` axes behind the channels."""
    return x.view((x.shape[0], *(ONE for _ in range(rank))), lambda at: (at[0], *place))


def _is_mostly_border(windows: Sequence[Window]) -> bool:
    """Whether windows take much that lies beside the image, which onnxruntime skips.

    An image of open size is taken for a large one.
    """
    image = product(w.extent for w in windows).constant
    read = product(_reach(w) for w in windows).constant
    return image is not None and read is not None and read > _MOST_PADDED * image


def _reach(window: Window) -> Index:
    """From the first element that windows take to the last one, what lies beside the axis included."""
    return (window.result - 1) * window.stride + window.reach


def _padded(x: Tensor, windows: Sequence[Window]) -> tuple[Tensor, tuple[Window, ...]]:
    """The tensor with what windows take beside it, a row for each channel, and the windows on that.

    Windows then read it without a choice, in lanes side by side, and what computes the tensor can join in.
    """
    extents = list(map(_reach, windows))
    each = [replace(w, result=e, size=1, stride=1, dilation=1) for w, e in zip(windows, extents, strict=True)]
    image = x.opener.kept(tap_of(x, Op.ADD, 0.0, each, (0,) * len(each)), row_axes=2)
    within = (replace(w, extent=e, before=0, after=0) for w, e in zip(windows, extents, strict=True))
    return image, tuple(within)
