"""Measures one model in a process of its own, so that a crash costs one row: ``python -m benchmarks.row``.

`compare` fuses the model and measures it against onnxruntime in turn, with spinning off; `spinning` measures
one of the two alone, with spinning on, as users run it.  Either writes its result as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

import apollo_fuse
import models
from apollo_fuse.measure import Timing, interleaved, noise, session_options
from apollo_fuse.options import LAYOUTS
from benchmarks.memory_share import memory_bound_share
from models import Builder, RealModel

_NOISE_SHARE = 0.3
_PROFILE_SHARE = 0.3
_AGREEMENT = 1e-3
"""Largest difference from the unfused outputs, over the largest finite value of the output."""
SLOWEST = 0.98
"""No model may get slower than this speed-up says."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model unfused and fused; times are in seconds.

    noise: the model's distance from itself, 1.0 at best.
    memory_bound_share: of onnxruntime's time for the unfused model, 0 to 1.
    """

    unfused: Timing
    fused: Timing
    noise: float
    memory_bound_share: float
    difference: float
    nodes_before: int
    nodes_after: int
    fused_nodes: int
    distinct_kernels: int
    compile_seconds: float

    @property
    def speedup(self) -> float:
        """By the least times."""
        return self.unfused.minimum / self.fused.minimum

    @property
    def median_speedup(self) -> float:
        return self.unfused.median / self.fused.median

    @property
    def bound(self) -> float | None:
        """The speed-up if the memory-bound part took no time (Amdahl); None where that is all there is."""
        return speedup_at(self.memory_bound_share, None)

    @property
    def won(self) -> float | None:
        """The time saved over the memory-bound time; above 1 it came from elsewhere too."""
        memory_bound = self.memory_bound_share * self.unfused.minimum
        return (self.unfused.minimum - self.fused.minimum) / memory_bound if memory_bound > 0 else None

    @property
    def slower(self) -> bool:
        """Whether the fused model falls under the bar that no model may fall under."""
        return self.speedup < SLOWEST


def speedup_at(share: float, factor: float | None) -> float | None:
    """Amdahl's law: the whole's speed-up if `share` of it gets `factor` times as fast, or free for None.

    None where nothing is left.
    """
    left = 1 - share + (share / factor if factor is not None else 0.0)
    return 1 / left if left > 0 else None


def compare(name: str, output: Path, layout: str, *, seconds: float, threads: int) -> Comparison:
    """Fuses the model into `output` and measures it.  Raises ValueError where the outputs differ."""
    model = models.path(name)
    feeds = models.feeds(name)
    options = replace(compile_options(name, feeds, output, threads), layout=layout)
    started = time.perf_counter()
    report = apollo_fuse.fuse(model, output, options=options)
    compiled = time.perf_counter() - started

    def unfused_session() -> ort.InferenceSession:
        return ort.InferenceSession(str(model), session_options(threads))

    own_noise = noise(unfused_session, feeds, seconds=_NOISE_SHARE * seconds)
    unfused = unfused_session()
    fused = apollo_fuse.session(output, sess_options=session_options(threads))
    difference = require_agreement(unfused.run(None, dict(feeds)), fused.run(None, dict(feeds)))
    before, after = interleaved([unfused, fused], feeds, seconds=seconds)
    share = memory_bound_share(model, feeds, seconds=_PROFILE_SHARE * seconds, threads=threads)
    return Comparison(
        before,
        after,
        own_noise,
        share,
        difference,
        report.nodes_before,
        report.nodes_after,
        report.fused_nodes,
        report.distinct_kernels,
        compiled,
    )


def compile_options(
    name: str, feeds: Mapping[str, np.ndarray], output: Path, threads: int
) -> apollo_fuse.Options:
    """How a model is fused to be measured: for its own shapes and inputs, and decided anew."""
    entry = models.find(name)
    shapes = tuple(apollo_fuse.InputShape(key, value) for key, value in entry.shapes.items() if value)
    inputs = _shipped_inputs(entry, feeds, output)
    return apollo_fuse.Options(threads=threads, shapes=shapes, inputs=inputs, remeasure=True)


def _shipped_inputs(entry: Builder | RealModel, feeds: Mapping[str, np.ndarray], output: Path) -> Path | None:
    """A file of the inputs for which random values make no sense, as `--inputs` takes it."""
    special = {name: array for name, array in feeds.items() if name in entry.chosen}
    if not special:
        return None
    path = output.with_suffix(".npz")
    np.savez(path, **special)  # type: ignore[arg-type]
    return path


def spinning(name: str, fused: Path | None, *, seconds: float, threads: int) -> Timing:
    """The fused model at `fused`, or without it the original, alone in this process with spinning on."""
    options = session_options(threads, spinning=True)
    if fused is None:
        session = ort.InferenceSession(str(models.path(name)), options)
    else:
        session = apollo_fuse.session(fused, sess_options=options)
    return interleaved([session], models.feeds(name), seconds=seconds)[0]


def require_agreement(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Their largest difference. Raises ValueError where that is more than rounding."""
    difference = largest_difference(expected, found)
    if not difference <= _AGREEMENT:
        raise ValueError(f"the fused outputs differ by {difference:.3g}; expected {_AGREEMENT:g} or less")
    return difference


def largest_difference(expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Over all outputs, the largest difference over the largest finite value; infinite where NaNs differ."""
    return max(map(_difference, expected, found), default=0.0)


def _difference(expected: np.ndarray, found: np.ndarray) -> float:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(wide)
    if (
        not np.array_equal(wide[~finite], other[~finite], equal_nan=True)
        or not np.isfinite(other[finite]).all()
    ):
        return float("inf")
    scale = np.abs(wide[finite]).max(initial=0.0)
    gap = np.abs(wide[finite] - other[finite]).max(initial=0.0)
    return float(gap / scale) if scale > 0 else float(gap)


def comparison_from(record: Mapping[str, object]) -> Comparison:
    """The value that asdict made `record` of."""
    fields = dict(record)
    for key in ("unfused", "fused"):
        fields[key] = Timing(**fields[key])  # type: ignore[arg-type]
    return Comparison(**fields)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row", description=__doc__)
    parser.add_argument("mode", choices=("compare", "spinning"))
    parser.add_argument("name", choices=models.names(), metavar="NAME")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument(
        "--fused", type=Path, help="the fused model: written by compare, measured by spinning"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default="portable", help="that compare fuses in")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    if chosen.mode == "compare" and chosen.fused is None:
        parser.error("compare needs --fused")
    settings = {"seconds": chosen.seconds, "threads": chosen.threads}
    result = (
        compare(chosen.name, chosen.fused, chosen.layout, **settings)
        if chosen.mode == "compare"
        else spinning(chosen.name, chosen.fused, **settings)
    )
    chosen.result.write_text(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
