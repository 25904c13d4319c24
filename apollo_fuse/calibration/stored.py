"""The processor at hand, measured, and kept as JSON in the cache under all that its figures rest on."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from apollo_fuse.atomic import write_text
from apollo_fuse.calibration.measuring import measure
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cpu import cpu_name
from apollo_fuse.machine import Level, Machine, MachineError, Runtime, Unit

FORMAT = 3
"""Grows when what is measured, or how it is kept, changes."""
_PLAIN = ("name", "source", "cores", "vector", "line", "ways")
TIMES = ("loop", "drain", "item", "node", "argument", "launch", "wake")


def calibrated(toolchain: Toolchain, cache: Path, threads: int, anew: bool = False) -> Machine:
    """The machine at hand, for code of `toolchain`: as it was measured before, or else measured now.

    With `anew` it is measured in any case. A file that cannot be read, or was made under other facts, is made
    anew. Raises CompilerError.
    """
    facts = _facts(toolchain, threads)
    place = cache / "machines" / f"{_digest(facts)}.json"
    found = None if anew else recall(place, facts)
    if found is None:
        found = measure(toolchain, cache, threads)
        remember(place, facts, found)
    return found


def remember(place: Path, facts: Mapping[str, str], machine: Machine) -> None:
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(place, json.dumps({"format": FORMAT, "facts": dict(facts), "machine": to_json(machine)}))


def recall(place: Path, facts: Mapping[str, str]) -> Machine | None:
    """The machine that was measured under the same facts; None where there is no such file to be read."""
    try:
        found = json.loads(place.read_text())
        same = found["format"] == FORMAT and found["facts"] == dict(facts)
        return from_json(found["machine"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, MachineError):
        return None


def to_json(machine: Machine) -> dict[str, object]:
    """A processor's figures as JSON values."""
    runtime = machine.runtime
    assert runtime is not None and machine.gpu is None, "what is kept is a processor"
    return {
        **{name: getattr(machine, name) for name in (*_PLAIN, *TIMES)},
        "levels": [[x.name, x.size, x.shared, x.read, x.write, x.most] for x in machine.levels],
        "hidden": machine.hidden,
        "seconds": [[unit.value, size, seconds] for (unit, size), seconds in machine.seconds.items()],
        "runtime": {
            "node": runtime.node,
            "elements": dict(runtime.elements),
            "span": runtime.span,
            "parallel": runtime.parallel,
        },
    }


def from_json(found: Mapping[str, object]) -> Machine:
    """The machine that `to_json` made `found` of. Raises ValueError or TypeError where it is none."""
    levels, seconds, runtime = found["levels"], found["seconds"], found["runtime"]
    if not (isinstance(levels, list) and isinstance(seconds, list) and isinstance(runtime, dict)):
        raise TypeError("not a machine")
    elements = runtime["elements"]
    if not isinstance(elements, dict):
        raise TypeError("not a machine")
    return Machine(
        name=str(found["name"]),
        source=str(found["source"]),
        cores=_whole(found["cores"]),
        vector=_whole(found["vector"]),
        line=_whole(found["line"]),
        ways=_whole(found["ways"]),
        levels=tuple(
            Level(
                str(name),
                None if size is None else _whole(size),
                bool(shared),
                _positive(read),
                _positive(write),
                None if most is None else _positive(most),
            )
            for name, size, shared, read, write, most in levels
        ),
        seconds={(Unit(unit), _whole(size)): _positive(value) for unit, size, value in seconds},
        hidden=_share(found["hidden"]),
        loop=_positive(found["loop"]),
        drain=_positive(found["drain"]),
        item=_positive(found["item"]),
        node=_positive(found["node"]),
        argument=_positive(found["argument"]),
        launch=_positive(found["launch"]),
        wake=_positive(found["wake"]),
        runtime=Runtime(
            _positive(runtime["node"]),
            {str(name): _positive(value) for name, value in elements.items()},
            _positive(runtime["span"]),
            _positive(runtime["parallel"]),
        ),
    )


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{value!r} is no number above 0")
    return value


def _positive(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{value!r} is no number above 0")
    return float(value)


def _share(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is no share")
    return float(value)


def _facts(toolchain: Toolchain, threads: int) -> dict[str, str]:
    """What a calibration rests on."""
    package = Path(str(importlib.resources.files("apollo_fuse")))
    folders = (package / "runtime", package / "calibration", package / "codegen")
    files = sorted(file for folder in folders for file in folder.glob("*.[chp]*"))
    return {
        "cpu": cpu_name(),
        "level": str(toolchain.cpu),
        "threads": str(threads),
        "compiler": toolchain.identification,
        "command": " ".join(toolchain.command),
        "onnxruntime": version("onnxruntime"),
        "sources": _digest({str(file.relative_to(package)): file.read_text() for file in files}),
    }


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:24]
