"""What the cost model predicts against what is measured, kernel by kernel: ``python -m benchmarks.cost``.

Every distinct kernel of the models is run by itself, as the plugin runs it: through onnxruntime, inputs
bound. In turn with it runs an op with the same inputs and outputs whose kernel does nothing; the difference
is the kernel's own time, which the model has to predict. onnxruntime's own operators are measured the same
way. A machine that others use as well is not always as fast: for each model the processor is calibrated and
all kernels are measured, in rounds, and of either the quietest reading counts. Nothing is fitted to kernels.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
from rich.console import Console, Group

import models
from apollo_fuse.acceptance import Region, needed_values
from apollo_fuse.calibration.stored import TIMES, calibrated
from apollo_fuse.capture import Captures, capture
from apollo_fuse.codegen import c, link
from apollo_fuse.codegen.table import alone, tables
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cost import cost_of
from apollo_fuse.fusion import Candidate
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import Kernel, Scope
from apollo_fuse.layout import Layout, cut, load_clean_at
from apollo_fuse.machine import Machine
from apollo_fuse.measure import interleaved
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.predicted import extents_of
from apollo_fuse.tolerance import Array
from apollo_fuse.unfused import Ran, unfused_seconds
from benchmarks.bench import keep, parser_of, show
from benchmarks.bench import machine as facts_of_machine
from benchmarks.cost_table import KernelRow, summary, table, to_json, to_markdown

_ROUNDS = 3
_READINGS = 2  # of a round at least, each of as many runs as the idle op makes in a reading
_EMPTY = "empty_"  # before the names of ops whose kernel does nothing


def rows_of(
    name: str, calibrate: Callable[[], Machine], threads: int, seconds: float, options: Options
) -> list[KernelRow]:
    """A row for each distinct kernel of a model, each measured for so many seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        clean = load_clean_at(models.path(name), Layout.PORTABLE, folder)
        start = cut(clean, Layout.PORTABLE)
        distinct = list({x.variant: x for x in reversed(plan(start.model, options).candidates)}.values())
        if not distinct:
            return []
        library = folder / "kernels.so"
        _link(distinct, library, options, threads)
        captures = capture(clean, needed_values(distinct), {**start.defaults, **models.feeds(name)}, threads)
        opsets = dict(start.model.opset_imports)
        opened = [_open(x, opsets, captures, library, threads) for x in distinct]
        running = [x for x in opened if isinstance(x, _Running)]
        machines: list[Machine] = []
        for _ in range(_ROUNDS):
            machines.append(calibrate())
            for one in running:
                one.measure(seconds / _ROUNDS)
        machine = quietest(machines)
        return [
            x.row(name, machine)
            if isinstance(x, _Running)
            else KernelRow(name, candidate.name, candidate.variant, error=x)
            for candidate, x in zip(distinct, opened, strict=True)
        ]


def quietest(machines: Sequence[Machine]) -> Machine:
    """Of a machine that was calibrated several times the figures that others disturbed the least."""
    times: dict[str, Any] = {name: min(getattr(machine, name) for machine in machines) for name in TIMES}
    times["wake"] = statistics.median(machine.wake for machine in machines)  # as most runs wait
    runtimes = [machine.runtime for machine in machines if machine.runtime is not None]
    levels = [
        replace(
            same[0],
            read=max(level.read for level in same),
            write=max(level.write for level in same),
            most=max((level.most for level in same if level.most is not None), default=None),
        )
        for same in zip(*(machine.levels for machine in machines), strict=True)
    ]
    return replace(
        machines[0],
        levels=tuple(levels),
        seconds={key: min(machine.seconds[key] for machine in machines) for key in machines[0].seconds},
        hidden=statistics.median(machine.hidden for machine in machines),
        runtime=replace(
            runtimes[0],
            node=min(runtime.node for runtime in runtimes),
            elements={
                name: min(runtime.elements.get(name, seconds) for runtime in runtimes)
                for name, seconds in runtimes[0].elements.items()
            },
            span=min(runtime.span for runtime in runtimes),
        ),
        **times,
    )


