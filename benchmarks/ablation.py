"""What each layer of the fusion phase gains by itself: ``python -m benchmarks.ablation``.

Every model is fused with loop fusion alone (I), with memory stitching as well (I,II), with parallelism
stitching too (I,II,III), and once more with all layers but without the upward feedback. All of these and the
unfused model are measured in turn, as in the ablation study of Apollo (MLSys 2022).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import onnxruntime as ort

import apollo_fuse
import models
from apollo_fuse.measure import Timing, interleaved, session_options
from apollo_fuse.options import LAYERS, Options
from benchmarks.bench import Failed, child, each, keep, machine, parser_of
from benchmarks.row import SLOWEST, compile_options, require_agreement
from benchmarks.table import grid, times

NO_FEEDBACK = "no feedback"
VARIANTS: Mapping[str, Options] = {
    **{layers: Options(layers=layers) for layers in LAYERS},
    NO_FEEDBACK: Options(feedback=False),
}
_OWN_GAINS = {
    "II": (LAYERS[1], LAYERS[0]),
    "III": (LAYERS[2], LAYERS[1]),
    "feedback": (LAYERS[-1], NO_FEEDBACK),
}
"""What adds each, and what it is measured against."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to fuse a model: latency of the result in seconds, and what it runs.

    nodes: all nodes of the fused model; kernels: those of them that call a kernel. rounds: of the feedback.
    """

    timing: Timing
    nodes: int
    kernels: int
    rounds: int
    compile_seconds: float


@dataclass(frozen=True, slots=True)
class Ablation:
    """One model in all variants; `error` says what failed."""

    name: str
    unfused: Timing | None = None
    variants: Mapping[str, Variant] | None = None
    error: str | None = None

    def speedup(self, variant: str) -> float:
        """Over the unfused model, by least times."""
        assert self.unfused is not None and self.variants is not None, "a model that was measured"
        return self.unfused.minimum / self.variants[variant].timing.minimum

    def own_gain(self, part: str) -> float:
        """What one layer, or the feedback, makes the model faster by beside what there is without it."""
        added, without = _OWN_GAINS[part]
        return self.speedup(added) / self.speedup(without)


def ablate(name: str, folder: Path, *, seconds: float, threads: int) -> Ablation:
    """Fuses the model in each variant, into `folder`, and measures all of them.

    Raises ValueError where outputs differ from the unfused model's.
    """
    model, feeds = models.path(name), models.feeds(name)
    common = compile_options(name, feeds, folder / name, threads)
    sessions = [ort.InferenceSession(str(model), session_options(threads))]
    expected = sessions[0].run(None, dict(feeds))
    reports: list[apollo_fuse.Report] = []
    place_of: dict[bytes, int] = {}  # of the session that runs a fused model with these bytes
    places: list[int] = []
    for number, options in enumerate(VARIANTS.values()):
        output = folder / f"{name}.{number}.onnx"
        chosen = replace(common, layers=options.layers, feedback=options.feedback)
        reports.append(apollo_fuse.fuse(model, output, options=chosen))
        library = reports[-1].library
        content = output.read_bytes() + (b"" if library is None else library.read_bytes())
        if content not in place_of:
            place_of[content] = len(sessions)
            sessions.append(apollo_fuse.session(output, sess_options=session_options(threads)))
            require_agreement(expected, sessions[-1].run(None, dict(feeds)))
        places.append(place_of[content])
    timings = interleaved(sessions, feeds, seconds=seconds * len(sessions))
    variants = {
        variant: Variant(
            timings[place],
            report.nodes_after,
            report.fused_nodes,
            len(report.feedback_rounds),
            report.compile_seconds.total,
        )
        for variant, place, report in zip(VARIANTS, places, reports, strict=True)
    }
    return Ablation(name, timings[0], variants)


def from_json(record: Mapping[str, object]) -> Ablation:
    """The value that asdict made `record` of."""
    fields = dict(record)
    fields["unfused"] = Timing(**fields["unfused"])  # type: ignore[arg-type]
    variants: Mapping[str, Mapping[str, object]] = fields["variants"]  # type: ignore[assignment]
    fields["variants"] = {
        name: Variant(**{**variant, "timing": Timing(**variant["timing"])})  # type: ignore[arg-type]
        for name, variant in variants.items()
    }
    return Ablation(**fields)  # type: ignore[arg-type]


def groups(rows: Sequence[Ablation]) -> dict[str, list[Ablation]]:
    """The rows that were measured, as their means are stated."""
    measured = [row for row in rows if row.error is None]
    builders = {name for name, entry in models.BUILDERS.items() if entry.memory_bound}
    found = {
        "memory-bound builders": [row for row in measured if row.name in builders],
        "other builders": [
            row for row in measured if row.name in models.BUILDERS and row.name not in builders
        ],
        "real models": [row for row in measured if row.name in models.REAL],
    }
    return {group: members for group, members in found.items() if members}


def to_markdown(rows: Sequence[Ablation], facts: Mapping[str, str], settings: Mapping[str, float]) -> str:
    """The table of all models, and one of geometric means."""
    header = ("", "unfused ms", *VARIANTS, *(f"gain of {part}" for part in _OWN_GAINS), "nodes", "rounds")
    sections = [
        "# Ablation",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        f"Speed-ups over onnxruntime with all its optimisations, {settings['threads']:g} threads, by least "
        f"times; variants interleaved for {settings['seconds']:g} s each with spinning off. The gain of a "
        "layer is that of the variant with it over the one without; of the feedback, with all layers. "
        f"Nodes: of the model with {', then with '.join(LAYERS)}. Rounds: of the feedback with all layers. "
        f"(!) marks what falls under {SLOWEST:g}x.",
        grid(header, [_cells(row) for row in rows]),
        "## Geometric means",
        grid(
            ("", *VARIANTS, *(f"gain of {part}" for part in _OWN_GAINS), "models"),
            [_mean_cells(group, members) for group, members in groups(rows).items()],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _cells(row: Ablation) -> tuple[str, ...]:
    if row.error is not None or row.unfused is None or row.variants is None:
        reason = (row.error or "not measured").replace("|", "\\|").replace("\n", " ")
        return (row.name, f"failed: {reason}", *[""] * (len(VARIANTS) + len(_OWN_GAINS) + 2))
    speedups = [row.speedup(variant) for variant in VARIANTS]
    everything = row.variants[LAYERS[-1]]
    return (
        row.name,
        f"{1e3 * row.unfused.minimum:.3f}",
        *(f"{times(speedup)}{' (!)' if speedup < SLOWEST else ''}" for speedup in speedups),
        *(times(row.own_gain(part)) for part in _OWN_GAINS),
        " -> ".join(str(row.variants[layers].nodes) for layers in LAYERS),
        str(everything.rounds),
    )


def _mean_cells(group: str, rows: Sequence[Ablation]) -> tuple[str, ...]:
    return (
        group,
        *(times(statistics.geometric_mean([row.speedup(v) for row in rows])) for v in VARIANTS),
        *(times(statistics.geometric_mean([row.own_gain(part) for row in rows])) for part in _OWN_GAINS),
        str(len(rows)),
    )


def plot(rows: Sequence[Ablation], file: Path) -> None:
    """Bars of each model's speed-up with each variant, on a logarithmic axis, as PNG or SVG by the suffix."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    shown = [row for row in rows if row.error is None]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(shown) + 1.6), layout="constrained")
    height = 0.8 / len(VARIANTS)
    for place, variant in enumerate(VARIANTS):
        positions = [row + (place - (len(VARIANTS) - 1) / 2) * height for row in range(len(shown))]
        label = variant if variant == NO_FEEDBACK else f"layers {variant}"
        axes.barh(positions, [row.speedup(variant) - 1 for row in shown], height, left=1, label=label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xticks([tick for tick in (1, 1.5, 2, 3, 5, 10, 20, 50) if tick <= 1.2 * _most(shown)])
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("speed-up over onnxruntime")
    axes.legend(loc="lower right")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _most(rows: Sequence[Ablation]) -> float:
    return max((row.speedup(variant) for row in rows for variant in VARIANTS), default=1.0)


def measured(name: str, folder: Path, *, seconds: float, threads: int) -> Ablation:
    """The row of one model, measured in a process of its own; a failure is a row too."""
    settings = ["--seconds", str(seconds), "--threads", str(threads)]
    try:
        return from_json(child("benchmarks.ablation", ["--row", name, *settings], folder / f"{name}.json"))
    except Failed as failure:
        return Ablation(name, error=str(failure))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.ablation", __doc__, seconds=1.0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups as PNG or SVG")
    parser.add_argument("--row", choices=models.names(), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    settings = {"seconds": chosen.seconds, "threads": chosen.threads}
    if chosen.row is not None:
        with tempfile.TemporaryDirectory() as folder:
            row = ablate(chosen.row, Path(folder), **settings)
        chosen.result.write_text(json.dumps(asdict(row)))
        return 0
    rows = each(
        chosen.only or models.names(), partial(measured, **settings), lambda row: " | ".join(_cells(row))
    )
    facts = machine()
    if chosen.plot:
        plot(rows, chosen.plot)
    markdown = to_markdown(rows, facts, settings)
    record = {"machine": facts, "settings": settings, "rows": [asdict(row) for row in rows]}
    keep(chosen, record, markdown)
    print(markdown)
    return 1 if any(row.error is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
