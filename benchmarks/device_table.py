"""What ran on a GPU, as markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.device_rows import LAUNCHES, MOST_COMPILED, ROUNDS, Row
from benchmarks.on_provider import Whole
from benchmarks.table import grid, times


@dataclass(frozen=True, slots=True)
class Ran:
    """All rows. failed: what ended a model, by its name. left: models that no time was left for."""

    rows: Sequence[Row]
    wholes: Sequence[Whole] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    left: Sequence[str] = ()


def to_json(ran: Ran, facts: Mapping[str, str]) -> dict[str, object]:
    return {
        "device": dict(facts),
        "kernels": [asdict(row) for row in ran.rows if not row.is_chain],
        "chains": [asdict(row) for row in ran.rows if row.is_chain],
        "models": [asdict(row) for row in ran.wholes],
        "failed": dict(ran.failed),
        "left": list(ran.left),
    }


def to_markdown(ran: Ran, facts: Mapping[str, str]) -> str:
    kernels, chains = ([row for row in ran.rows if row.is_chain is kind] for kind in (False, True))
    wrong = sum(bool(row.problem) for row in kernels)
    sections = [
        "# Kernels on a GPU",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        f"{len(kernels)} kernels ran, {wrong} of them do not agree with onnxruntime. Microseconds: the least "
        f"of {ROUNDS} rounds of {LAUNCHES} runs, recorded as a graph. Share: what the bytes of inputs and "
        "outputs come to, of the peak bandwidth of memory; above 100 % they come from a cache. Eager and "
        "compiled: microseconds of the same operators in torch, where it is installed and has all of them; "
        f"more than {MOST_COMPILED} are not compiled.",
        "## Chains: all kernels of a model",
        _table(chains),
        "## Kernels",
        _table(kernels),
    ]
    if ran.wholes:
        sections += [
            "## Whole models in onnxruntime",
            grid(
                ("model", "unfused us", "fused us", "speed-up", "agrees"),
                [
                    (
                        x.model,
                        f"{x.unfused_us:.1f}",
                        f"{x.fused_us:.1f}",
                        times(x.unfused_us / x.fused_us if x.fused_us else None),
                        x.problem or "yes",
                    )
                    for x in ran.wholes
                ],
            ),
        ]
    if ran.failed:
        sections += ["## What failed", grid(("model", "found"), list(ran.failed.items()))]
    if ran.left:
        sections.append(f"No time was left for {', '.join(ran.left)}.")
    return "\n\n".join(sections) + "\n"


def _table(rows: Sequence[Row]) -> str:
    header = ("model", "kernel", "launches", "us", "MB", "share", "eager", "compiled", "agrees")
    return grid(header, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.model,
        row.kernel,
        str(row.launches),
        f"{row.us:.1f}",
        f"{row.bytes / 1e6:.2f}",
        f"{row.share:.0%}",
        *("-" if found is None else f"{found:.1f}" for found in (row.eager_us, row.compiled_us)),
        row.problem or "yes",
    )
