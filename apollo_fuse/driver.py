"""The ladder from a model to a fused model: partition, fuse, compile, judge, swap, verify, write."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_io
from apollo_fuse.acceptance import Judgement, judge, needed_values
from apollo_fuse.atomic import replacing, require_writable
from apollo_fuse.codegen import c, link
from apollo_fuse.errors import NoFeedsError, VerificationError
from apollo_fuse.feeds import runnable_feeds
from apollo_fuse.fusion import Candidate
from apollo_fuse.graph import Value
from apollo_fuse.measure import Timing, interleaved, session_options
from apollo_fuse.options import Options
from apollo_fuse.partition import Plan, plan
from apollo_fuse.progress import Progress, SilentProgress
from apollo_fuse.region import Interface, swap
from apollo_fuse.report import (
    CompileSeconds,
    LatencyReport,
    Report,
    VerificationReport,
)
from apollo_fuse.summary import Summary, solve, summarise
from apollo_fuse.symbolic import infer_shapes
from apollo_fuse.tolerance import Array
from apollo_fuse.verify import NOTHING, Verdict, verify

CLEAR_GAIN = 1.3  # from this speed-up on a kernel is a clear winner
MODEL_RUNS = 300  # at most, of each model in one measurement
WHOLE_MODEL_WINS = 0.99  # share of the unfused time that a fused model has to stay below


def fuse(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Report:
    """Fuses the model at `model`, and writes the result to `output` and its library beside that.

    `output` defaults to the model's path with the suffix ``.fused.onnx``. Where nothing wins, the model
    is written unchanged and the report's `library` is None. Raises an ApolloFuseError for whatever is
    wrong with the model, the options, the compiler or the output; nothing is left half-written.
    """
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
    shapes: list[tuple[Value, tuple[int, ...]]] = field(
        default_factory=list
    )  # of tensors, in the measured run

    @property
    def threads(self) -> int:
        return self.options.threads or len(os.sched_getaffinity(0))

    def run(self) -> Report:
        start = perf_counter()
        onnx_io.check_readable(self.path)
        require_writable(self.output)
        self.progress.stage("partition", None)
        with self._timed("partition"):
            model = onnx_io.load_clean(self.path)
            defaults = onnx_io.take_defaults(model)
            infer_shapes(model)
            chosen = plan(model, self.options)
        self._dump(chosen)
        feeds = self._feeds()
        if feeds is None:
            chosen = replace(chosen, candidates=())
            feeds = {}
        with tempfile.TemporaryDirectory(prefix="apollo-fuse-") as folder:
            trial = Path(folder)
            toolchain, objects = self._compile(chosen)
            judgements = self._judge(model, chosen, toolchain, objects, defaults | feeds, trial)
            accepted = [x for x in chosen.candidates if judgements[x.variant].accepted]
            fused, latency, verdict = self._settle(accepted, toolchain, objects, feeds, trial, judgements)
            library = self._write(fused, toolchain, objects)
        self.seconds["total"] = perf_counter() - start
        return self._report(model, chosen, judgements, fused, latency, verdict, library)

    # -- rungs ------------------------------------------------------------------------------

    def _compile(self, chosen: Plan) -> tuple[link.Toolchain | None, dict[str, Path]]:
        sources = {x.name: x.source for x in chosen.candidates}
        if not sources:
            return None, {}
        self.progress.stage("compile", len(sources))
        with self._timed("cc"):
            toolchain = link.Toolchain.find({**os.environ, "CC": self.options.compiler or ""})
            done = 0

            def advance(count: int) -> None:
                nonlocal done
                self.progress.advance(count - done)
                done = count

            files = link.compile_objects(
                list(sources.values()), toolchain, self.options.cache_dir, self.threads, advance
            )
        return toolchain, dict(zip(sources, files, strict=True))

    def _feeds(self) -> dict[str, Array] | None:
        """Inputs to verify and measure with, or None where there are none and nothing can be verified."""
        shapes = {shape.name: shape.dims for shape in self.options.shapes}
        try:
            return runnable_feeds(self._original(), shapes, self.options.seed)
        except NoFeedsError as error:
            self.warnings.append(f"{error}; nothing could be verified, so nothing was fused")
            return None

    def _judge(
        self,
        model: ir.Model,
        chosen: Plan,
        toolchain: link.Toolchain | None,
        objects: Mapping[str, Path],
        feeds: Mapping[str, Array],
        folder: Path,
    ) -> dict[str, Judgement]:
        """One judgement for each variant of a kernel; its first use in the model stands for all of them."""
        distinct = {x.variant: x for x in reversed(chosen.candidates)}
        if toolchain is None:
            return {}
        if not self.options.measure:
            return {variant: Judgement(NOTHING, NOTHING, None, None, "") for variant in distinct}
        self.progress.stage("measure", len(distinct))
        library = folder / "trial.so"
        self._link(sorted({x.name for x in distinct.values()}), toolchain, objects, library)
        found: dict[str, Judgement] = {}
        with self._timed("measure"):
            arrays = _capture(model, needed_values(list(distinct.values())), feeds, self.threads)
            self._note_shapes(chosen, arrays)
            opsets = dict(model.opset_imports)
            for variant, candidate in distinct.items():
                judgement = judge(candidate, opsets, arrays, library, self.options, self.threads)
                found[variant] = judgement
                if not judgement.verdict.passed:
                    self._complain(f"kernel {candidate.name} {judgement.reason}")
                elif not judgement.edges.passed and judgement.accepted:
                    problem = judgement.edges.problem
                    self.warnings.append(
                        f"kernel {candidate.name}, fed with NaN, infinities and denormals: {problem}"
                    )
                self.progress.advance()
        return found

    def _note_shapes(self, chosen: Plan, arrays: Mapping[str, Array]) -> None:
        for candidate in chosen.candidates:
            for value, own in zip(candidate.micro_graph.inputs, candidate.part.inputs, strict=True):
                if own.name is not None and own.name in arrays:
                    self.shapes.append((value, arrays[own.name].shape))

    def _settle(
        self,
        accepted: list[Candidate],
        toolchain: link.Toolchain | None,
        objects: Mapping[str, Path],
        feeds: Mapping[str, Array],
        folder: Path,
        judgements: dict[str, Judgement],
    ) -> tuple[list[Candidate], LatencyReport, Verdict]:
        """Verifies and measures the whole model, and drops what does not hold there."""
        while accepted and toolchain is not None:
            self.progress.stage("verify", None)
            with self._timed("verify"):
                verdict = self._verify(accepted, toolchain, objects, feeds, folder)
                if not verdict.passed:
                    wrong = self._bisect(accepted, toolchain, objects, feeds, folder)
                    self._complain(f"kernel {wrong} does not verify in the model: {verdict.problem}")
                    for variant in {x.variant for x in accepted if x.name == wrong}:
                        judgements[variant] = _dropped(judgements[variant], "does not verify in the model")
                    accepted = [x for x in accepted if x.name != wrong]
                    continue
            if not self.options.measure:
                return accepted, LatencyReport(threads=self.threads), verdict
            return *self._fastest(accepted, toolchain, objects, feeds, folder, judgements), verdict
        return [], LatencyReport(threads=self.threads), NOTHING

    def _fastest(
        self,
        accepted: list[Candidate],
        toolchain: link.Toolchain,
        objects: Mapping[str, Path],
        feeds: Mapping[str, Array],
        folder: Path,
        judgements: dict[str, Judgement],
    ) -> tuple[list[Candidate], LatencyReport]:
        """Measures the model with all kernels and with the clearest winners alone, and keeps the best.

        What is not a clear win is measured once more, for longer, before it is given up.
        """
        clear = [x for x in accepted if _gain(judgements[x.variant]) >= CLEAR_GAIN]
        choices = [accepted] + ([clear] if clear and len(clear) < len(accepted) else [])
        with self._timed("measure"):
            sessions = [self._original()]
            sessions += [self._fused(x, toolchain, objects, folder) for x in choices]
            for seconds in (1.0, 3.0):
                unfused, *fused = interleaved(
                    sessions, feeds, seconds=seconds * len(sessions), maximum_runs=MODEL_RUNS
                )
                best = min(range(len(fused)), key=lambda n: fused[n].median)
                if _wins(fused[best], unfused):
                    break
        kept = choices[best]
        if not _wins(fused[best], unfused):
            for variant in {x.variant for x in accepted}:
                judgements[variant] = _dropped(judgements[variant], "the whole model does not get faster")
            return [], _latency(unfused, unfused, self.threads)
        for variant in {x.variant for x in accepted} - {x.variant for x in kept}:
            judgements[variant] = _dropped(judgements[variant], "the model is faster without it")
        return kept, _latency(unfused, fused[best], self.threads)

    def _write(
        self, fused: Sequence[Candidate], toolchain: link.Toolchain | None, objects: Mapping[str, Path]
    ) -> Path | None:
        library = self.output.with_suffix(".so")
        if not fused or toolchain is None:
            onnx_io.write_unchanged(self.path, self.output)
            link.remove_library(library)
            return None
        self._link(sorted({x.name for x in fused}), toolchain, objects, library)
        with replacing(self.output) as temporary:
            onnx_io.write(self._swapped(fused), temporary)
        return library

    # -- parts ------------------------------------------------------------------------------

    def _swapped(self, chosen: Sequence[Candidate]) -> ir.Model:
        """A fresh copy of the clean model with these candidates swapped in."""
        model = onnx_io.load_clean(self.path)
        positions = {position: node for position, node in enumerate(model.graph)}
        for candidate in chosen:
            swap(model, _relocate(candidate, positions), candidate.name)
        model.graph.sort()
        return model

    def _verify(
        self,
        chosen: Sequence[Candidate],
        toolchain: link.Toolchain,
        objects: Mapping[str, Path],
        feeds: Mapping[str, Array],
        folder: Path,
    ) -> Verdict:
        fused = self._fused(chosen, toolchain, objects, folder)
        original = self._original()
        shapes = {name: array.shape for name, array in feeds.items()}
        cases = [feeds]
        with contextlib.suppress(NoFeedsError):  # the first may have been a lucky draw
            cases.append(runnable_feeds(original, shapes, self.options.seed + 1))
        return verify(original, fused, cases)

    def _bisect(
        self,
        suspects: Sequence[Candidate],
        toolchain: link.Toolchain,
        objects: Mapping[str, Path],
        feeds: Mapping[str, Array],
        folder: Path,
    ) -> str:
        """The name of a kernel that makes the model wrong."""
        names = sorted({x.name for x in suspects})
        while len(names) > 1:
            half = set(names[: len(names) // 2])
            chosen = [x for x in suspects if x.name in half]
            wrong = not self._verify(chosen, toolchain, objects, feeds, folder).passed
            names = [n for n in names if (n in half) == wrong]
        return names[0]

    def _original(self) -> ort.InferenceSession:
        return ort.InferenceSession(
            str(self.path), session_options(self.threads), providers=["CPUExecutionProvider"]
        )

    def _fused(
        self,
        chosen: Sequence[Candidate],
        toolchain: link.Toolchain,
        objects: Mapping[str, Path],
        folder: Path,
    ) -> ort.InferenceSession:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            library, path = Path(place, "fused.so"), Path(place, "fused.onnx")
            self._link(sorted({x.name for x in chosen}), toolchain, objects, library)
            onnx_io.write(self._swapped(chosen), path)
            settings = session_options(self.threads)
            settings.register_custom_ops_library(str(library))
            return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def _link(
        self, names: Sequence[str], toolchain: link.Toolchain, objects: Mapping[str, Path], library: Path
    ) -> None:
        table = c.table(list(names), toolchain.level)
        link.link_library([objects[n] for n in names], table, library, toolchain, self.options.cache_dir)

    def _dump(self, chosen: Plan) -> None:
        if self.options.dump is not None:
            self.options.dump.mkdir(parents=True, exist_ok=True)
            for name, text in chosen.dumps.items():
                (self.options.dump / name).write_text(text)

    def _complain(self, problem: str) -> None:
        if self.options.strict:
            raise VerificationError(
                f"{self.path}: {problem}; leave out --strict to go on without this kernel"
            )
        self.warnings.append(f"{problem}; it is left out")

    def _timed(self, stage: str) -> _Stopwatch:
        return _Stopwatch(self.seconds, stage)

    def _report(
        self,
        model: ir.Model,
        chosen: Plan,
        judgements: Mapping[str, Judgement],
        fused: Sequence[Candidate],
        latency: LatencyReport,
        verdict: Verdict,
        library: Path | None,
    ) -> Report:
        summary: Summary = summarise(
            self.path, self.output, model, chosen, judgements, fused, solve(self.shapes)
        )
        return Report(
            model=self.path,
            output=self.output,
            library=library,
            target="cpu",
            cpu=summary.cpu,
            versions=summary.versions,
            nodes_before=summary.nodes_before,
            nodes_after=summary.nodes_after,
            fused_nodes=len(fused),
            distinct_kernels=len({x.name for x in fused}),
            kernels=summary.kernels,
            refused=summary.refused,
            feedback_rounds=summary.rounds,
            verification=VerificationReport(
                verdict.passed, verdict.cases, verdict.max_abs_error, verdict.max_rel_error
            ),
            latency=latency,
            compile_seconds=CompileSeconds(
                total=self.seconds["total"],
                partition=self.seconds["partition"],
                isl=chosen.isl_seconds,
                codegen=chosen.codegen_seconds,
                cc=self.seconds.get("cc", 0.0),
                measure=self.seconds.get("measure", 0.0),
                verify=self.seconds.get("verify", 0.0),
            ),
            warnings=tuple(self.warnings),
        )


@dataclass(slots=True)
class _Stopwatch:
    seconds: dict[str, float]
    stage: str
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + perf_counter() - self.start


def _capture(
    model: ir.Model, wanted: Mapping[str, ir.Value], feeds: Mapping[str, Array], threads: int
) -> dict[str, Array]:
    """The values of these tensors in one run of the model."""
    inputs = {v.name for v in model.graph.inputs}
    proto = ir.to_proto(model)
    del proto.graph.output[:]
    names = [name for name in wanted if name not in inputs]
    for name in names:
        value = wanted[name]
        info = proto.graph.output.add()
        info.name = name
        if value.dtype is not None:
            info.type.tensor_type.elem_type = value.dtype.value
    captured = {name: np.asarray(feeds[name]) for name in wanted if name in inputs}
    if names:
        session = ort.InferenceSession(
            proto.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
        )
        captured |= dict(zip(names, session.run(names, dict(feeds)), strict=True))
    return captured


def _relocate(candidate: Candidate, positions: Mapping[int, ir.Node]) -> Interface:
    """The candidate's interface in another copy of the same clean model."""
    pairs = [(o.node, positions[o.position]) for o in candidate.micro_graph.operators]
    values: dict[ir.Value, ir.Value] = {}
    for old, new in pairs:
        for a, b in zip((*old.inputs, *old.outputs), (*new.inputs, *new.outputs), strict=True):
            if a is not None and b is not None:
                values[a] = b
    part = candidate.part
    return Interface(
        tuple(new for _, new in pairs),
        tuple(values[v] for v in part.inputs),
        tuple(values[v] for v in part.outputs),
    )


def _dropped(judgement: Judgement, reason: str) -> Judgement:
    return Judgement(judgement.verdict, judgement.edges, judgement.unfused, judgement.fused, reason)


def _gain(judgement: Judgement) -> float:
    if judgement.unfused is None or judgement.fused is None:
        return 0.0
    return judgement.unfused / judgement.fused


def _wins(fused: Timing, unfused: Timing) -> bool:
    return fused.median < WHOLE_MODEL_WINS * unfused.median and fused.minimum < unfused.minimum


def _latency(unfused: Timing, fused: Timing, threads: int) -> LatencyReport:
    return LatencyReport(
        unfused.minimum * 1e3, fused.minimum * 1e3, unfused.minimum / fused.minimum, unfused.runs, threads
    )
