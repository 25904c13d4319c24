"""Fuses every model and measures it against onnxruntime: ``python -m benchmarks.bench``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from rich.console import Console, RenderableType

import apollo_fuse
import models
from apollo_fuse.cpu import cpu_name
from apollo_fuse.measure import Timing
from apollo_fuse.options import LAYOUTS
from benchmarks.row import comparison_from
from benchmarks.table import Row, to_json, to_markdown
from models import RealModel

T = TypeVar("T")

_ROOT = Path(__file__).resolve().parent.parent
_ROW_SECONDS = 1800.0
"""A row that takes longer hangs."""
_SPINNING_TURNS = 4
"""Both threads of a process may share a core for seconds, and the one that spins takes half of it."""
_SPINNING_SHARE = 0.5
"""Of the seconds of a row, for each process that spins."""
_PACKAGES = ("onnxruntime", "onnx", "numpy")


def measured(name: str, folder: Path, layout: str, *, seconds: float, threads: int) -> Row:
    """The row of one model, each measurement in a process of its own; a failure is a row too."""
    entry = models.find(name)
    row = (
        Row(name, real=True, core=False, memory_bound=False)
        if isinstance(entry, RealModel)
        else Row(name, real=False, core=entry.core, memory_bound=entry.memory_bound)
    )
    fused = folder / f"{name}.fused.onnx"

    def row_of(mode: str, *arguments: str, share: float = 1.0) -> dict[str, object]:
        settings = ["--seconds", str(share * seconds), "--threads", str(threads)]
        return child("benchmarks.row", [mode, name, *arguments, *settings], folder / f"{name}.json")

    try:
        row = replace(
            row, comparison=comparison_from(row_of("compare", "--fused", str(fused), "--layout", layout))
        )
        for _ in range(_SPINNING_TURNS):  # in turn: the machine may be busy with others for one of them
            unfused = _timing(row_of("spinning", share=_SPINNING_SHARE))
            fused_timing = _timing(row_of("spinning", "--fused", str(fused), share=_SPINNING_SHARE))
            row = replace(
                row,
                spinning_unfused=_least(row.spinning_unfused, unfused),
                spinning_fused=_least(row.spinning_fused, fused_timing),
            )
        return row
    except Failed as failure:
        return replace(row, error=str(failure))
    finally:
        for file in folder.glob(f"{name}.*"):
            file.unlink()


def _least(before: Timing | None, now: Timing) -> Timing:
    return now if before is None or now.minimum < before.minimum else before


class Failed(Exception):
    """A measuring process did not end well; the message is the last line it wrote."""


def child(module: str, arguments: Sequence[str], result: Path) -> dict[str, object]:
    """What the module writes to `result` as JSON, run in a process of its own. Raises Failed."""
    what = arguments[0].lstrip("-")
    command = [sys.executable, "-m", module, *arguments, "--result", str(result)]
    try:
        process = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=_ROW_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{what}: no result within {_ROW_SECONDS:g} s") from None
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        last = lines[-1] if lines and process.returncode > 0 else f"ended with status {process.returncode}"
        raise Failed(f"{what}: {last}")
    record: dict[str, object] = json.loads(result.read_text())
    return record


def _timing(record: Mapping[str, object]) -> Timing:
    return Timing(**record)  # type: ignore[arg-type]


def machine() -> dict[str, str]:
    """What the figures belong to."""
    facts = {"CPU": cpu_name(), "cores": str(os.cpu_count()), "system": platform.platform()}
    facts["python"] = platform.python_version()
    facts["apollo-fuse"] = apollo_fuse.__version__
    return facts | {package: version(package) for package in _PACKAGES}


def _summary(row: Row) -> str:
    if row.error is not None or row.comparison is None:
        return f"{row.name}: failed: {row.error}"
    found = row.comparison
    spinning = f", {row.spinning_speedup:.2f}x with spinning on" if row.spinning_speedup else ""
    return (
        f"{row.name}: {1e3 * found.unfused.minimum:.3f} ms -> {1e3 * found.fused.minimum:.3f} ms, "
        f"{found.speedup:.2f}x{spinning} "
        f"(noise {found.noise:.2f}x, {found.memory_bound_share:.0%} memory-bound)"
    )


def each(
    names: Sequence[str], row_of: Callable[[str, Path], T], summary: Callable[[T], str]
) -> tuple[T, ...]:
    """The rows of the named models, one after the other; a line tells of each as it is done."""
    rows: list[T] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            rows.append(row_of(name, Path(folder)))
            print(summary(rows[-1]), file=sys.stderr, flush=True)
    return tuple(rows)


def parser_of(module: str, description: str | None, seconds: float) -> argparse.ArgumentParser:
    """The arguments of a benchmark over models, which measures each comparison for `seconds` by default."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument(
        "--only", action="append", choices=models.names(), metavar="NAME", help="this model; may be repeated"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as markdown")
    parser.add_argument("--seconds", type=float, default=seconds, help="of measuring for each comparison")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all sessions")
    return parser


def show(printed: RenderableType, markdown: str) -> None:
    """What was found: as tables on a terminal, and where there is none, as text to keep."""
    console = Console()
    console.print(printed if console.is_terminal else markdown, markup=False, soft_wrap=True)


def keep(chosen: argparse.Namespace, record: Mapping[str, object], markdown: str) -> None:
    """Writes what was found to the files that --json and --markdown name."""
    if chosen.json:
        chosen.json.write_text(json.dumps(record, indent=2) + "\n")
    if chosen.markdown:
        chosen.markdown.write_text(markdown)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("benchmarks.bench", __doc__, seconds=2.0)
    parser.add_argument("--layout", choices=LAYOUTS, default="portable", help="that the models are fused in")
    chosen = parser.parse_args(arguments)
    row_of = partial(measured, layout=chosen.layout, seconds=chosen.seconds, threads=chosen.threads)
    rows = each(chosen.only or models.names(), row_of, _summary)
    facts = machine() | {"layout": chosen.layout}
    settings = {"seconds": chosen.seconds, "threads": chosen.threads}
    markdown = to_markdown(rows, facts, settings)
    keep(chosen, to_json(rows, facts, settings), markdown)
    print(markdown)
    return 1 if any(row.error is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
