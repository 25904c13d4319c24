"""Settles which layout a model is written in: both are measured, and what runs anywhere is favoured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse.layout import Layout
from apollo_fuse.measure import interleaved
from apollo_fuse.options import Options
from apollo_fuse.partition import Plan
from apollo_fuse.report import LayoutReport
from apollo_fuse.settle import BOUND_WINS, MODEL_RUNS, Settled
from apollo_fuse.stitching import Stitch
from apollo_fuse.tolerance import Array
from apollo_fuse.trial import Trial

_SECONDS = 2.0  # of measuring, for each model


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of a model in one layout; `trial` is None where there was nothing to try."""

    layout: Layout
    model: ir.Model
    chosen: Plan
    trial: Trial | None
    settled: Settled
    stitches: tuple[Stitch, ...] = ()  # that were judged


def layouts(options: Options) -> tuple[Layout, ...]:
    """The layouts to try, the portable one first."""
    return tuple(Layout) if options.layout == "auto" else (Layout(options.layout),)


def faster_layout(
    attempts: Sequence[Attempt], original: ort.InferenceSession, feeds: Mapping[str, Array]
) -> tuple[Attempt, tuple[LayoutReport, ...]]:
    """The attempt to write, and what was measured; nothing is where a layout has nothing to measure."""
    portable, bound = attempts
    if bound.trial is None or not (bound.settled.kept or bound.settled.alone):
        return portable, ()
    models = [original, bound.trial.fused(bound.settled.kept)]
    if portable.trial is not None and (portable.settled.kept or portable.settled.alone):
        models.append(portable.trial.fused(portable.settled.kept))
    timings = interleaved(models, feeds, seconds=_SECONDS * len(models), maximum_runs=MODEL_RUNS)
    unfused, in_blocks, in_rows = timings[0], timings[1], timings[-1 if len(models) == 3 else 0]
    wins = in_blocks.median < BOUND_WINS * in_rows.median and in_blocks.minimum < BOUND_WINS * in_rows.minimum
    tried = tuple(
        LayoutReport(x.layout, len(x.settled.kept), unfused.minimum * 1e3, timing.minimum * 1e3)
        for x, timing in ((portable, in_rows), (bound, in_blocks))
    )
    return (bound if wins else portable), tried
