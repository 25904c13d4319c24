"""Resize and Upsample: an access map with a quotient for each axis, and weights between two neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

from apollo_fuse.dtypes import DType
from apollo_fuse.index import ONE, ZERO, Index, clamped, maximum, minimum
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported
from apollo_fuse.operators.registry import operator
from apollo_fuse.shape_rules import LARGEST_DIVISOR, is_exact

_SAMPLED = 1024  # results along an open axis that a formula is compared on
_MOST_PHASES = 4
"""Places of a result between which distances to the operand's elements differ."""

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_Places = TypeVar("_Places", Tensor, Floats)
"""Along an axis: as numbers, or as what a kernel computes of them."""


@operator("Upsample")
def upsample(o: Opener) -> Tensor:
    scales = o.constant(1) if o.has(1) else np.array(o.node.attributes["scales"].as_floats(), np.float32)
    return _resized(o, scales.reshape(-1).tolist(), "asymmetric", "floor")


@operator("Resize")
def resize(o: Opener) -> Tensor:
    policy = o.text("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch" or o.integer("antialias", 0):
        raise Unsupported(f"extents by {policy}, or antialiasing")
    if o.has(3):
        o.extents(3, "sizes")  # raises for what the caller chooses, which proves nothing
    old = o.opset < 11  # with scales as the second operand, and no choice of mode
    scales = _scales(o, 1 if old else 2)
    how = "asymmetric" if old else o.text("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else o.text("nearest_mode", "round_prefer_floor")
    return _resized(o, scales, how, rounding)


def _scales(o: Opener, place: int) -> list[float] | None:
    if not o.has(place):
        return None
    found = [float(scale) for scale in o.constant(place).reshape(-1)]
    if "axes" not in o.node.attributes or not found:
        return found or None
    rank = len(o.tensor(0).shape)
    chosen = {o.axis(axis, rank): scale for axis, scale in zip(o.numbers("axes", ()), found, strict=True)}
    return [chosen.get(axis, 1.0) for axis in range(rank)]


def _resized(o: Opener, scales: Sequence[float] | None, how: str, rounding: str) -> Tensor:
    x, shape, mode = o.tensor(0), o.output_shape(), o.text("mode", "nearest")
    axes: list[_Axis] = []
    for place, (extent, result) in enumerate(zip(x.shape, shape, strict=True)):
        scale = None if scales is None else scales[place]
        if result != extent or scale not in (None, 1.0):
            axes.append(_Axis(place, extent, result, *_slope(extent, result, scale, how), how))
    match mode:
        case "nearest":
            maps = {axis.place: _map(axis, rounding) for axis in axes}
            return x.view(shape, lambda at: tuple(maps[n](i) if n in maps else i for n, i in enumerate(at)))
        case "linear" if x.dtype is DType.FLOAT32:  # the one type of these that onnxruntime computes with
            rank = len(shape)
            if rank not in (2, 4) or [axis.place for axis in axes] != [rank - 2, rank - 1]:
                # of others onnxruntime reads neighbours too, which may be infinite, and weighs them by 0
                raise Unsupported("mode linear of other axes than the last two")
            for axis in axes:
                x = _between(x, axis)
            return x
        case _:
            raise Unsupported(f"mode {mode} of {x.dtype.value}")


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis that is resized; `slope` is how far apart in the operand neighbours in the result lie, about.

    scale: as onnxruntime has it, in single precision.
    """

    place: int
    extent: Index
    result: Index
    slope: Fraction
    scale: float
    how: str

    @property
    def lengths(self) -> tuple[int, int] | tuple[None, None]:
        """Both extents, where both are known."""
        before, after = self.extent.constant, self.result.constant
        return (None, None) if before is None or after is None else (before, after)


def _slope(extent: Index, result: Index, scale: float | None, how: str) -> tuple[Fraction, float]:
    before, after = extent.constant, result.constant
    ratio = _ratio(extent, result)
    if how == "align_corners" and before is not None and after is not None and after > 1:
        return Fraction(before - 1, after - 1), after / before if scale is None else scale
    if scale is not None:
        slope = 1 / Fraction(scale).limit_denominator(LARGEST_DIVISOR)
        if (before is None or after is None) and not is_exact(scale):
            raise Unsupported(f"a resize of the open extent {extent} by {scale:g}")
        return slope, scale
    if ratio is not None:
        return ratio, float(1 / ratio)
    raise Unsupported(f"a resize of the open extent {extent} to {result}")


def _map(axis: _Axis, rounding: str) -> Callable[[Index], Index]:
    """The element of the operand's axis for each one of the result's: ``(p*i + b) // q``, clamped."""
    p, q = axis.slope.numerator, axis.slope.denominator
    offset = _offset(axis, rounding)
    return lambda i: clamped((i * p + offset) // q, axis.extent)


def _offset(axis: _Axis, rounding: str, clamps: bool = True) -> int:
    """The `b` of ``(p*i + b) // q``.

    It is whichever gives what onnxruntime computes in single precision, for every place of the axis, or
    for a sample of them where its extent is open. Without `clamps` it gives -1 as well for what comes from
    before the axis.
    """
    before, after = axis.extent.constant, axis.result.constant
    count = _SAMPLED if after is None else after
    last = int(count * axis.slope) if before is None else before - 1
    places = np.arange(count, dtype=np.int64)
    origin = _origin(places.astype(np.float32), axis.scale, axis.how, *axis.lengths)
    wanted = _rounded(origin, rounding)
    if clamps:
        wanted = np.clip(wanted, 0, last)
    p, q = axis.slope.numerator, axis.slope.denominator
    for b in range(-q, p + q + 1):
        found = (p * places + b) // q
        # where the origin is 0, the places -1 and 0 come to the same
        found = np.clip(found, 0, last) if clamps else np.where(origin == 0, np.maximum(found, 0), found)
        if np.array_equal(found, wanted):
            return b
    raise Unsupported(
        f"no quotient gives the places of mode {axis.how} and {rounding} at scale {axis.scale:g}"
    )


def _between(x: Tensor, axis: _Axis) -> Tensor:
    """Each place of the result lies between two neighbours, and takes of both by its distance.

    How far it is from them repeats after `q` places.
    """
    o, place, last = x.opener, axis.place, axis.extent - 1
    p, q = axis.slope.numerator, axis.slope.denominator
    if q > _MOST_PHASES or axis.result.exact_quotient(Index.of(q)) is None:
        raise Unsupported(f"mode linear from {axis.extent} to {axis.result}")
    offset = _offset(axis, "floor", clamps=False)
    shape = (*x.shape[:place], axis.result, *x.shape[place + 1 :])
    along = (axis.result, *[ONE] * (len(shape) - place - 1))

    def phase(i: Index) -> Index:
        return i - i // q * q

    def step(i: Index) -> Index:
        return (phase(i) * p + offset) // q

    def below(i: Index) -> Index:
        return i // q * p + step(i)

    def neighbour(index: Callable[[Index], Index]) -> Tensor:
        return x.view(shape, lambda at: (*at[:place], index(at[place]), *at[place + 1 :]))

    first = o.computed(along, lambda at: below(at[0]) + 1).equal(0)  # before the axis begins
    end = o.computed(along, lambda at: maximum(below(at[0]), ZERO) - last).equal(0)
    # at powers of two, distances are the same in each run of places in single precision, too
    repeats = p & (p - 1) == q & (q - 1) == 0 and axis.slope * Fraction(axis.scale) == 1
    at = o.computed(along, lambda at: phase(at[0]) if repeats else at[0]).cast(x.dtype)
    lower = o.computed(along, lambda at: step(at[0]) if repeats else below(at[0])).cast(x.dtype)
    distance = _origin(at, axis.scale, axis.how, *axis.lengths) - lower
    upper = end.select(0.5, first.select(0.0, distance))  # as onnxruntime weighs what is infinite there
    lower_part = neighbour(lambda i: clamped(below(i), axis.extent)) * (1 - upper)
    return lower_part + neighbour(lambda i: minimum(maximum(below(i), ZERO) + 1, last)) * upper


def _ratio(extent: Index, result: Index) -> Fraction | None:
    """The quotient of two extents, where it is the same for whatever is open in them."""
    if extent.constant and result.constant:
        return Fraction(extent.constant, result.constant)
    for over, under, power in ((extent, result, 1), (result, extent, -1)):
        times = over.exact_quotient(under)
        if times is not None and times.constant:
            return Fraction(times.constant) ** power
    return None


def _origin(at: _Places, scale: float, how: str, length: int | None, resized: int | None) -> _Places:
    """The place in the operand that a place of the result comes from, in single precision."""
    match how:
        case "asymmetric":
            return _quotient(at, scale)
        case "half_pixel":
            return _quotient(at + 0.5, scale) - 0.5
        case "pytorch_half_pixel" if resized is not None:
            return _quotient(at + 0.5, scale) - 0.5 if resized > 1 else at * 0
        case "align_corners" if length is not None and resized is not None:
            return at * 0 if resized == 1 else _quotient(at * (length - 1), resized - 1)
        case _:
            raise Unsupported(f"coordinates by {how}")


def _quotient(at: _Places, divisor: float) -> _Places:
    return at.quotient(divisor) if isinstance(at, Tensor) else at / np.float32(divisor)


def _rounded(places: Floats, rounding: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    match rounding:
        case "floor":
            found = np.floor(places)
        case "ceil":
            found = np.ceil(places)
        case "round_prefer_floor":
            found = np.ceil(places - np.float32(0.5))
        case "round_prefer_ceil":
            found = np.floor(places + np.float32(0.5))
        case _:
            raise Unsupported(f"rounding by {rounding}")
    return found.astype(np.int64)
