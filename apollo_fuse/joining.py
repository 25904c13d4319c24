"""Decides which stitches stay: they have to beat onnxruntime, and not to lose to their kernels one by one.

Equal ones are judged once, and of those that stay, the ones that do not need each other become one: a larger
stitch wakes threads less often, and would take longer to judge.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import onnx_ir as ir

from apollo_fuse.acceptance import WINS, Judgement, Region, context, needed_values
from apollo_fuse.bodies import graphs
from apollo_fuse.capture import Captures, capture
from apollo_fuse.cost import cost_of_stitch
from apollo_fuse.errors import what_onnxruntime_says
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu_worth import pay_together_on
from apollo_fuse.machine import Machine
from apollo_fuse.measure import interleaved
from apollo_fuse.options import Options
from apollo_fuse.partition import Plan
from apollo_fuse.passes.parallelism_stitching import MOST_TENSORS, ParallelismStitching, Unit, filled_up
from apollo_fuse.predicted import extents_of
from apollo_fuse.stitching import Stitch, Swap, stitch
from apollo_fuse.tolerance import Array
from apollo_fuse.trial import Trial
from apollo_fuse.verify import NOTHING, coarsest, failed, verify

_LOSES = 1.25
"""Share of the time of its kernels one by one from which a stitch is given up before the model is measured.

By itself it runs behind onnxruntime, with threads asleep, which hides what it gains in a model.
"""

_MOST_TENSORS = 8 * MOST_TENSORS
"""Inputs and outputs of a node of the model."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The stitches that were worth judging, put together where they stay, and what was found of each."""

    stitches: tuple[Stitch, ...]
    judgements: Mapping[str, Judgement]

    @property
    def accepted(self) -> tuple[Stitch, ...]:
        return tuple(x for x in self.stitches if self.judgements[x.variant].accepted)


def join(
    model: ir.Model,
    chosen: Plan,
    trial: Trial,
    feeds: Mapping[str, Array],
    judgements: Mapping[str, Judgement],
    options: Options,
    machine: Machine,
) -> Joined:
    """Joins the plan's kernels, whose judgements are given, into stitches, and judges those."""
    found = stitches(model, chosen.kernels, judgements)
    distinct = {x.variant: x for level in reversed(found) for x in reversed(level)}
    if not distinct:
        return Joined((), {})
    captures = capture(trial.clean, needed_values(distinct.values()), feeds, trial.threads)
    library = trial.folder / "stitches.so"
    judge = _Judge(dict(model.opset_imports), captures, library, options, trial.threads, machine, judgements)
    predictions = {variant: judge.predicted(x) for variant, x in distinct.items()}
    lost = _LOSES if options.measure else WINS
    hopeful = [x for variant, x in distinct.items() if predictions[variant].stays_below(lost)]
    if hopeful and options.measure:
        kernels = {x.name: x for joined in hopeful for x in joined.members}
        trial.library([*hopeful, *kernels.values()], library)
    known = {x.variant: judge(x, predictions[x.variant]) for x in hopeful}
    nodes = [node for level in found for node in _put_together(level, known)]
    return Joined(tuple(x for x, _ in nodes), {x.variant: judgement for x, judgement in nodes})


def stitches(
    model: ir.Model, candidates: Sequence[Candidate], judgements: Mapping[str, Judgement]
) -> list[list[Stitch]]:
    """What may share launches: kernels that compute what they should, whether or not they pay alone.

    In lists of stitches that do not need each other.
    """
    sound = [x for x in candidates if judgements[x.variant].is_sound]
    found: list[list[Stitch]] = []
    for graph in graphs(model.graph):
        here = [x for x in sound if x.part.nodes[0].graph is graph]
        units = [_unit(x, judgements[x.variant]) for x in here]
        for level in ParallelismStitching().by_level(graph, units):
            found.append([stitch([here[place] for place in group]) for group in level])
    return found


