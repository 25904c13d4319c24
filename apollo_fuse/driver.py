"""The ladder from a model to a fused model: partition, fuse, compile, judge, swap, verify, write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_files
from apollo_fuse.acceptance import Judgement, in_context, judge, needed_values
from apollo_fuse.atomic import require_writable
from apollo_fuse.calibration.stored import calibrated
from apollo_fuse.capture import capture
from apollo_fuse.codegen import link
from apollo_fuse.codegen.launches import GpuCode
from apollo_fuse.codegen.toolchain import Toolchain, toolchains_for
from apollo_fuse.codegen.triton.compile import require_triton
from apollo_fuse.cpu import Cpu, default_threads
from apollo_fuse.descriptions import generic
from apollo_fuse.errors import NoFeedsError, VerificationError
from apollo_fuse.evidence import slower, spilled
from apollo_fuse.feeds import inputs_of, read_inputs, runnable_feeds
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu_kernels import GpuKernels, on_gpus
from apollo_fuse.gpu_trials import spilling
from apollo_fuse.graph import Refused, Value
from apollo_fuse.joining import Joined, join
from apollo_fuse.layout import Cut, Layout, cut, load_clean_at, made_for_text
from apollo_fuse.machine import Machine
from apollo_fuse.options import Options
from apollo_fuse.partition import Plan, Planner
from apollo_fuse.progress import Progress, SilentProgress
from apollo_fuse.report import (
    CompileSeconds,
    LatencyReport,
    LayoutReport,
    Report,
    VerificationReport,
)
from apollo_fuse.settle import Settle, Settled
from apollo_fuse.settle_layout import Attempt, faster_layout, layouts
from apollo_fuse.stitching import Stitch, Swap, members
from apollo_fuse.summary import Summary, solve, summarise
from apollo_fuse.tolerance import Array
from apollo_fuse.trial import Trial, open_session
from apollo_fuse.verify import NOTHING


def fuse(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """As `fusing.fuse`, which goes through here where it knows no result of an earlier run."""
    path = Path(model)
    target = path.with_suffix(".fused.onnx") if output is None else Path(output)
    return _Compilation(path, target, options or Options(), progress or SilentProgress()).run()


@dataclass(slots=True)
class _Compilation:
    """One run of the ladder; each method is a rung."""

    path: Path
    output: Path
    options: Options
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    given: dict[str, Array] = field(default_factory=dict)  # inputs that the user chose
    shapes: list[tuple[Value, tuple[int, ...]]] = field(default_factory=list)  # in the measured run
    toolchains: dict[Cpu, Toolchain] = field(default_factory=dict)
    machine: Machine | None = None  # as calibrated

    @property
    def threads(self) -> int:
        return self.options.threads or default_threads()

    @property
    def tried(self) -> Cpu:
        """The processor that kernels are verified and measured for."""
        return self.options.cpu.tried_on(Cpu.native())

    def run(self) -> Report:
        start = perf_counter()
        if self.options.gpus:
            require_triton()
        with self._timed("load"):
            require_writable(self.output)
            onnx_files.check_output(self.path, self.output)
        with tempfile.TemporaryDirectory(prefix="apollo-fuse-") as folder:
            plans = [self._partition(layout, Path(folder)) for layout in layouts(self.options)]
            taken, tried = self._decide(plans, Path(folder))
            on_gpus = self._on_gpus(taken)
            with self._timed("write"):
                library = self._write(taken, on_gpus)
                summary = self._summary(taken, on_gpus)
                held = self._held(taken, on_gpus)
        self.seconds["total"] = perf_counter() - start
        return self._report(summary, taken, tried, library, held)

    # -- rungs ------------------------------------------------------------------------------

    def _partition(self, layout: Layout, folder: Path) -> _Planned:
        self.progress.stage("partition", None)
        with self._timed("load"):
            clean = load_clean_at(self.path, layout, folder)
        with self._timed("shapes"):
            start = cut(clean, layout)
        with self._timed("partition"):
            planner = Planner(start.model, self.options, layout)
            chosen = planner.plan()
            chosen = replace(chosen, unknown=(*start.refused, *chosen.unknown))
        self._dump(chosen.dumps, layout)
        return _Planned(layout, start, planner, chosen)

    def _decide(self, plans: Sequence[_Planned], folder: Path) -> tuple[Attempt, tuple[LayoutReport, ...]]:
        """The best of the plans, found by running the model."""
        with self._timed("inputs"):
            original = open_session(self.path, self.threads)
            feeds = self._feeds(original)
        attempts = [self._attempt(planned, original, feeds, folder) for planned in plans]
        if feeds is None or len(attempts) == 1:
            return attempts[0], ()
        self.progress.stage("measure", None)
        with self._timed("measure"):
            return faster_layout(attempts, original, feeds)

    def _attempt(
        self,
        planned: _Planned,
        original: ort.InferenceSession,
        feeds: dict[str, Array] | None,
        folder: Path,
    ) -> Attempt:
        """The kernels of one plan, compiled and judged; none where no inputs verify them."""
        layout, start, chosen = planned.layout, planned.start, planned.chosen
        if feeds is None or not (chosen.candidates or start.rewritten):
            nothing = Settled((), LatencyReport(threads=self.threads), NOTHING, {})
            return Attempt(layout, start.model, replace(chosen, candidates=()), None, nothing)
        place = folder / layout
        place.mkdir()
        judged = self._judged(planned, {**start.defaults, **feeds}, place)
        joined = self._join(start.model, judged, {**start.defaults, **feeds})
        shared = {f"{x.name}.stitch.txt": str(x) for x in joined.stitches}
        self._dump({**judged.chosen.dumps, **shared}, layout)
        settled = self._settle(judged, joined, original, feeds, start.rewritten)
        return Attempt(layout, start.model, judged.chosen, judged.trial, settled, joined.stitches)

    def _join(self, model: ir.Model, judged: _Judged, feeds: Mapping[str, Array]) -> Joined:
        """What becomes of the plan's kernels where they share launches."""
        if not self.options.stitches_parallelism:
            return Joined((), {})
        with self._timed("judge"):
            machine = self._machine()
            joined = join(model, judged.chosen, judged.trial, feeds, judged.judgements, self.options, machine)
        for name, judgement in joined.judgements.items():
            if not judgement.verdict.passed:
                self._complain(f"kernel {name.partition('(')[0]} {judgement.reason}")
        return joined

    def _judged(self, planned: _Planned, feeds: Mapping[str, Array], folder: Path) -> _Judged:
        """The plan once no kernel of it is sent back by what compiling or measuring shows."""
        chosen, planner = planned.chosen, planned.planner
        judgements: dict[str, Judgement] = {}
        while True:
            trial = self._compile(chosen, planned.start.clean, folder)
            judgements |= self._judge(planned.start.model, chosen, trial, feeds, judgements)
            refused = spilled(chosen.candidates, trial.build, judgements)
            if not refused:
                refused = self._spilled_on_gpus(chosen, planner, judgements)
            if not refused:
                slow = slower(chosen.candidates, judgements)
                refused = {p: r for p, r in slow.items() if planner.splits(chosen.candidates[p], r)}
            if not refused:
                return _Judged(chosen, trial, judgements)
            with self._timed("partition"):
                chosen = planner.regroup(chosen, refused)

    def _spilled_on_gpus(
        self, chosen: Plan, planner: Planner, judgements: Mapping[str, Judgement]
    ) -> dict[int, Refused]:
        """The places of kernels that would be kept, and have too many values alive at a time for some GPU."""
        if not self.options.gpus:
            return {}
        self.progress.stage("compile for GPUs", None)
        places = [k for k, x in enumerate(chosen.candidates) if judgements[x.variant].accepted]
        with self._timed("gpu"):
            found = spilling([chosen.candidates[k] for k in places], solve(self.shapes), self.options)
        refused = {places[k]: problem for k, problem in found.items()}
        return {k: r for k, r in refused.items() if planner.splits(chosen.candidates[k], r)}

    def _on_gpus(self, taken: Attempt) -> GpuKernels:
        """What the kernels are on the GPUs of the target."""
        if not self.options.gpus:
            return GpuKernels({}, GpuCode())
        self.progress.stage("compile for GPUs", None)
        with self._timed("gpu"):
            sizes = solve(self.shapes)
            stitches = [x for x in taken.settled.kept if isinstance(x, Stitch)]
            found = on_gpus(taken.chosen.kernels, stitches, sizes, self.options, self.warnings.append)
        self._dump(found.dumps, taken.layout)
        if held := self._held(taken, found):
            self.warnings.append(
                f"no GPU has run the kernels for {', '.join(held)}: they were verified as code for "
                f"{self.tried} alone; try the result on such a GPU"
            )
        return found

    def _held(self, taken: Attempt, found: GpuKernels) -> tuple[str, ...]:
        """The GPUs that the library holds kernels for."""
        kept = (kernel.name for x in taken.settled.kept for kernel in members(x))
        has_some = any(name in found.code.forms for name in kept)
        return tuple(str(gpu) for gpu in self.options.gpus if has_some)

    def _write(self, taken: Attempt, on_gpus: GpuKernels) -> Path | None:
        """The written model's library, or None where it has none."""
        kept, trial = taken.settled.kept, taken.trial
        if kept and trial is not None:
            return trial.write(kept, self.output, self._builds(kept, trial.build), on_gpus.code)
        if taken.settled.alone and trial is not None:
            trial.write_alone(self.output)
        else:
            onnx_files.write_unchanged(self.path, self.output)
        link.remove_library(self.output.with_suffix(".so"))
        return None

    def _feeds(self, original: ort.InferenceSession) -> dict[str, Array] | None:
        """Inputs to verify and measure with, or None where there are none and nothing can be verified."""
        shapes = {shape.name: shape.dims for shape in self.options.shapes}
        try:
            if self.options.inputs is not None:
                self.given = read_inputs(self.options.inputs, inputs_of(original))
            return runnable_feeds(original, shapes, self.options.seed, self.given)
        except NoFeedsError as error:
            self.warnings.append(
                f"{error}, so nothing could be verified, and nothing was fused; "
                "give other extents with --shape, or arrays with --inputs"
            )
            return None

    def _compile(self, chosen: Plan, clean: ir.Model, folder: Path) -> Trial:
        self._toolchains()
        build = self._build(chosen.kernels, self.tried)
        return Trial(clean, build, self.options.cache_dir, self.threads, folder)

    def _toolchains(self) -> Mapping[Cpu, Toolchain]:
        """The compilers for all targets, looked up once and before anything is compiled."""
        if not self.toolchains:
            self.toolchains = toolchains_for(self.options)
        return self.toolchains

    def _builds(self, kept: Sequence[Swap], tried: link.Build) -> list[link.Build]:
        """The kernels that stay, for each processor of the library."""
        machine = Cpu.native()
        if unable := [str(cpu) for cpu in self.options.cpu.cpus if not machine.runs(cpu)]:
            done = "verified and measured" if self.options.measure else "verified"
            self.warnings.append(
                f"this machine cannot run code for {', '.join(unable)}: the kernels were {done} as code for "
                f"{self.tried} alone; try the result on such a machine"
            )
        return [
            tried if cpu == self.tried else self._build([k for x in kept for k in members(x)], cpu)
            for cpu in self.options.cpu.cpus
        ]

    def _build(self, candidates: Sequence[Candidate], cpu: Cpu) -> link.Build:
        sources = {x.name: x.source for x in candidates}
        toolchain = self.toolchains[cpu]
        self.progress.stage(f"compile {cpu}", len(sources))
        with self._timed("cc"):
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                self.progress.advance(count - done)
                done = count

            cache = self.options.cache_dir
            files = link.compile_objects(list(sources.values()), toolchain, cache, self.threads, advance)
        return link.Build(toolchain, dict(zip(sources, files, strict=True)))

    def _judge(
        self,
        model: ir.Model,
        chosen: Plan,
        trial: Trial,
        feeds: Mapping[str, Array],
        known: Mapping[str, Judgement],
    ) -> dict[str, Judgement]:
        """One judgement for each variant of a kernel; its first use in the model stands for all of them."""
        distinct = {x.variant: x for x in reversed(chosen.kernels) if x.variant not in known}
        not_alone = {x.candidate.variant: x.refused.reason for x in chosen.companions}
        if not distinct:
            return {}
        stage = "measure" if self.options.measure else "verify"
        self.progress.stage(stage, len(distinct))
        library = trial.folder / "trial.so"
        with self._timed("cc"):
            trial.library(list(distinct.values()), library)
        found: dict[str, Judgement] = {}
        with self._timed("judge"):
            captures = capture(trial.clean, needed_values(distinct.values()), feeds, self.threads)
            self._note_shapes(chosen, captures.arrays)
            for problem in dict.fromkeys(captures.problems.values()):
                self.warnings.append(f"{problem}; kernels that read its values are left out")
            opsets, machine = dict(model.opset_imports), self._machine()
            for variant, candidate in distinct.items():
                judgement = judge(
                    candidate,
                    opsets,
                    captures,
                    library,
                    self.options,
                    self.threads,
                    machine,
                    not_alone.get(variant, ""),
                )
                found[variant] = judgement
                if not judgement.verdict.passed:
                    self._complain(f"kernel {candidate.name} {judgement.reason}")
                self.progress.advance()
        return found

    def _settle(
        self,
        judged: _Judged,
        joined: Joined,
        original: ort.InferenceSession,
        feeds: Mapping[str, Array],
        rewritten: bool,
    ) -> Settled:
        judgements = {**judged.judgements, **joined.judgements}
        seed = self.options.seed
        settle = Settle(judged.trial, original, feeds, self.given, seed, self._complain, judgements)
        together = {kernel.part.nodes[0] for x in joined.accepted for kernel in x.members}
        apart = (x for x in judged.chosen.candidates if x.part.nodes[0] not in together)
        accepted: list[Swap] = [*joined.accepted]
        accepted += (x for x in apart if judgements[x.variant].accepted)
        latency = LatencyReport(threads=self.threads)
        self.progress.stage("verify", None)
        with self._timed("verify"):
            kept, verdict = settle.verified(accepted)
        if verdict.note:
            self.warnings.append(f"of the fused model {verdict.note}")
        if kept and self.options.measure:
            self.progress.stage("measure", None)
            with self._timed("measure"):
                kept, latency = settle.fastest(kept)
        if not kept and self.options.measure and rewritten:
            with self._timed("measure"):
                alone = settle.alone()
            if alone is not None:
                return Settled((), *alone, settle.judgements, alone=True)
        return Settled(kept, latency, verdict, settle.judgements)

    def _machine(self) -> Machine:
        """What kernels are predicted for.

        Where nothing is measured, predictions decide, so they are for a description of the best of the
        targets, which is the same on every machine.
        """
        if self.machine is None and self.options.measure:
            toolchain, cache = self._toolchains()[self.tried], self.options.cache_dir
            self.machine = calibrated(toolchain, cache, self.threads, anew=self.options.remeasure)
        return self.machine or generic(self.options.cpu.cpus[-1])

    # -- parts ------------------------------------------------------------------------------

    def _note_shapes(self, chosen: Plan, arrays: Mapping[str, Array]) -> None:
        for candidate in chosen.kernels:
            for value, own in zip(candidate.micro_graph.inputs, candidate.part.inputs, strict=True):
                if own.name is not None and own.name in arrays:
                    self.shapes.append((value, arrays[own.name].shape))

    def _dump(self, texts: Mapping[str, str], layout: Layout) -> None:
        if self.options.dump is not None:
            folder = self.options.dump / layout if self.options.layout == "auto" else self.options.dump
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in texts.items():
                (folder / name).write_text(text)

    def _complain(self, problem: str) -> None:
        if self.options.strict:
            raise VerificationError(
                f"{self.path}: {problem}; leave out --strict to go on without this kernel"
            )
        self.warnings.append(f"{problem}; it is left out")

    def _timed(self, stage: str) -> _Stopwatch:
        return _Stopwatch(self.seconds, stage)

    def _summary(self, taken: Attempt, on_gpus: GpuKernels) -> Summary:
        chosen, settled, sizes = taken.chosen, taken.settled, solve(self.shapes)
        return summarise(
            self.path,
            self.output,
            taken.model,
            chosen,
            taken.stitches,
            settled.judgements,
            settled.kept,
            sizes,
            on_gpus.reports,
        )

    def _report(
        self,
        summary: Summary,
        taken: Attempt,
        tried: tuple[LayoutReport, ...],
        library: Path | None,
        held: tuple[str, ...],
    ) -> Report:
        chosen, settled = taken.chosen, taken.settled
        verdict = settled.verdict
        bound = taken.layout is Layout.ORT and bool(settled.kept or settled.alone)
        return Report(
            model=self.path,
            output=self.output,
            library=library,
            target=",".join(("cpu", *held)),
            cpu=summary.cpu,
            cpu_targets=tuple(map(str, self.options.cpu.cpus)) if library is not None else (),
            verified_cpu=str(self.tried),
            versions=summary.versions,
            nodes_before=summary.nodes_before,
            nodes_after=summary.nodes_after,
            fused_nodes=len(settled.kept),
            distinct_kernels=len({kernel.name for x in settled.kept for kernel in members(x)}),
            kernels=summary.kernels,
            refused=summary.refused,
            feedback_rounds=summary.rounds,
            verification=VerificationReport(
                verdict.passed, verdict.cases, verdict.max_abs_error, verdict.max_rel_error
            ),
            latency=settled.latency,
            layout=taken.layout,
            made_for=made_for_text(taken.model) if bound else None,
            without_kernels=settled.alone,
            layouts=tried,
            beside_convolutions=sum(in_context(x) for x in chosen.candidates),
            compile_seconds=self._compile_seconds(chosen),
            warnings=tuple(self.warnings),
        )

    def _compile_seconds(self, chosen: Plan) -> CompileSeconds:
        within = {"isl": chosen.isl_seconds, "codegen": chosen.codegen_seconds}
        partition = self.seconds["partition"] - sum(within.values())
        return CompileSeconds(**{**self.seconds, **within, "partition": partition})


@dataclass(frozen=True, slots=True)
class _Planned:
    """A model in one layout, with the kernels that it could have."""

    layout: Layout
    start: Cut
    planner: Planner
    chosen: Plan


@dataclass(frozen=True, slots=True)
class _Judged:
    """The plan that the feedback from compiled and measured kernels led to."""

    chosen: Plan
    trial: Trial
    judgements: dict[str, Judgement]


@dataclass(slots=True)
class _Stopwatch:
    seconds: dict[str, float]
    stage: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + perf_counter() - self.start
