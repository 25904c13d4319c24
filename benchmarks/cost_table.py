"""Kernels measured and predicted: the rows, how far the two are apart, and both as tables and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

_HEADER = (
    "model",
    "kernel",
    "measured us",
    "predicted us",
    "ratio",
    "bound by",
    "unfused us",
    "predicted",
    "ratio",
)
_RESOLVED = 1e-6
"""Seconds below which the difference of two readings is mostly their noise."""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One distinct kernel; times in seconds. `error` says what failed, and then nothing was measured.

    measured, predicted: of the kernel itself. call: of a run of the session with an op of the same inputs and
        outputs and no kernel. calls: what the model adds for onnxruntime's call of a kernel.
    unfused, predicted_unfused: of onnxruntime's operators with their dispatch.
    """

    model: str
    kernel: str
    variant: str
    measured: float = 0.0
    predicted: float = 0.0
    bound_by: str = ""
    call: float = 0.0
    unfused: float = 0.0
    predicted_unfused: float = 0.0
    calls: float = 0.0
    error: str | None = None

    @property
    def gains(self) -> bool:
        """Whether the kernel is faster than what it replaces."""
        return self.measured + self.calls < self.unfused

    @property
    def is_to_gain(self) -> bool:
        """Whether it is predicted to be."""
        return self.predicted + self.calls < self.predicted_unfused


def relative_error(measured: float, predicted: float) -> float:
    """The distance over what was measured; 1 where nothing was."""
    return abs(predicted - measured) / measured if measured > 0 else 1.0


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, of which equal values share one. 1 for fewer than two."""
    if len(one) < 2 or len(set(one)) < 2 or len(set(other)) < 2:
        return 1.0
    return statistics.correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [statistics.fmean(places[value]) for value in values]


def figures(rows: Sequence[KernelRow]) -> dict[str, float]:
    """How far predictions are from what was measured, over all rows that were."""
    done = [row for row in rows if row.error is None]
    if not done:
        return {}
    kernels = [(row.measured, row.predicted) for row in done]
    unfused = [(row.unfused, row.predicted_unfused) for row in done]
    resolved = [pair for pair in kernels if pair[0] >= _RESOLVED]
    return {
        "kernels": len(done),
        "median_error": _median(kernels),
        "rank_correlation": _ranked(kernels),
        "kernels_from_1_us": len(resolved),
        "median_error_from_1_us": _median(resolved),
        "unfused_median_error": _median(unfused),
        "unfused_rank_correlation": _ranked(unfused),
        "right_decisions": sum(row.gains == row.is_to_gain for row in done),
    }


def _median(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(relative_error(*pair) for pair in pairs) if pairs else 0.0


def _ranked(pairs: Sequence[tuple[float, float]]) -> float:
    return rank_correlation([a for a, _ in pairs], [b for _, b in pairs])


def summary(rows: Sequence[KernelRow]) -> str:
    found = figures(rows)
    failed = sum(row.error is not None for row in rows)
    if not found:
        return f"Nothing was measured; {failed} failed."
    return (
        f"{found['kernels']:.0f} distinct kernels: the median relative error is {found['median_error']:.1%}, "
        f"the rank correlation (Spearman) {found['rank_correlation']:.3f}. Of the "
        f"{found['kernels_from_1_us']:.0f} that take 1 us or more, the median error is "
        f"{found['median_error_from_1_us']:.1%}. What onnxruntime takes unfused: "
        f"{found['unfused_median_error']:.1%} and {found['unfused_rank_correlation']:.3f}. Whether a kernel "
        f"gains was predicted right for {found['right_decisions']:.0f} of {found['kernels']:.0f}."
        + (f" {failed} failed." if failed else "")
    )


def _cells(row: KernelRow) -> tuple[str, ...]:
    if row.error is not None:
        return (row.model, row.kernel, "failed", "", "", row.error, "", "", "")
    return (
        row.model,
        row.kernel,
        f"{1e6 * row.measured:.2f}",
        f"{1e6 * row.predicted:.2f}",
        _ratio(row.predicted, row.measured),
        row.bound_by,
        f"{1e6 * row.unfused:.2f}",
        f"{1e6 * row.predicted_unfused:.2f}",
        _ratio(row.predicted_unfused, row.unfused),
    )


def _ratio(predicted: float, measured: float) -> str:
    return f"{predicted / measured:.2f}" if measured > 0 else ""


def table(rows: Sequence[KernelRow]) -> Table:
    """For a terminal."""
    made = Table()
    for number, heading in enumerate(_HEADER):
        made.add_column(heading, justify="left" if number in (0, 1, 5) else "right", overflow="fold")
    for row in rows:
        made.add_row(*_cells(row))
    return made


def to_markdown(rows: Sequence[KernelRow], facts: Mapping[str, str], settings: Mapping[str, float]) -> str:
    """The summary, what it belongs to, and a line for each kernel."""
    about = ", ".join(f"{name} {value}" for name, value in (facts | settings).items())
    align = ["---" if place in (0, 1, 5) else "---:" for place in range(len(_HEADER))]
    lines = [summary(rows), "", about, "", f"| {' | '.join(_HEADER)} |"]
    lines.append(f"| {' | '.join(align)} |")
    lines += [f"| {' | '.join(cell.replace('|', ' ') for cell in _cells(row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def to_json(
    rows: Sequence[KernelRow], facts: Mapping[str, str], settings: Mapping[str, float]
) -> dict[str, object]:
    return {
        "machine": dict(facts),
        "settings": dict(settings),
        "summary": figures(rows),
        "kernels": [asdict(row) for row in rows],
    }