def _put_together(
    level: Sequence[Stitch], known: Mapping[str, Judgement]
) -> Iterator[tuple[Stitch, Judgement]]:
    """The stitches that were judged, those that stay as few as may be."""
    judged = [x for x in level if x.variant in known]
    yield from ((x, known[x.variant]) for x in judged if not known[x.variant].accepted)
    staying = [x for x in judged if known[x.variant].accepted]
    for group in filled_up([_tensors(x) for x in staying], _MOST_TENSORS):
        yield _as_one([staying[place] for place in group], known)


def _as_one(stitches: Sequence[Stitch], known: Mapping[str, Judgement]) -> tuple[Stitch, Judgement]:
    judgement = reduce(Judgement.joined, [known[x.variant] for x in stitches])
    if len(stitches) == 1:
        return stitches[0], judgement
    return stitch([member for x in stitches for member in x.members]), judgement


def _unit(candidate: Candidate, judgement: Judgement) -> Unit:
    return Unit(candidate.part.nodes, candidate.variant, _tensors(candidate), judgement.accepted)


def _tensors(swap: Swap) -> frozenset[Hashable]:
    return frozenset((*swap.part.inputs, *swap.part.outputs))


@dataclass(frozen=True, slots=True)
class _Prediction:
    """Seconds of the kernels together, of the better way for each apart, and of onnxruntime alone.

    on_gpus: whether together they win on all the GPUs that decide.
    """

    together: float
    apart: float
    unfused: float
    on_gpus: bool

    def stays_below(self, share: float) -> bool:
        """Whether together they take less than this share of the better other way, or win on GPUs."""
        return self.on_gpus or self.together < share * min(self.apart, self.unfused)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Judges a stitch as `acceptance.judge` does a kernel; `judgements` are those of its members."""

    opsets: Mapping[str, int]
    captures: Captures
    library: Path
    options: Options
    threads: int
    machine: Machine
    judgements: Mapping[str, Judgement]

    def __call__(self, joined: Stitch, expected: _Prediction) -> Judgement:
        """Verifies on captured inputs that each kernel is given what it should, then measures it."""
        together, before = expected.together, expected.unfused
        if not self.options.measure:
            return Judgement(NOTHING, None, None, "", before, together)
        nodes = context(joined)
        accepted = [x for x in joined.members if self.judgements[x.variant].accepted]
        try:
            region = Region(joined, nodes, self.opsets, self.library, self.threads, apart=accepted)
        except Exception as error:  # onnxruntime raises classes of its own for each status
            verdict = failed(what_onnxruntime_says(error))
            return Judgement(verdict, None, None, f"does not load: {verdict.problem}", before, together)
        feeds = region.feeds(self.captures.arrays)
        precision = coarsest([joined.micro_graph])
        verdict = verify(region.unfused, region.fused, [feeds], precision, region.in_doubles)
        if not verdict.passed:
            return Judgement(verdict, None, None, f"does not verify: {verdict.problem}", before, together)
        sessions = [region.apart, region.fused, region.unfused]
        each, fused, unfused = interleaved(sessions, feeds, seconds=self.options.measure_seconds * 3)
        reason = ""
        if fused.minimum > WINS * unfused.minimum or fused.share > WINS * unfused.share:
            reason = "not faster than onnxruntime"
        elif fused.minimum > _LOSES * each.minimum and fused.share > _LOSES:
            reason = "slower than its kernels one by one"
        return Judgement(verdict, unfused.minimum, fused.minimum, reason, before, together, each.minimum)

    def predicted(self, joined: Stitch) -> _Prediction:
        used = self.options.threads or self.machine.cores
        groups = [(x.group, extents_of(x, self.captures.arrays)) for x in joined.members]
        together = cost_of_stitch(groups, self.machine, used).seconds
        known = [self.judgements[x.variant] for x in joined.members]
        unfused = [j.predicted_unfused or 0.0 for j in known]
        apart = [
            j.predicted if j.accepted and j.predicted is not None else before
            for j, before in zip(known, unfused, strict=True)
        ]
        gpus = () if self.options.measure else self.options.gpus
        return _Prediction(together, sum(apart), sum(unfused), pay_together_on(gpus, groups))
