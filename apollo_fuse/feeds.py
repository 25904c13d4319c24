"""Input arrays for a model: shapes from what the model and the user say, values by a seed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, assert_never
from zipfile import BadZipFile

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort

from apollo_fuse.errors import NoFeedsError, UsageError, what_onnxruntime_says
from apollo_fuse.running import is_own, run

Kind: TypeAlias = Literal["random", "edge", "zeros", "ones"]
"""random: normal floats, small ids; edge: floats with NaN, infinities, -0.0, denormals, huge and tiny."""

Dimension: TypeAlias = int | str | None
"""An extent, the name of an extent that equals all others of this name, or an extent of its own."""

_FATAL = 4
"""onnxruntime's log level that shows fatal errors only: here a refusal is an answer."""
_KINDS: tuple[Kind, ...] = ("random", "ones", "zeros")
_BATCH = 1
_IMAGE = 224
_OTHER = 64
_IMAGE_CHANNELS = (1, 3, 4)
_UNNAMED = ("", "?")
"""Names that exporters give to extents they know nothing of, equal or not."""
_BINARY_NAMES = ("mask", "type")
"""Integer inputs whose name holds one of these take 0 and 1: attention_mask, token_type_ids."""
_IDS = 8


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a model; `shape` is None when not even the rank is known."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[Dimension, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name} ({self.dtype}, any shape)"
        dimensions = ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} ({self.dtype}[{dimensions}])"


Source: TypeAlias = ort.InferenceSession | onnx.ModelProto | Sequence[Input]


def inputs_of(source: Source) -> tuple[Input, ...]:
    """The inputs a caller has to feed, initialisers left out.

    Raises NoFeedsError for an input that is not a tensor of numbers or bool.
    """
    if isinstance(source, onnx.ModelProto):
        given = {initializer.name for initializer in source.graph.initializer}
        return tuple(_of_proto(value) for value in source.graph.input if value.name not in given)
    if isinstance(source, ort.InferenceSession):
        return tuple(_of_argument(argument) for argument in source.get_inputs())
    return tuple(source)


def make_feeds(
    source: Source,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
    kind: Kind = "random",
) -> dict[str, np.ndarray]:
    """An array for each input, a function of the arguments alone.

    Raises UsageError when `shapes` does not fit the model, NoFeedsError as inputs_of does.
    """
    inputs = inputs_of(source)
    resolved = resolve_shapes(inputs, shapes or {})
    return {value.name: _array(value, resolved[value.name], seed, kind) for value in inputs}


def read_inputs(path: Path, inputs: Sequence[Input]) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, each for the input of its name.

    Raises UsageError where the file is none, or holds what the model does not take.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        why = getattr(error, "strerror", None) or "it is no .npz file of plain arrays"
        raise UsageError(f"{path}: {why}; write one with numpy.savez(path, name=array)") from error
    known = {value.name: value for value in inputs}
    for name, array in arrays.items():
        if name not in known:
            expected = ", ".join(map(str, inputs)) or "none"
            raise UsageError(
                f"{path} holds an array for {name!r}, which is no input; the model's inputs: {expected}"
            )
        if array.dtype.kind == "V" and is_own(known[name].dtype):  # NumPy keeps no names of these types
            arrays[name] = array = array.view(known[name].dtype)
        if array.dtype != known[name].dtype:
            raise UsageError(f"{path}: the array for {known[name]} is of {array.dtype}; convert it")
    return arrays


