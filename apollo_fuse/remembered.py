"""What an earlier run of the same compilation came to: the report, the library, the model around its weights.

A compilation finds and writes the same again where the model, the options, the code, the versions and the
machine are the same. All of these are in the key; weights that the model's files hold stay there.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apollo_fuse import onnx_files, wire
from apollo_fuse.atomic import replacing
from apollo_fuse.cpu import cpu_name
from apollo_fuse.options import Options
from apollo_fuse.report import (
    CompileSeconds,
    FeedbackRound,
    GpuReport,
    KernelReport,
    LatencyReport,
    LayoutReport,
    RefusedReport,
    Report,
    VerificationReport,
)
from apollo_fuse.versions import versions

_REPORT, _MODEL, _LIBRARY = "report.json", "model.onnx", "library.so"
_MOST = 1 << 28  # bytes of weights of its own that a result may have and is remembered
_ROOM = 1 << 30  # bytes that all results take; what was not used for longest goes first


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a compilation came to; `report` names the files of the run that it is from.

    model: the serialised written model, whose larger weights lie outside, where `onnx_files.file_of` finds
    them for the original; None for one that was written unchanged. library: its custom-op library, if any.
    """

    report: Report
    model: bytes | None
    library: bytes | None


def key_of(path: Path, options: Options, facts: Iterable[str]) -> str:
    """The name of a result for the model at `path`; `facts` are what it rests on beside model and options."""
    beside = sorted(onnx_files.data_files(path, onnx_files.read(path)))
    given = () if options.inputs is None else (options.inputs,)
    key = hashlib.sha256()
    for file in (path, *beside, *given, *_own_files()):
        with file.open("rb") as content:
            key.update(hashlib.file_digest(content, "sha256").digest())
    chosen = replace(options, inputs=None, dump=None, cache_dir=Path(), remeasure=False)
    for text in (repr(chosen), cpu_name(), repr(versions()), *facts):
        key.update(f"{len(text)}:{text}".encode())
    return key.hexdigest()


def recall(cache: Path, key: str) -> Outcome | None:
    """The result with this key, or None where there is none that can be read."""
    place = _place(cache, key)
    try:
        with zipfile.ZipFile(place) as file:
            held = {name: file.read(name) for name in file.namelist()}
        outcome = Outcome(_decoded(held[_REPORT]), held.get(_MODEL), held.get(_LIBRARY))
        os.utime(place)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # never made, or damaged: it is made anew
    return outcome


def remember(cache: Path, key: str, report: Report) -> None:
    """Keeps what the report tells of, and the files that it names, unless that would take much room."""
    held = {_REPORT: json.dumps(asdict(report), default=str).encode()}
    if report.library is not None or report.without_kernels:
        model = _around_weights(report.model, report.output)
        if model is None:
            return
        held[_MODEL] = model
    if report.library is not None:
        held[_LIBRARY] = report.library.read_bytes()
    place = _place(cache, key)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(place) as temporary, zipfile.ZipFile(temporary, "x") as file:
        for name, content in held.items():
            file.writestr(name, content)
    _make_room(place.parent)


def _place(cache: Path, key: str) -> Path:
    return cache / "results" / f"{key}.zip"


def _around_weights(original: Path, written: Path) -> bytes | None:
    """The written model around the weights that the original's files hold too; None for many others."""
    model = onnx_files.read(written)
    known = {x.name: x for x in onnx_files.read(original).graph.initializer if wire.is_outside(x)}
    own = 0
    for tensor in onnx_files.outside(model):
        place = wire.span(tensor, onnx_files.file_of(written))
        same = known.get(tensor.name)
        if same is not None and wire.span(same, onnx_files.file_of(original)).holds_what(place):
            tensor.ClearField("external_data")
            tensor.external_data.extend(same.external_data)
            continue
        own += place.length
        if own > _MOST:
            return None
        onnx_files.take_in(tensor, onnx_files.file_of(written))
    content: bytes = model.SerializeToString()
    return content


def _make_room(folder: Path) -> None:
    held = sorted(((x.stat().st_mtime_ns, x.stat().st_size, x) for x in folder.glob("*.zip")), reverse=True)
    taken = 0
    for _, size, file in held:
        taken += size
        if taken > _ROOM:
            file.unlink(missing_ok=True)


def _decoded(text: bytes) -> Report:
    """A report from its JSON, in which every sequence is a list."""
    found = _frozen(json.loads(text))
    if not isinstance(found, dict):
        raise TypeError("not a report")
    parts = {
        "kernels": KernelReport,
        "refused": RefusedReport,
        "feedback_rounds": FeedbackRound,
        "layouts": LayoutReport,
    }
    rounds = tuple({**x, "refused": RefusedReport(**x["refused"])} for x in found["feedback_rounds"])
    found["feedback_rounds"] = rounds
    whole = {"verification": VerificationReport, "latency": LatencyReport, "compile_seconds": CompileSeconds}
    found["kernels"] = tuple(
        {**x, "gpu": {name: GpuReport(**part) for name, part in x["gpu"].items()}} for x in found["kernels"]
    )
    many = {name: tuple(kind(**part) for part in found[name]) for name, kind in parts.items()}
    return Report(**{**found, **many, **{name: kind(**found[name]) for name, kind in whole.items()}})


def _frozen(value: object) -> object:
    match value:
        case list():
            return tuple(map(_frozen, value))
        case dict():
            return {name: _frozen(part) for name, part in value.items()}
    return value


def _own_files() -> list[Path]:
    """The code of the compiler, and what is compiled into every library."""
    package = importlib.resources.files("apollo_fuse")
    folders = os.walk(str(package), followlinks=True)  # passes and codegen are links in a checkout
    files = (Path(folder, name) for folder, _, names in folders for name in names)
    return sorted(file for file in files if file.suffix in (".py", ".c", ".h"))
