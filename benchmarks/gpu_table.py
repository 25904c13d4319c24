"""What the static benchmark for GPUs found, and what of it does not hold, as markdown and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from benchmarks.gpu_row import Compiled, OnGpu
from benchmarks.table import grid, times

MOST_TRAFFIC = 1.05
"""Bytes over compulsory ones that the memory-bound set may move."""
FEWER_LAUNCHES = 5.0
"""What launches of memory-bound models fall by at least."""

HEADER = (
    "model",
    "GPU",
    "kernels",
    "launches",
    "fewer",
    "DRAM / compulsory",
    "spills",
    "unfused us",
    "fused us",
    "predicted",
    "compile s cold",
    "warm",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One model; `error` says what failed."""

    name: str
    memory_bound: bool
    compiled: Compiled | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Total:
    """The rows of a group on one GPU: all bytes over all that are compulsory, all launches, all spills."""

    group: str
    gpu: str
    traffic: float
    fewer_launches: float
    spills: int


def totals(rows: Sequence[Row]) -> tuple[Total, ...]:
    groups = {
        "memory-bound": [row for row in rows if row.memory_bound],
        "the others": [row for row in rows if not row.memory_bound],
    }
    found: list[Total] = []
    for group, members in groups.items():
        done = [row.compiled for row in members if row.compiled is not None]
        for gpu in dict.fromkeys(name for x in done for name in x.gpus):
            own = [x.gpus[gpu] for x in done if gpu in x.gpus]
            found.append(
                Total(
                    group,
                    gpu,
                    sum(x.moved for x in own) / max(1, sum(x.compulsory for x in own)),
                    sum(x.memory_launches_before for x in own)
                    / max(1, sum(x.memory_launches_after for x in own)),
                    sum(x.spills for x in own),
                )
            )
    return tuple(found)


def missed(row: Row) -> tuple[str, ...]:
    """What a row does not hold of what is asked: of all models no spills, of memory-bound ones all three.

    One launch is as few as there are, also where onnxruntime has an operator for all of the model.
    """
    if row.compiled is None:
        return (row.error or "not compiled",)
    found: dict[str, None] = {}
    for gpu, x in row.compiled.gpus.items():
        if x.spills:
            found[f"{x.spills} bytes spilled on {gpu}"] = None
        if row.memory_bound and traffic(x) > MOST_TRAFFIC:
            found[f"{times(traffic(x))} traffic on {gpu} ({row.compiled.worst[gpu]})"] = None
        if row.memory_bound and fewer(x) < FEWER_LAUNCHES and x.memory_launches_after > 1:
            found[f"{times(fewer(x))} fewer launches"] = None
    return tuple(found)


def traffic(found: OnGpu) -> float:
    return found.moved / found.compulsory if found.compulsory else 1.0


def fewer(found: OnGpu) -> float:
    """By what launches fall, of all that is not compute-bound."""
    return found.memory_launches_before / max(1, found.memory_launches_after)


def cells(row: Row) -> list[tuple[str, ...]]:
    """A line for each GPU; what holds for all of them stands in the first."""
    if row.compiled is None:
        return [(row.name, f"failed: {row.error}", *[""] * (len(HEADER) - 2))]
    seconds = (f"{row.compiled.cold_seconds:.1f}", f"{row.compiled.warm_seconds:.2f}")
    return [
        (
            row.name if place == 0 else "",
            gpu,
            str(x.kernels),
            f"{x.memory_launches_before} -> {x.memory_launches_after}",
            times(fewer(x)),
            times(traffic(x)) if x.compulsory else "-",
            str(x.spills),
            f"{x.unfused_us:.1f}",
            f"{x.fused_us:.1f}",
            times(x.unfused_us / x.fused_us if x.fused_us else None),
            *(seconds if place == 0 else ("", "")),
        )
        for place, (gpu, x) in enumerate(row.compiled.gpus.items())
    ]


def to_json(rows: Sequence[Row], machine: Mapping[str, str]) -> dict[str, object]:
    return {
        "machine": dict(machine),
        "rows": [{**asdict(row), "missed": missed(row)} for row in rows],
        "totals": [asdict(total) for total in totals(rows)],
    }


def to_markdown(rows: Sequence[Row], machine: Mapping[str, str]) -> str:
    """A table of all models, one of the sums over them, and what does not hold."""
    wanting = [(row.name, "; ".join(missed(row))) for row in rows if missed(row)]
    sections = [
        "# Benchmarks for GPUs, without one",
        "\n".join(f"- {key}: {value}" for key, value in machine.items()),
        "Kernels compiled ahead of time and predicted; nothing of this ran on a GPU. Launches: of all "
        "operators that are not compute-bound, in onnxruntime's optimised graph and in the fused one. "
        "DRAM / compulsory: bytes that the fused kernels are predicted to move with cold caches, over "
        "those of their inputs and outputs. Spills: bytes of a thread, of the kernel with most. "
        "Microseconds: predicted for an A100, an H100 or an MI300X, of the same operators; what is not "
        "fused counts as a launch that does nothing but move its tensors. Seconds of compiling are "
        "those of all these GPUs together.",
        grid(HEADER, [line for row in rows for line in cells(row)]),
        "## Sums",
        grid(
            ("models", "GPU", "DRAM / compulsory", "fewer launches", "spills"),
            [
                (x.group, x.gpu, f"{x.traffic:.3f}x", times(x.fewer_launches), str(x.spills))
                for x in totals(rows)
            ],
        ),
    ]
    if wanting:
        sections += ["## What does not hold", grid(("model", "found"), wanting)]
    return "\n\n".join(sections) + "\n"