def runnable_feeds(
    session: ort.InferenceSession,
    shapes: Mapping[str, tuple[int, ...]],
    seed: int,
    given: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Inputs that the model runs on: random ones, or where it refuses those, ones, or else zeros.

    `given` are taken as they are.

    Raises NoFeedsError where it runs on none, which happens where inputs hold shapes or indices that have
    to fit each other.
    """
    refusal = tried = ""
    quiet = ort.RunOptions()
    quiet.log_severity_level = _FATAL
    for kind in _KINDS:
        own = {name: array.shape for name, array in given.items()}
        feeds = make_feeds(session, {**shapes, **own}, seed, kind) | dict(given)
        try:
            run(session, feeds, quiet)
            return feeds
        except Exception as error:  # onnxruntime raises classes of its own for each status
            refusal = refusal or what_onnxruntime_says(error)
            tried = ", ".join(
                f"{name}:{','.join(map(str, x.shape)) or 'scalar'}" for name, x in feeds.items()
            )
    raise NoFeedsError(f"onnxruntime runs the model on no inputs made up for {tried} ({refusal})")


def resolve_shapes(
    inputs: Sequence[Input], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of each input: `shapes` by input name, then equal names, then defaults.

    A default extent is 1 for a batch (dimension 0), 224 for the height and width of an image (rank 4 with
    1, 3 or 4 channels), and 64 elsewhere.  Raises UsageError as make_feeds does.
    """
    known = {value.name: value for value in inputs}
    for name in shapes:
        if name not in known:
            expected = ", ".join(map(str, inputs)) or "none"
            raise UsageError(
                f"a shape is given for {name!r}, which is no input; the model's inputs: {expected}"
            )
    sizes: dict[str, tuple[int, str]] = {}
    for name, shape in shapes.items():
        _bind(known[name], shape, sizes)
    defaults = _default_sizes(inputs)
    return {
        value.name: shapes[value.name] if value.name in shapes else _filled(value, sizes, defaults)
        for value in inputs
    }


def _bind(value: Input, shape: tuple[int, ...], sizes: dict[str, tuple[int, str]]) -> None:
    """Checks a shape that the user gave and notes what its extents say of names in `sizes`."""
    found = "x".join(map(str, shape)) or "scalar"
    if any(size < 0 for size in shape):
        raise UsageError(f"input {value.name!r}: shape {found} has a negative extent; expected 0 or more")
    if value.shape is None:
        return
    if len(shape) != len(value.shape):
        raise UsageError(
            f"input {value.name!r}: shape {found} has rank {len(shape)}; "
            f"expected rank {len(value.shape)}: {value}"
        )
    for axis, (size, dimension) in enumerate(zip(shape, value.shape, strict=True)):
        if isinstance(dimension, int):
            if size != dimension:
                raise UsageError(
                    f"input {value.name!r}: shape {found} has {size} at dimension {axis}; "
                    f"the model fixes it to {dimension}"
                )
        elif dimension is not None:
            first, owner = sizes.setdefault(dimension, (size, value.name))
            if first != size:
                where = "another dimension of it" if owner == value.name else f"input {owner!r}"
                raise UsageError(
                    f"input {value.name!r}: shape {found} has {size} at dimension {axis} ({dimension}); "
                    f"expected {first}, as {where} has the same dimension {dimension}"
                )


def _default_sizes(inputs: Sequence[Input]) -> dict[str, int]:
    """The default of each named extent: of all its places, the one that asks for the least decides."""
    defaults: dict[str, int] = {}
    for value in inputs:
        for axis, dimension in enumerate(value.shape or ()):
            if isinstance(dimension, str):
                size = _default(value.shape or (), axis)
                defaults[dimension] = min(size, defaults.get(dimension, size))
    return defaults


def _filled(
    value: Input, sizes: Mapping[str, tuple[int, str]], defaults: Mapping[str, int]
) -> tuple[int, ...]:
    def extent(axis: int, dimension: Dimension, shape: tuple[Dimension, ...]) -> int:
        match dimension:
            case int():
                return dimension
            case str():
                return sizes[dimension][0] if dimension in sizes else defaults[dimension]
            case None:
                return _default(shape, axis)
            case _:
                assert_never(dimension)

    shape = value.shape or ()
    return tuple(extent(axis, dimension, shape) for axis, dimension in enumerate(shape))


def _default(shape: tuple[Dimension, ...], axis: int) -> int:
    if axis == 0:
        return _BATCH
    if len(shape) == 4:
        channels_first = shape[1] in _IMAGE_CHANNELS
        channels_last = shape[3] in _IMAGE_CHANNELS and not channels_first
        if (channels_first and axis in (2, 3)) or (channels_last and axis in (1, 2)):
            return _IMAGE
    return _OTHER


def _array(value: Input, shape: tuple[int, ...], seed: int, kind: Kind) -> np.ndarray:
    """Each input has a generator of its own, so that values do not depend on the order of inputs."""
    match kind:
        case "zeros":
            return np.zeros(shape, value.dtype)
        case "ones":
            return np.ones(shape, value.dtype)
        case "random" | "edge":
            pass
        case _:
            assert_never(kind)
    generator = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
    binary = any(part in value.name.lower() for part in _BINARY_NAMES)
    if value.dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(np.bool_)
    if value.dtype.kind in "iu":
        if value.dtype.itemsize == 1 and not binary:
            return np.asarray(generator.integers(0, 256, shape)).astype(np.uint8).view(value.dtype)
        return np.asarray(generator.integers(0, 2 if binary else _IDS, shape)).astype(value.dtype)
    if kind == "edge":
        return _edges(generator, shape, value.dtype)
    if binary:
        return np.asarray(generator.integers(0, 2, shape)).astype(value.dtype)
    return np.asarray(generator.standard_normal(shape)).astype(value.dtype)


def _edges(generator: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
    """Normal values, and in every third place one of the values that break careless arithmetic."""
    limits = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    special = np.array(
        [np.nan, np.inf, -np.inf, 0.0, -0.0, limits.smallest_subnormal, -limits.smallest_subnormal]
        + [limits.tiny, -limits.tiny, limits.max, limits.min, limits.eps, 1.0, -1.0],
        dtype,
    )
    values = np.asarray(generator.standard_normal(shape)).astype(dtype)
    places = generator.integers(0, 3, shape) == 0
    return np.where(places, special[generator.integers(0, len(special), shape)], values)


def _of_proto(value: onnx.ValueInfoProto) -> Input:
    if not value.type.HasField("tensor_type"):
        raise _unsupported(value.name, value.type.WhichOneof("value") or "no type")
    tensor = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type)
    dtype = _numpy_dtype(value.name, name)
    if not tensor.HasField("shape"):
        return Input(value.name, dtype, None)
    return Input(
        value.name,
        dtype,
        tuple(
            _dimension(size.dim_value if size.HasField("dim_value") else size.dim_param)
            for size in tensor.shape.dim
        ),
    )


def _of_argument(argument: ort.NodeArg) -> Input:
    """onnxruntime writes an unknown rank and a scalar alike: such an input takes any shape."""
    written = str(argument.type)
    if not written.startswith("tensor("):
        raise _unsupported(argument.name, written)
    dtype = _numpy_dtype(argument.name, written.removeprefix("tensor(").removesuffix(")").upper())
    shape = tuple(_dimension(size) for size in argument.shape)
    return Input(argument.name, dtype, shape or None)


def _dimension(size: int | str | None) -> Dimension:
    """A name that names nothing, or a size below 0, is an extent of its own."""
    if isinstance(size, int):
        return size if size >= 0 else None
    return None if size is None or size in _UNNAMED else size


def _numpy_dtype(name: str, written: str) -> np.dtype[np.generic]:
    number = onnx.TensorProto.DataType.Value(written) if written in onnx.TensorProto.DataType.keys() else 0
    if number in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise _unsupported(name, written.lower())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
    if dtype.kind not in "biuf" and not is_own(dtype):
        raise _unsupported(name, written.lower())
    return np.dtype(dtype)


def _unsupported(name: str, found: str) -> NoFeedsError:
    return NoFeedsError(f"input {name!r} is of type {found}; expected a tensor of floats, integers or bool")
