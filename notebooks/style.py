"""How all figures look: colours that the colour-blind tell apart, and a caption that names the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

# The palette of Okabe and Ito, "Color Universal Design" (2008).
UNFUSED = "#0072B2"
FUSED = "#E69F00"
LIMIT = "#555555"
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")

_SPEEDUPS = (0.5, 0.8, 1, 1.25, 1.5, 2, 3, 5, 10, 20, 50, 100)
_CROWDED = (0.8, 1.25)
"""Ticks that have no room on an axis up to more than `_LONG`."""
_LONG = 5
_SLACK = 1.15
_FEW_DECADES = 3


def set_style() -> None:
    """For every figure that is made from here on."""
    pyplot.rcParams.update(
        {
            "figure.dpi": 100,
            "font.size": 9.5,
            "axes.titlesize": 10.5,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "figure.constrained_layout.use": True,
        }
    )


def finished(figure: Figure, machine: Mapping[str, str], threads: int | None = None) -> Figure:
    """The figure with a caption of what it was measured on, ready to be shown once."""
    parts = [f"{machine['CPU']}, {machine['cores']} cores"]
    if threads is not None:
        parts.append(f"{threads} threads")
    parts += [f"{package} {machine[package]}" for package in ("onnxruntime", "apollo-fuse")]
    figure.supxlabel(" · ".join(parts), fontsize=8, color="0.35")
    pyplot.close(figure)
    return figure


def speedup_axis(axis: Axis, speedups: Sequence[float]) -> None:
    """Ticks of an axis of speed-ups that is logarithmic already, written as `1.5x`."""
    least, most = min(0.9, *speedups), max(1.5, *speedups)
    ticks = [tick for tick in _SPEEDUPS if least / _SLACK <= tick <= most * _SLACK]
    shown = [tick for tick in ticks if most <= _LONG or tick not in _CROWDED]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_minor_locator(NullLocator())


def time_axis(axis: Axis) -> None:
    """Ticks of a logarithmic axis of milliseconds, already drawn on, as plain numbers."""
    least, most = axis.get_view_interval()
    subdivided = most / least < 10**_FEW_DECADES
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if subdivided else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def at_one(axes: Axes, vertical: bool = True) -> None:
    """The line of models that are as fast as they were."""
    line = axes.axvline if vertical else axes.axhline
    line(1, color="black", linewidth=0.9, zorder=1.5)
