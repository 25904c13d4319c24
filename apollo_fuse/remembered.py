"""What an earlier run of the same compilation decided: which kernels stay, and what was found of each.

Verifying and measuring take most of a compilation's time, and find the same again where the model, the
kernels, the options, the versions and the machine are the same. All of these are in the key.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from apollo_fuse.acceptance import Judgement
from apollo_fuse.atomic import write_text
from apollo_fuse.fusion import Candidate
from apollo_fuse.graph import Refused
from apollo_fuse.options import Options
from apollo_fuse.report import LatencyReport
from apollo_fuse.settle import Settled
from apollo_fuse.summary import cpu_name
from apollo_fuse.verify import Verdict

_PACKAGES = ("numpy", "onnx", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Decision:
    """A `Settled` in terms of the candidates' places, with the shapes and the warnings of the run.

    shapes: candidate, input, and the shape that the input had.
    regrouped: what the feedback refused, turn by turn; places elsewhere are those behind the last turn.
    """

    kept: tuple[int, ...]
    judgements: Mapping[str, Judgement]
    latency: LatencyReport
    verdict: Verdict
    laid_out: bool
    shapes: tuple[tuple[int, int, tuple[int, ...]], ...]
    warnings: tuple[str, ...]
    regrouped: tuple[Mapping[int, Refused], ...]

    def settled(self, candidates: Sequence[Candidate]) -> Settled:
        kept = tuple(candidates[place] for place in self.kept)
        return Settled(kept, self.latency, self.verdict, self.judgements, self.laid_out)


def key_of(
    files: Iterable[Path], candidates: Iterable[Candidate], options: Options, facts: Iterable[str]
) -> str:
    """The name of a decision: `files` hold the model and its weights, `facts` whatever else it rests on."""
    key = hashlib.sha256()
    given = () if options.inputs is None else (options.inputs,)
    for file in (*files, *given, *_own_files()):
        with file.open("rb") as content:
            key.update(hashlib.file_digest(content, "blake2b").digest())
    chosen = replace(options, inputs=None, dump=None, cache_dir=Path(), remeasure=False)
    texts = (repr(chosen), cpu_name(), *(f"{name} {version(name)}" for name in _PACKAGES), *facts)
    for text in (*texts, *(part for x in candidates for part in (x.variant, x.source))):
        key.update(f"{len(text)}:{text}".encode())
    return key.hexdigest()


def recall(cache: Path, key: str) -> Decision | None:
    """The decision with this key, or None where there is none that can be read."""
    try:
        return _decoded(json.loads(_place(cache, key).read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never made, or damaged: it is made anew


def remember(cache: Path, key: str, decision: Decision) -> None:
    place = _place(cache, key)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(place, json.dumps(asdict(decision)))


def _place(cache: Path, key: str) -> Path:
    return cache / "decisions" / f"{key}.json"


def _decoded(found: dict[str, object]) -> Decision:
    shapes, judgements, regrouped = (found[n] for n in ("shapes", "judgements", "regrouped"))
    latency, verdict, kept, warnings = (found[n] for n in ("latency", "verdict", "kept", "warnings"))
    if not (
        isinstance(shapes, list)
        and isinstance(judgements, dict)
        and isinstance(latency, dict)
        and isinstance(verdict, dict)
        and isinstance(kept, list)
        and isinstance(warnings, list)
        and isinstance(regrouped, list)
    ):
        raise TypeError("not a decision")
    return Decision(
        tuple(int(place) for place in kept),
        {
            variant: Judgement(**{**j, "verdict": Verdict(**j["verdict"])})
            for variant, j in judgements.items()
        },
        LatencyReport(**latency),
        Verdict(**verdict),
        bool(found["laid_out"]),
        tuple((int(c), int(i), tuple(map(int, shape))) for c, i, shape in shapes),
        tuple(map(str, warnings)),
        tuple(
            {int(place): Refused((), r["rule"], r["reason"], r["evidence"]) for place, r in turn.items()}
            for turn in regrouped
        ),
    )


def _own_files() -> list[Path]:
    """The code that judges, and what is compiled into every kernel."""
    package = Path(str(importlib.resources.files("apollo_fuse")))
    return sorted([*package.glob("*.py"), *(package / "runtime").glob("*.[ch]")])
