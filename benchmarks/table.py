"""What a benchmark run found: its rows, their geometric means, and both as markdown and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from apollo_fuse.measure import Timing
from benchmarks.row import SLOWEST, Comparison, speedup_at

_HEADER = (
    "model",
    "unfused ms",
    "fused ms",
    "speed-up",
    "by median",
    "spinning on",
    "noise",
    "memory-bound",
    "bound",
    "won",
    "nodes",
    "kernels",
    "compile s",
)


_LEAST_SHARE = 0.2
"""A model with a smaller memory-bound share has next to nothing to win there."""
_TARGET_FACTOR = 3.0
"""What the memory-bound part should get faster by, from the project's goal for real models."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model; `error` says what failed, and the rest is what was measured before that."""

    name: str
    real: bool
    core: bool
    memory_bound: bool
    comparison: Comparison | None = None
    spinning_unfused: Timing | None = None
    spinning_fused: Timing | None = None
    error: str | None = None

    @property
    def spinning_speedup(self) -> float | None:
        if self.spinning_unfused is None or self.spinning_fused is None:
            return None
        return self.spinning_unfused.minimum / self.spinning_fused.minimum


@dataclass(frozen=True, slots=True)
class Mean:
    """Geometric means of the speed-ups of a group; rows that failed have none, and are counted."""

    group: str
    speedup: float | None
    median_speedup: float | None
    spinning_speedup: float | None
    worst: float | None
    measured: int
    failed: int


@dataclass(frozen=True, slots=True)
class Gain:
    """How near a model comes to what a memory-bound part three times as fast would give.

    target: that speed-up of the whole; fraction: of what the target gains over 1, what was gained.
    """

    name: str
    memory_bound_share: float
    speedup: float
    target: float

    @property
    def fraction(self) -> float:
        return (self.speedup - 1) / (self.target - 1)


_ALL_GAINS = "geometric mean"


def gains(rows: Sequence[Row]) -> tuple[Gain, ...]:
    """Of the real models with a memory-bound share above a fifth, and of their geometric means at the end."""
    found = [
        Gain(row.name, share, row.comparison.speedup, target)
        for row in rows
        if row.real and row.comparison is not None and row.error is None
        if (share := row.comparison.memory_bound_share) > _LEAST_SHARE
        if (target := speedup_at(share, _TARGET_FACTOR)) is not None
    ]
    if not found:
        return ()
    share, speedup, target = (
        statistics.geometric_mean(values)
        for values in (
            [gain.memory_bound_share for gain in found],
            [gain.speedup for gain in found],
            [gain.target for gain in found],
        )
    )
    return (*found, Gain(_ALL_GAINS, share, speedup, target))


def means(rows: Sequence[Row]) -> tuple[Mean, ...]:
    groups = {
        "core builders": [row for row in rows if row.core],
        "memory-bound builders": [row for row in rows if row.memory_bound and not row.real],
        "all builders": [row for row in rows if not row.real],
        "real models": [row for row in rows if row.real],
    }
    return tuple(_mean(group, members) for group, members in groups.items() if members)


def to_json(
    rows: Sequence[Row], machine: Mapping[str, str], settings: Mapping[str, float]
) -> dict[str, object]:
    def record(row: Row) -> dict[str, object]:
        speedups = {
            "speedup": row.comparison.speedup if row.comparison else None,
            "median_speedup": row.comparison.median_speedup if row.comparison else None,
            "spinning_speedup": row.spinning_speedup,
            "bound": row.comparison.bound if row.comparison else None,
            "won": row.comparison.won if row.comparison else None,
            "slower": row.comparison.slower if row.comparison else None,
        }
        return {**asdict(row), **speedups}

    return {
        "machine": dict(machine),
        "settings": dict(settings),
        "rows": [record(row) for row in rows],
        "means": [asdict(mean) for mean in means(rows)],
        "gains": [{**asdict(gain), "fraction": gain.fraction} for gain in gains(rows)],
    }