def _link(candidates: Sequence[Candidate], library: Path, options: Options, threads: int) -> None:
    """A library of the kernels, and for each of an op whose kernel does nothing."""
    toolchain = Toolchain.find(os.environ)
    sources = {x.name: x.source for x in candidates}
    for x in candidates:
        name = _EMPTY + x.name
        tensors = tuple(b for b in x.group.kernels[0].buffers if b.scope is Scope.GLOBAL)
        idle = Kernel("k0", tensors, (), ())
        sources[name] = c.emit(replace(x.group, kernels=(idle,)), name, "a kernel that does nothing")
    objects = link.compile_objects(list(sources.values()), toolchain, options.cache_dir, threads)
    nodes = [alone(prefix + x.name, len(x.group.inputs)) for x in candidates for prefix in ("", _EMPTY)]
    link.link_library(objects, tables(nodes, [toolchain.cpu.level]), library, toolchain, options.cache_dir)


@dataclass(slots=True)
class _Running:
    """A kernel, an op with the same tensors that does nothing, and onnxruntime's operators, as sessions.

    The times are seconds of a run, the least of all readings. called: of the idle op beside the kernel.
    beside: the same beside the operators.
    """

    candidate: Candidate
    sessions: tuple[ort.InferenceSession, ort.InferenceSession, ort.InferenceSession]
    feeds: Mapping[str, Array]
    operators: Sequence[Ran]
    extents: Mapping[Symbol, int]
    fused: float = math.inf
    called: float = math.inf
    unfused: float = math.inf
    beside: float = math.inf

    def measure(self, seconds: float) -> None:
        """A round."""
        kernel, idle, operators = self.sessions
        timed = partial(interleaved, feeds=self.feeds, seconds=seconds, minimum_runs=_READINGS)
        fused, called = timed([kernel, idle])
        unfused, beside = timed([operators, idle])
        self.fused, self.called = min(self.fused, fused.minimum), min(self.called, called.minimum)
        self.unfused, self.beside = min(self.unfused, unfused.minimum), min(self.beside, beside.minimum)

    def row(self, name: str, machine: Machine) -> KernelRow:
        cost = cost_of(self.candidate.group, self.extents, machine)
        return KernelRow(
            name,
            self.candidate.name,
            self.candidate.variant,
            measured=self.fused - self.called,
            predicted=cost.elapsed,
            bound_by=cost.bound_by,
            call=self.called,
            unfused=self.unfused - self.beside + cost.calls,
            predicted_unfused=unfused_seconds(self.operators, machine, machine.cores),
            calls=cost.calls,
        )


def _open(
    candidate: Candidate, opsets: dict[str, int], captures: Captures, library: Path, threads: int
) -> _Running | str:
    """The sessions of a kernel, or why there are none."""
    missing = [n for n in needed_values([candidate]) if n in captures.problems]
    if missing:
        return captures.problems[missing[0]]
    nodes = candidate.part.nodes
    try:
        kernel = Region(candidate, nodes, opsets, library, threads, profiled=True)
        empty = Region(replace(candidate, name=_EMPTY + candidate.name), nodes, opsets, library, threads)
    except Exception as error:  # onnxruntime raises classes of its own for each status
        return str(error).splitlines()[0]
    feeds = kernel.feeds(captures.arrays)
    kernel.unfused.run(None, feeds)
    operators = kernel.operators()
    sessions = kernel.fused, empty.fused, kernel.unfused
    return _Running(candidate, sessions, feeds, operators, extents_of(candidate, captures.arrays))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parser_of("benchmarks.cost", __doc__, seconds=0.1).parse_args(arguments)
    options = Options()
    toolchain = Toolchain.find(os.environ)
    rows: list[KernelRow] = []
    errors = Console(stderr=True)
    calibrate = partial(calibrated, toolchain, options.cache_dir, chosen.threads)
    anew = partial(calibrate, anew=True)
    for name in chosen.only or models.names():
        try:
            rows += rows_of(name, anew, chosen.threads, chosen.seconds, options)
        except Exception as error:  # a model that fails is a row of the table, and the others go on
            rows.append(KernelRow(name, "", "", error=f"{type(error).__name__}: {error}"))
        errors.print(f"{name}: {sum(row.model == name for row in rows)} kernels", highlight=False)
    facts = facts_of_machine() | {"predictions": calibrate().source}
    settings = {"seconds": chosen.seconds, "threads": chosen.threads}
    markdown = to_markdown(rows, facts, settings)
    keep(chosen, to_json(rows, facts, settings), markdown)
    show(Group(table(rows), summary(rows)), markdown)
    return 1 if any(row.error is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
