"""Resize and Upsample in their nearest mode: an access map with a quotient for each axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np

from apollo_fuse.graph import Shape
from apollo_fuse.index import Index, clamped
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported
from apollo_fuse.operators.registry import operator

_SAMPLED = 1024  # results along an open axis that a formula is compared on

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@operator("Upsample")
def upsample(o: Opener) -> Tensor:
    scales = o.constant(1) if o.has(1) else np.array(o.node.attributes["scales"].as_floats(), np.float32)
    return _nearest(o, o.output_shape(), scales.reshape(-1).tolist(), "asymmetric", "floor")


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
    return _nearest(o, o.output_shape(), scales, how, rounding)


def _scales(o: Opener, place: int) -> list[float] | None:
    if not o.has(place):
        return None
    found = [float(scale) for scale in o.constant(place).reshape(-1)]
    if "axes" not in o.node.attributes or not found:
        return found or None
    rank = len(o.tensor(0).shape)
    chosen = {o.axis(axis, rank): scale for axis, scale in zip(o.numbers("axes", ()), found, strict=True)}
    return [chosen.get(axis, 1.0) for axis in range(rank)]


def _nearest(o: Opener, shape: Shape, scales: Sequence[float] | None, how: str, rounding: str) -> Tensor:
    x = o.tensor(0)
    if o.text("mode", "nearest") != "nearest":
        raise Unsupported(f"mode {o.text('mode', 'nearest')}")
    maps = [
        _map(extent, result, None if scales is None else scales[axis], how, rounding)
        for axis, (extent, result) in enumerate(zip(x.shape, shape, strict=True))
    ]
    return x.view(shape, lambda at: tuple(place(i) for place, i in zip(maps, at, strict=True)))


def _map(
    extent: Index, result: Index, scale: float | None, how: str, rounding: str
) -> Callable[[Index], Index]:
    """The element of the operand's axis for each one of the result's: ``(p*i + b) // q``, clamped.

    `b` is whichever gives what onnxruntime computes in single precision, for every place of the axis, or
    for a sample of them where its extent is open.
    """
    if result == extent and scale in (None, 1.0):
        return lambda i: i
    before, after = extent.constant, result.constant
    ratio = _ratio(extent, result)
    if how == "align_corners" and before is not None and after is not None and after > 1:
        slope = Fraction(before - 1, after - 1)
        scale = after / before if scale is None else scale
    elif scale is not None:
        slope = 1 / Fraction(scale).limit_denominator(64)
    elif ratio is not None:
        slope, scale = ratio, float(1 / ratio)
    else:
        raise Unsupported(f"a resize of the open extent {extent} to {result}")
    count = _SAMPLED if after is None else after
    last = int(count * slope) if before is None else before - 1
    length, resized = (None, None) if before is None or after is None else (before, after)
    wanted = _rounded(
        _origin(np.arange(count, dtype=np.float32), np.float32(scale), how, length, resized), rounding
    )
    wanted = np.clip(wanted, 0, last)
    p, q = slope.numerator, slope.denominator
    places = np.arange(count, dtype=np.int64)
    for b in range(-q, p + q + 1):
        if np.array_equal(np.clip((p * places + b) // q, 0, last), wanted):
            return lambda i: clamped((i * p + b) // q, extent)
    raise Unsupported(f"no quotient gives the places of mode {how} and {rounding} at scale {scale:g}")


def _ratio(extent: Index, result: Index) -> Fraction | None:
    """The quotient of two extents, where it is the same for whatever is open in them."""
    if extent.constant and result.constant:
        return Fraction(extent.constant, result.constant)
    for over, under, power in ((extent, result, 1), (result, extent, -1)):
        times = over.exact_quotient(under)
        if times is not None and times.constant:
            return Fraction(times.constant) ** power
    return None


def _origin(at: Floats, scale: np.float32, how: str, length: int | None, resized: int | None) -> Floats:
    """The place in the operand that a place of the result comes from."""
    half = np.float32(0.5)
    match how:
        case "asymmetric":
            return at / scale
        case "half_pixel":
            return (at + half) / scale - half
        case "pytorch_half_pixel" if resized is not None:
            return (at + half) / scale - half if resized > 1 else np.zeros_like(at)
        case "align_corners" if length is not None and resized is not None:
            return (
                np.zeros_like(at) if resized == 1 else at * np.float32(length - 1) / np.float32(resized - 1)
            )
        case _:
            raise Unsupported(f"coordinates by {how}")


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
