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

_FEW_WEIGHTS = 9
_MOST_PADDED = 1.5  # elements of an image with what windows take beside it, for each of a result


@operator("Conv")
def convolution(o: Opener) -> Tensor:
    """One that looks at each channel by itself (depthwise); others are onnxruntime's."""
    x, weights = floating(o.tensor(0)), o.tensor(1, as_operand=True)
    channels, inner, *sizes = (extent.constant for extent in weights.shape)
    if not channels == o.integer("group", 1) == x.shape[1].constant or inner != 1:
        raise Unsupported("sums over channels")
    known = tuple(size for size in sizes if size is not None)
    windows = windows_of(o, x, known)
    if math.prod(known) > FEW_TAPS or any(w.stride > 1 for w in windows):
        raise Unsupported(
            f"a window of {' x '.join(map(str, sizes))} or strides, which onnxruntime is fast at"
        )
    if _may_be_border(windows, math.prod(known)):
        raise Unsupported("an image that is small beside its padding, or may be")
    padded, windows = _padded(x, windows)
    rank = len(known)

    def product_at(tap: tuple[int, ...]) -> Tensor:
        weight = _of_channel(weights, (ZERO, *map(Index.of, tap)), rank)
        return tap_of(padded, Op.ADD, 0.0, windows, tap) * weight

    lines = itertools.product(*map(range, known[:-1]))
    sums = (reduce(add, (product_at((*line, last)) for last in range(known[-1]))) for line in lines)
    total = reduce(add, sums)  # of each line of weights first: a chain of as many additions is waited for
    return total + _of_channel(o.tensor(2, as_operand=True), (), rank) if o.has(2) else total


def _of_channel(x: Tensor, place: Shape, rank: int) -> Tensor:
    """Of each channel the element at `place`, for `rank` axes behind the channels."""
    return x.view((x.shape[0], *(ONE for _ in range(rank))), lambda at: (at[0], *place))


def _may_be_border(windows: Sequence[Window], weights: int) -> bool:
    """Whether windows take much that lies beside the axes, which onnxruntime skips.

    Of an image of open size that is not known; few weights cost little there.
    """
    result = product(w.result for w in windows).constant
    read = product(w.result + (w.reach - 1) for w in windows).constant
    if result is None or read is None:
        return weights > _FEW_WEIGHTS
    return read > _MOST_PADDED * result


def _padded(x: Tensor, windows: Sequence[Window]) -> tuple[Tensor, tuple[Window, ...]]:
    """The tensor with what windows take beside it, a row for each channel, and the windows on that.

    Windows then read it without a choice, in lanes side by side, and what computes the tensor can join in.
    """
    extents = [(w.result - 1) * w.stride + w.reach for w in windows]
    each = [replace(w, result=e, size=1, stride=1, dilation=1) for w, e in zip(windows, extents, strict=True)]
    image = x.opener.kept(tap_of(x, Op.ADD, 0.0, each, (0,) * len(each)), row_axes=2)
    within = (replace(w, extent=e, before=0, after=0) for w, e in zip(windows, extents, strict=True))
    return image, tuple(within)
