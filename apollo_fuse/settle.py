"""Settles which kernels stay: what the whole model computes with them, and how long it takes, decides."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnxruntime as ort

from apollo_fuse.acceptance import CLEAR_GAIN, Judgement
from apollo_fuse.errors import ApolloFuseError, NoFeedsError, what_onnxruntime_says
from apollo_fuse.feeds import runnable_feeds
from apollo_fuse.measure import Timing, interleaved, ratio_bounds
from apollo_fuse.report import LatencyReport
from apollo_fuse.stitching import Stitch, Swap, members
from apollo_fuse.tolerance import Array
from apollo_fuse.trial import Trial
from apollo_fuse.verify import NOTHING, Verdict, coarsest, failed, verify

MODEL_RUNS = 300  # at most, of each model in one measurement
SMALL = 0.01  # share of a run's time that is not worth a measurement of the model
LEAST_SECONDS = 0.25  # of readings, before the verdict can be clear
HOPELESS = 1.05  # share of the unfused time from which a longer measurement is no use
BOUND_WINS = 0.95  # share of a time that a model bound to a machine, or one with no kernel, stays below
WHOLE_MODEL_WINS = 0.98  # share of the unfused time that a fused model has to stay below


@dataclass(frozen=True, slots=True)
class Settled:
    """What stays, the latency with it, and what verification found; judgements of all candidates."""

    kept: tuple[Swap, ...]
    latency: LatencyReport
    verdict: Verdict
    judgements: Mapping[str, Judgement]
    alone: bool = False  # whether the model gains with no kernel, by its layout or how it was rewritten


@dataclass(slots=True)
class Settle:
    """`feeds` are the inputs to run with; `given`, those of them that hold for every run.

    `complain` is told of each kernel that does not verify in the model.
    """

    trial: Trial
    original: ort.InferenceSession
    feeds: Mapping[str, Array]
    given: Mapping[str, Array]
    seed: int
    complain: Callable[[str], None]
    judgements: dict[str, Judgement] = field(default_factory=dict)
    _opened: tuple[tuple[Swap, ...], ort.InferenceSession] | None = None

    def verified(self, accepted: Sequence[Swap]) -> tuple[tuple[Swap, ...], Verdict]:
        """Those that the model computes the same with; a kernel that makes a difference is dropped."""
        kept = tuple(accepted)
        while kept:
            verdict = self._verify(kept)
            if verdict.passed:
                return kept, verdict
            wrong = self._bisect(kept)
            self.complain(f"kernel {wrong} does not verify in the model: {verdict.problem}")
            self._drop([x for x in kept if x.name == wrong], "does not verify in the model")
            kept = tuple(x for x in kept if x.name != wrong)
        return (), NOTHING

    def fastest(self, accepted: Sequence[Swap]) -> tuple[tuple[Swap, ...], LatencyReport]:
        """Measures the model with all kernels, with no launches shared, and with the clearest winners alone.

        Keeps the best of these. What the others save may be too little to measure the model for. What wins
        nothing, and yet might, is measured once more, for longer, before it is given up.
        """
        threads = self.trial.threads
        kept = tuple(accepted)
        unfused, fused = self._measured(kept, seconds=1.0)
        for select in (self._apart, self._clear):
            fewer, difference = select(kept)
            if fewer in ((), kept) or (_wins(fused, unfused) and difference < SMALL * unfused.median):
                continue
            # one after the other: a session holds all weights once more
            without, with_fewer = self._measured(fewer, seconds=1.0)
            if with_fewer.share < fused.share:
                kept, unfused, fused = fewer, without, with_fewer
        if not _wins(fused, unfused) and fused.share < HOPELESS:
            unfused, fused = self._measured(kept, seconds=3.0)
        if not _wins(fused, unfused):
            self._drop(accepted, "the whole model does not get faster")
            return (), _latency(unfused, unfused, threads)
        self._drop([x for x in accepted if x not in kept], "the model is faster without it")
        return kept, _latency(unfused, fused, threads)

    def _apart(self, swaps: tuple[Swap, ...]) -> tuple[tuple[Swap, ...], float]:
        """The same with each kernel by itself that pays so, and seconds of a run that this is about."""
        stitches = [self.judgements[x.variant] for x in swaps if isinstance(x, Stitch)]
        kernels = (kernel for x in swaps for kernel in members(x))
        cost = sum(abs(j.apart - j.fused) for j in stitches if j.apart is not None and j.fused is not None)
        return tuple(x for x in kernels if self.judgements[x.variant].accepted), cost

    def _clear(self, swaps: tuple[Swap, ...]) -> tuple[tuple[Swap, ...], float]:
        """The clear winners alone, and seconds of a run that the others should save, each by itself."""
        clear = tuple(x for x in swaps if self.judgements[x.variant].gain >= CLEAR_GAIN)
        others = (self.judgements[x.variant] for x in swaps if x not in clear)
        saved = (j.unfused - j.fused for j in others if j.unfused is not None and j.fused is not None)
        return clear, sum(saved)

    def _measured(self, chosen: tuple[Swap, ...], seconds: float) -> tuple[Timing, Timing]:
        """Latency without and with these kernels, in turn for `seconds` each or until it is clear."""
        unfused, fused = interleaved(
            [self.original, self._open(chosen)],
            self.feeds,
            seconds=2 * seconds,
            maximum_runs=MODEL_RUNS,
            enough=_is_clear,
        )
        return unfused, fused

    def _open(self, chosen: tuple[Swap, ...]) -> ort.InferenceSession:
        """The model with these kernels; the one that was opened last is kept, and no other."""
        if self._opened is None or self._opened[0] != chosen:
            self._opened = None  # closed first, so that there are never two
            self._opened = chosen, self.trial.fused(chosen)
        return self._opened[1]

    def alone(self) -> tuple[LatencyReport, Verdict] | None:
        """What the model gains with no kernel, rewritten or laid out as it is; None for nothing."""
        verdict = self._verify(())
        if not verdict.passed:
            return None
        unfused, rewritten = self._measured((), seconds=3.0)
        if max(rewritten.share, rewritten.minimum / unfused.minimum) >= BOUND_WINS:
            return None
        return _latency(unfused, rewritten, self.trial.threads), verdict

    def _verify(self, chosen: Sequence[Swap]) -> Verdict:
        original = self.original
        shapes = {name: array.shape for name, array in self.feeds.items()}
        cases = [self.feeds]
        with contextlib.suppress(NoFeedsError):  # the first may have been a lucky draw
            cases.append(runnable_feeds(original, shapes, self.seed + 1, self.given))
        try:
            fused = self._open(tuple(chosen))
        except ApolloFuseError:
            raise
        except Exception as error:  # onnxruntime raises classes of its own for each status
            return failed(f"onnxruntime does not load the model: {what_onnxruntime_says(error)}")
        return verify(original, fused, cases, coarsest(x.micro_graph for x in chosen), whole=True)

    def _bisect(self, suspects: Sequence[Swap]) -> str:
        """The name of a kernel that makes the model wrong."""
        names = sorted({x.name for x in suspects})
        while len(names) > 1:
            half = set(names[: len(names) // 2])
            wrong = not self._verify([x for x in suspects if x.name in half]).passed
            names = [n for n in names if (n in half) == wrong]
        return names[0]

    def _drop(self, candidates: Sequence[Swap], reason: str) -> None:
        for variant in {x.variant for x in candidates}:
            self.judgements[variant] = replace(self.judgements[variant], reason=reason)


def _is_clear(readings: Sequence[Sequence[float]]) -> bool:
    """Whether more readings of the unfused and the fused model would not change the verdict."""
    unfused, fused = readings
    if sum(unfused) + sum(fused) < LEAST_SECONDS:
        return False
    low, high = ratio_bounds(fused, unfused)
    return high < WHOLE_MODEL_WINS or low > HOPELESS


def _wins(fused: Timing, unfused: Timing) -> bool:
    return fused.share < WHOLE_MODEL_WINS and fused.minimum < unfused.minimum


def _latency(unfused: Timing, fused: Timing, threads: int) -> LatencyReport:
    speedup = unfused.minimum / fused.minimum
    return LatencyReport(unfused.minimum * 1e3, fused.minimum * 1e3, speedup, unfused.runs, threads)
