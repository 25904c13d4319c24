"""Compiles every model for GPUs and says what they would do: ``python -m benchmarks.gpu``; none is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

import models
from apollo_fuse.gpu import KNOWN
from benchmarks.bench import Failed, child, each, keep, machine, show
from benchmarks.gpu_row import compiled_from
from benchmarks.gpu_table import HEADER, Row, cells, missed, to_json, to_markdown
from models import Builder


def measured(name: str, folder: Path, target: str, threads: int) -> Row:
    """The row of one model, in a process of its own; a failure is a row too."""
    entry = models.find(name)
    memory_bound = isinstance(entry, Builder) and entry.memory_bound
    arguments = [name, "--target", target, "--threads", str(threads)]
    try:
        found = child("benchmarks.gpu_row", arguments, folder / f"{name}.json")
    except Failed as failure:
        return Row(name, memory_bound, error=str(failure))
    return Row(name, memory_bound, compiled_from(found))


def printed(rows: Sequence[Row]) -> Table:
    """The rows for a console."""
    table = Table(title="Compiled for GPUs, and not run", caption="(!) does not hold what is asked of it")
    for place, name in enumerate(HEADER):
        table.add_column(name, justify="left" if place < 2 else "right", overflow="fold")
    for row in rows:
        first, *others = cells(row)
        table.add_row(f"{first[0]} (!)" if missed(row) else first[0], *first[1:])
        for line in others:
            table.add_row(*line)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=models.names(), metavar="NAME", help="this model; may be repeated"
    )
    parser.add_argument(
        "--gpu", action="append", choices=[str(gpu) for gpu in KNOWN], help="this one; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as markdown")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that compile")
    chosen = parser.parse_args(arguments)
    target = ",".join(("cpu", *(chosen.gpu or map(str, KNOWN))))
    by_kind = sorted(
        chosen.only or models.names(), key=lambda name: not getattr(models.find(name), "memory_bound", False)
    )
    rows = each(
        by_kind,
        partial(measured, target=target, threads=chosen.threads),
        lambda row: f"{row.name}: {'; '.join(missed(row)) or 'holds'}",
    )
    markdown = to_markdown(rows, machine())
    keep(chosen, to_json(rows, machine()), markdown)
    show(printed(rows), markdown)
    return 1 if any(row.error is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
