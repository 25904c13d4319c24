"""The charts of the notebook, each of what the benchmarks measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from apollo_fuse.measure import Timing
from apollo_fuse.options import LAYERS
from benchmarks.ablation import NO_FEEDBACK, VARIANTS, Ablation
from benchmarks.row import Comparison
from notebooks.style import FUSED, LIMIT, SERIES, UNFUSED, at_one, speedup_axis, time_axis

PARTS = ("II", "III", "feedback")
"""What the ablation tells apart beside Layer I."""

_BOUND_MARK = {"marker": "|", "markersize": 12, "markeredgewidth": 2}
_UNFUSED_LINE = {"linestyle": "--", "marker": "o", "markerfacecolor": "white"}
_FUSED_LINE = {"linestyle": "-", "marker": "D", "markersize": 4.5}
_MOST_OPERATORS = 14
_LEAST_SPREAD = 1.1
"""The colours of gains span at least this factor on either side, so that noise stays pale."""


def operator_counts(before: Counter[str], after: Counter[str]) -> Figure:
    """How many nodes there are of each operator, without fusion and with it."""
    total = Counter(before) | Counter(after)
    names = [name for name, _ in total.most_common(_MOST_OPERATORS)]
    others = [name for name in total if name not in names]
    labels = [*names, f"{len(others)} others"] if others else names

    def counts(found: Counter[str]) -> list[int]:
        shown = [found[name] for name in names]
        return [*shown, sum(found[name] for name in others)] if others else shown

    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(labels) + 1.2))
    places = np.arange(len(labels))
    for found, offset, colour, label in (
        (before, -0.2, UNFUSED, "unfused"),
        (after, 0.2, FUSED, "fused"),
    ):
        bars = axes.barh(
            places + offset, counts(found), 0.38, color=colour, label=f"{label}: {found.total()} nodes"
        )
        axes.bar_label(bars, padding=2, fontsize=8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("nodes")
    axes.legend(loc="lower right", frameon=False)
    axes.set_title("Nodes of the model by operator")
    return figure


def comparison(rows: Mapping[str, Comparison]) -> Figure:
    """Latency of each model unfused and fused, and how far its speed-up is from 1 and from its bound."""
    figure, (latency, gain) = pyplot.subplots(
        1, 2, figsize=(10, 0.3 * len(rows) + 1.9), sharey=True, width_ratios=(1, 1.25)
    )
    found = list(rows.values())
    _draw_latencies(latency, found)
    _draw_gains(gain, found)
    labels = [f"{name} ({row.memory_bound_share:.0%})" for name, row in rows.items()]
    latency.set_yticks(range(len(rows)), labels)
    latency.set_ylim(len(rows) - 0.4, -0.6)
    diamond = {"marker": "D", "linestyle": "", "markeredgecolor": "black"}
    figure.legend(
        handles=[
            Line2D([], [], marker="o", linestyle="", color=UNFUSED, label="unfused"),
            Line2D([], [], color=FUSED, label="fused", **diamond),
            Line2D([], [], color="white", label="written unchanged", **diamond),
            Line2D([], [], color="0.4", marker="|", label="noise"),
            Line2D([], [], color=LIMIT, label="bound", linestyle="", **_BOUND_MARK),
        ],
        loc="outside upper center",
        ncols=5,
        frameon=False,
    )
    return figure


def _draw_latencies(axes: Axes, rows: Sequence[Comparison]) -> None:
    places = np.arange(len(rows))
    before = np.array([1e3 * row.unfused.minimum for row in rows])
    after = np.array([1e3 * row.fused.minimum for row in rows])
    axes.hlines(places, np.minimum(before, after), np.maximum(before, after), color="0.7", linewidth=2)
    axes.plot(before, places, "o", color=UNFUSED)
    axes.plot(after, places, "D", color=FUSED, markersize=5, markeredgecolor="black", markeredgewidth=0.6)
    axes.set_xscale("log")
    time_axis(axes.xaxis)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("latency in ms, logarithmic (left is better)")
    axes.set_title("Latency")


def _draw_gains(axes: Axes, rows: Sequence[Comparison]) -> None:
    for place, row in enumerate(rows):
        axes.errorbar(
            row.speedup,
            place,
            xerr=[[row.speedup * (1 - 1 / row.noise)], [row.speedup * (row.noise - 1)]],
            fmt="D",
            markersize=5,
            color=FUSED if row.fused_nodes else "white",
            markeredgecolor="black",
            markeredgewidth=0.6,
            ecolor="0.4",
            capsize=2,
        )
        if row.bound is not None:
            axes.plot(row.bound, place, color=LIMIT, **_BOUND_MARK)
    axes.set_xscale("log")
    speedup_axis(axes.xaxis, [row.speedup for row in rows])
    at_one(axes)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("speed-up, logarithmic (right is better)")
    axes.set_title("Speed-up")


def own_gains(row: Ablation) -> list[float]:
    """What Layer I makes a model faster by, then what each of `PARTS` adds to that."""
    return [row.speedup(LAYERS[0]), *(row.own_gain(part) for part in PARTS)]


def layers(rows: Sequence[Ablation]) -> Figure:
    """The speed-up of each model with more and more layers, and what each layer makes it faster by."""
    figure, (bars, table) = pyplot.subplots(
        1, 2, figsize=(10, 0.55 * len(rows) + 1.9), sharey=True, width_ratios=(1.3, 1)
    )
    _draw_variants(bars, rows)
    _draw_own_gains(table, rows)
    bars.set_yticks(range(len(rows)), [row.name for row in rows])
    bars.set_ylim(len(rows) - 0.45, -0.55)
    figure.legend(loc="outside upper center", ncols=len(VARIANTS), frameon=False)
    return figure


def _draw_variants(axes: Axes, rows: Sequence[Ablation]) -> None:
    height = 0.8 / len(VARIANTS)
    for place, variant in enumerate(VARIANTS):
        places = np.arange(len(rows)) + (place - (len(VARIANTS) - 1) / 2) * height
        beyond = [row.speedup(variant) - 1 for row in rows]
        on = LAYERS[-1] if variant == NO_FEEDBACK else variant
        label = on.replace(",", ", ") + (f", {NO_FEEDBACK}" if variant == NO_FEEDBACK else "")
        axes.barh(places, beyond, 0.92 * height, left=1, color=SERIES[place], label=label)
    axes.set_xscale("log")
    speedup_axis(axes.xaxis, [row.speedup(variant) for row in rows for variant in VARIANTS])
    at_one(axes)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("speed-up, logarithmic (right is better)")
    axes.set_title("With more and more layers")


def _draw_own_gains(axes: Axes, rows: Sequence[Ablation]) -> None:
    gains = np.array([own_gains(row) for row in rows])
    spread = max(_LEAST_SPREAD, float(np.exp(np.abs(np.log(gains)).max())))
    axes.imshow(gains, aspect="auto", cmap="PuOr_r", norm=LogNorm(1 / spread, spread))
    for (row, column), gain in np.ndenumerate(gains):
        dark = abs(math.log(gain)) > 0.6 * math.log(spread)
        colour = "white" if dark else "black"
        axes.text(column, row, f"{gain:.2f}x", ha="center", va="center", color=colour)
    axes.set_xticks(range(1 + len(PARTS)), ["Layer I", "Layer II", "Layer III", "feedback"])
    axes.tick_params(left=False, bottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title("What each adds by itself")


@dataclass(frozen=True, slots=True)
class Point:
    """One model at one batch size and number of threads."""

    name: str
    batch: int
    threads: int
    unfused: Timing
    fused: Timing

    @property
    def speedup(self) -> float:
        """By the least times."""
        return self.unfused.minimum / self.fused.minimum


def sweep(points: Sequence[Point]) -> Figure:
    """Latency and speed-up over the batch size, a column a model and a colour a number of threads."""
    names = list(dict.fromkeys(point.name for point in points))
    threads = sorted({point.threads for point in points})
    colours = dict(zip(threads, SERIES[: len(threads)], strict=True))
    figure, grid = pyplot.subplots(
        2, len(names), figsize=(max(5.0, 3.4 * len(names)), 6), sharex="col", sharey="row", squeeze=False
    )
    for column, name in zip(grid.T, names, strict=True):
        _draw_sweep(*column, [point for point in points if point.name == name], colours)
    time_axis(grid[0, 0].yaxis)
    speedup_axis(grid[1, 0].yaxis, [point.speedup for point in points])
    grid[0, 0].set_ylabel("latency in ms, logarithmic")
    grid[1, 0].set_ylabel("speed-up, logarithmic")
    figure.legend(
        handles=[
            *(
                Line2D([], [], color=colour, marker="s", label=f"{count} thread{'s' if count > 1 else ''}")
                for count, colour in colours.items()
            ),
            Line2D([], [], color="0.3", label="unfused", **_UNFUSED_LINE),
            Line2D([], [], color="0.3", label="fused", **_FUSED_LINE),
        ],
        loc="outside upper center",
        ncols=len(threads) + 2,
        frameon=False,
    )
    return figure


def _draw_sweep(latency: Axes, gain: Axes, points: Sequence[Point], colours: Mapping[int, str]) -> None:
    for count, colour in colours.items():
        line = [point for point in points if point.threads == count]
        batches = [point.batch for point in line]
        latency.plot(batches, [1e3 * p.unfused.minimum for p in line], color=colour, **_UNFUSED_LINE)
        latency.plot(batches, [1e3 * p.fused.minimum for p in line], color=colour, **_FUSED_LINE)
        gain.plot(batches, [p.speedup for p in line], color=colour, **_FUSED_LINE)
    for axes in (latency, gain):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    at_one(gain, vertical=False)
    sizes = sorted({point.batch for point in points})
    gain.set_xticks(sizes, [str(size) for size in sizes])
    gain.xaxis.set_minor_locator(NullLocator())
    gain.set_xlabel("batch size, logarithmic")
    latency.set_title(points[0].name)
