"""Holds fused models against other compilers: ``python -m benchmarks.peers``, or ``make bench-peers``.

onnxruntime, apollo-fuse and each compiler that is installed measure a model in turn, each in a process of its
own and as users run it, with threads that spin where that is how they wait.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import models
from benchmarks.bench import Failed, child, each, keep, machine, parser_of
from benchmarks.peer_row import PEERS
from models import Builder

PACKAGES = {"OpenVINO": "openvino", "IREE": "iree-base-compiler"}
BEHIND = 0.9
"""Of the speed of the best other compiler: no model is to fall under it."""
_TURNS = 2


@dataclass(frozen=True, slots=True)
class Row:
    """Least seconds of one model: in onnxruntime, fused, and in each other compiler that computes it.

    failures: why others did not.
    """

    name: str
    unfused: float | None = None
    fused: float | None = None
    peers: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def best(self) -> str | None:
        return min(self.peers, key=self.peers.__getitem__, default=None)

    @property
    def lead(self) -> float | None:
        """The time of the best other compiler over ours."""
        return self.peers[self.best] / self.fused if self.best is not None and self.fused else None

    @property
    def behind(self) -> bool:
        return self.lead is not None and self.lead < BEHIND


def installed() -> dict[str, str]:
    """The versions of the other compilers that are there."""
    found: dict[str, str] = {}
    for name, package in PACKAGES.items():
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def measured(name: str, folder: Path, peers: Sequence[str], *, seconds: float, threads: int) -> Row:
    """The row of one model; what the others fail at is part of it, what we do an error."""
    fused = folder / f"{name}.fused.onnx"
    settings = ["--seconds", str(seconds), "--threads", str(threads)]
    result = folder / f"{name}.json"

    def ours(mode: str, *arguments: str) -> Mapping[str, object]:
        return child("benchmarks.row", [mode, name, *arguments, *settings], result)

    least: dict[str, float] = {}
    failures: dict[str, str] = {}

    def note(who: str, seconds_of: object) -> None:
        assert isinstance(seconds_of, float)
        least[who] = min(seconds_of, least.get(who, seconds_of))

    try:
        ours("compare", "--fused", str(fused), "--layout", "portable")
        for _ in range(_TURNS):
            note("unfused", ours("spinning")["minimum"])
            note("fused", ours("spinning", "--fused", str(fused))["minimum"])
            for peer in [p for p in peers if p not in failures]:
                try:
                    note(peer, child("benchmarks.peer_row", [peer, name, *settings], result)["seconds"])
                except Failed as failure:
                    failures[peer] = str(failure)
    except Failed as failure:
        return Row(name, error=str(failure))
    finally:
        for file in folder.glob(f"{name}.*"):
            file.unlink()
    others = {peer: least[peer] for peer in peers if peer in least and peer not in failures}
    return Row(name, least["unfused"], least["fused"], others, failures)


def to_markdown(rows: Sequence[Row], facts: Mapping[str, str], peers: Sequence[str]) -> str:
    lines = ["# Other compilers", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines.append(
        "Speed-ups over onnxruntime with all its optimisations, by least times, each in its own process. "
        "Lead: the time of the best other compiler over that of the fused model. "
        f"(!) marks a lead under {BEHIND:g}x."
    )
    head = ["model", "onnxruntime ms", "apollo-fuse", *peers, "lead"]
    lines += ["", f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    lines += [f"| {' | '.join(_cells(row, peers))} |" for row in rows]
    reasons = [f"- {row.name}, {peer}: {why}" for row in rows for peer, why in row.failures.items()]
    return "\n".join([*lines, *(["", "What others did not compute:", "", *reasons] if reasons else []), ""])


def _cells(row: Row, peers: Sequence[str]) -> list[str]:
    if row.unfused is None or row.fused is None:
        return [row.name, f"failed: {row.error}", *("" for _ in range(len(peers) + 2))]
    speedups = [f"{row.unfused / row.peers[peer]:.2f}x" if peer in row.peers else "-" for peer in peers]
    lead = "-" if row.lead is None else f"{row.lead:.2f}x{' (!)' if row.behind else ''}"
    return [row.name, f"{1e3 * row.unfused:.3f}", f"{row.unfused / row.fused:.2f}x", *speedups, lead]


def _summary(row: Row, peers: Sequence[str]) -> str:
    return ", ".join(_cells(row, peers)) if row.error is None else f"{row.name}: failed: {row.error}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.peers", __doc__, seconds=1.5)
    chosen = parser.parse_args(arguments)
    versions = installed()
    if not versions:
        names = ", ".join(PACKAGES.values())
        print(f"benchmarks.peers: no other compiler is here; install one of {names}", file=sys.stderr)
        return 1
    peers = [peer for peer in PEERS if peer in versions]
    builders = [n for n in models.names() if isinstance(b := models.find(n), Builder) and b.memory_bound]
    row_of = partial(measured, peers=peers, seconds=chosen.seconds, threads=chosen.threads)
    rows = each(chosen.only or builders, row_of, partial(_summary, peers=peers))
    facts = machine() | versions | {"threads": str(chosen.threads)}
    markdown = to_markdown(rows, facts, peers)
    keep(chosen, {"machine": facts, "rows": [asdict(row) for row in rows]}, markdown)
    print(markdown)
    return 1 if any(row.error is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
