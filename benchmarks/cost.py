"""What the cost model predicts against what is measured, kernel by kernel: ``python -m benchmarks.cost``.

Every distinct kernel of the models is run by itself, as the plugin runs it: through onnxruntime, inputs
bound, the least time. In turn with it runs an op with the same inputs and outputs and no kernel behind
them; the difference is the kernel's own time, which the model has to predict. onnxruntime's own operators
are measured the same way. The machine is calibrated before each model, since one that others use as well is
not always as fast; nothing is fitted to kernels.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import models
from apollo_fuse.acceptance import Region, needed_values
from apollo_fuse.calibration.stored import calibrated
from apollo_fuse.capture import Captures, capture
from apollo_fuse.codegen import c, link
from apollo_fuse.codegen.table import alone, tables
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cost import cost_of
from apollo_fuse.fusion import Candidate
from apollo_fuse.layout import Layout, cut, load_clean_at
from apollo_fuse.machine import Machine
from apollo_fuse.measure import interleaved
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.predicted import extents_of
from apollo_fuse.unfused import unfused_seconds
from benchmarks.bench import keep, parser_of
from benchmarks.bench import machine as facts_of_machine
from benchmarks.cost_table import KernelRow, summary, table, to_json, to_markdown

_EMPTY = "empty_"  # before the names of ops without a kernel


def rows_of(name: str, machine: Machine, seconds: float, options: Options) -> Iterator[KernelRow]:
    """A row for each distinct kernel of a model."""
    threads = machine.cores
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        clean = load_clean_at(models.path(name), Layout.PORTABLE, folder)
        start = cut(clean, Layout.PORTABLE)
        chosen = plan(start.model, options)
        distinct = list({x.variant: x for x in reversed(chosen.candidates)}.values())
        if not distinct:
            return
        library = folder / "kernels.so"
        _link(distinct, library, options, threads)
        captures = capture(clean, needed_values(distinct), {**start.defaults, **models.feeds(name)}, threads)
        opsets = dict(start.model.opset_imports)
        for candidate in distinct:
            yield _row(name, candidate, opsets, captures, library, machine, seconds)


def _link(candidates: Sequence[Candidate], library: Path, options: Options, threads: int) -> None:
    """A library of the kernels, and of an op without one for each."""
    toolchain = Toolchain.find(os.environ)
    sources = {x.name: x.source for x in candidates}
    for x in candidates:
        name = _EMPTY + x.name
        sources[name] = c.emit(replace(x.group, kernels=()), name, "no kernel")
    objects = link.compile_objects(list(sources.values()), toolchain, options.cache_dir, threads)
    nodes = [alone(prefix + x.name, len(x.group.inputs)) for x in candidates for prefix in ("", _EMPTY)]
    link.link_library(objects, tables(nodes, [toolchain.cpu.level]), library, toolchain, options.cache_dir)


def _row(
    name: str,
    candidate: Candidate,
    opsets: dict[str, int],
    captures: Captures,
    library: Path,
    machine: Machine,
    seconds: float,
) -> KernelRow:
    row = KernelRow(name, candidate.name, candidate.variant)
    missing = [n for n in needed_values([candidate]) if n in captures.problems]
    if missing:
        return replace(row, error=captures.problems[missing[0]])
    threads, nodes = machine.cores, candidate.part.nodes
    try:
        kernel = Region(candidate, nodes, opsets, library, threads, profiled=True)
        empty = Region(replace(candidate, name=_EMPTY + candidate.name), nodes, opsets, library, threads)
    except Exception as error:  # onnxruntime raises classes of its own for each status
        return replace(row, error=str(error).splitlines()[0])
    feeds = kernel.feeds(captures.arrays)
    kernel.unfused.run(None, feeds)
    operators = kernel.operators()
    fused, call = interleaved([kernel.fused, empty.fused], feeds, seconds=seconds)
    unfused, again = interleaved([kernel.unfused, empty.fused], feeds, seconds=seconds)
    cost = cost_of(candidate.group, extents_of(candidate, captures.arrays), machine)
    return replace(
        row,
        measured=fused.minimum - call.minimum,
        predicted=cost.elapsed,
        bound_by=cost.bound_by,
        call=call.minimum,
        unfused=unfused.minimum - again.minimum + cost.calls,
        predicted_unfused=unfused_seconds(operators, machine, threads),
        calls=cost.calls,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser_of("benchmarks.cost", __doc__, seconds=0.1).parse_args(arguments)
    options = Options()
    toolchain = Toolchain.find(os.environ)
    rows: list[KernelRow] = []
    errors = Console(stderr=True)
    for name in chosen.only or models.names():
        machine = calibrated(toolchain, options.cache_dir, chosen.threads, anew=True)
        try:
            rows += rows_of(name, machine, chosen.seconds, options)
        except Exception as error:  # a model that fails is a row of the table, and the others go on
            rows.append(KernelRow(name, "", "", error=f"{type(error).__name__}: {error}"))
        errors.print(f"{name}: {sum(row.model == name for row in rows)} kernels", highlight=False)
    facts = facts_of_machine() | {"predictions": machine.source}
    settings = {"seconds": chosen.seconds, "threads": chosen.threads}
    keep(chosen, to_json(rows, facts, settings), to_markdown(rows, facts, settings))
    console = Console()
    console.print(table(rows))
    console.print(summary(rows), highlight=False)
    return 1 if any(row.error is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