def to_markdown(rows: Sequence[Row], machine: Mapping[str, str], settings: Mapping[str, float]) -> str:
    """Tables of the builders and of the real models, with their means and how they were measured."""
    threads, seconds = settings["threads"], settings["seconds"]
    sections = [
        "# Benchmarks",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
        f"Latency against onnxruntime with all its optimisations, {threads:g} threads, interleaved for "
        f"{seconds:g} s with spinning off: least times in ms, the speed-up by them, and by medians. "
        "Spinning on: the speed-up with each in a process of its own. Noise: the model against itself. "
        "Memory-bound: the share of onnxruntime's node time outside of convolutions, matrix products, "
        "recurrent layers and attention; bound: the speed-up were it free; won: the time saved over it. "
        f"(!) marks a model under {SLOWEST:g}x.",
    ]
    for title, members in (
        ("Builders", [row for row in rows if not row.real]),
        ("Real models", [row for row in rows if row.real]),
    ):
        if members:
            sections += [f"## {title}", grid(_HEADER, map(_cells, members))]
    header = ("geometric mean of", "speed-up", "by median", "spinning on", "worst", "models", "failed")
    sections += ["## Geometric means", grid(header, map(_mean_cells, means(rows)))]
    reached = gains(rows)
    if reached:
        sections += [
            f"## Real models with more than {_LEAST_SHARE:.0%} memory-bound",
            f"Target: the speed-up that a memory-bound part {_TARGET_FACTOR:g} times as fast would give; "
            "gained: the part of the target's gain that was reached.",
            grid(("model", "memory-bound", "speed-up", "target", "gained"), map(_gain_cells, reached)),
        ]
    return "\n\n".join(sections) + "\n"


def _mean(group: str, rows: Sequence[Row]) -> Mean:
    measured = [row.comparison for row in rows if row.comparison is not None and row.error is None]
    spinning = [row.spinning_speedup for row in rows if row.error is None]
    speedups = [comparison.speedup for comparison in measured]
    return Mean(
        group,
        _geometric(speedups),
        _geometric(comparison.median_speedup for comparison in measured),
        _geometric(speedup for speedup in spinning if speedup is not None),
        min(speedups, default=None),
        len(measured),
        sum(row.error is not None for row in rows),
    )


def _geometric(values: Iterable[float]) -> float | None:
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def _cells(row: Row) -> tuple[str, ...]:
    name = f"{row.name} (core)" if row.core else row.name
    if row.error is not None or row.comparison is None:
        reason = (row.error or "not measured").replace("|", "\\|").replace("\n", " ")
        return (name, f"failed: {reason}", *[""] * (len(_HEADER) - 2))
    found = row.comparison
    return (
        name,
        f"{1e3 * found.unfused.minimum:.3f}",
        f"{1e3 * found.fused.minimum:.3f}",
        f"{times(found.speedup)}{' (!)' if found.slower else ''}",
        times(found.median_speedup),
        times(row.spinning_speedup),
        times(found.noise),
        _percent(found.memory_bound_share),
        times(found.bound),
        _percent(found.won),
        f"{found.nodes_before} -> {found.nodes_after}",
        f"{found.distinct_kernels}",
        f"{found.compile_seconds:.1f}",
    )


def _mean_cells(mean: Mean) -> tuple[str, ...]:
    figures = (mean.speedup, mean.median_speedup, mean.spinning_speedup, mean.worst)
    return (mean.group, *map(times, figures), str(mean.measured), str(mean.failed))


def _gain_cells(gain: Gain) -> tuple[str, ...]:
    return (
        gain.name,
        _percent(gain.memory_bound_share),
        times(gain.speedup),
        times(gain.target),
        _percent(gain.fraction),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def times(value: float | None) -> str:
    """A speed-up as text."""
    return "-" if value is None else f"{value:.2f}x"


def grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, the first column to the left and the others to the right; nothing without rows."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if len(lines) > 2 else ""
