"""Latency of onnxruntime sessions, measured in turn so that what the machine does hits all alike."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import onnxruntime as ort

from apollo_fuse.running import ort_value

_SHORT = 50e-6
"""A run under this many seconds is repeated inside one reading: reading the clock costs too much of it."""
_READING = 400e-6
"""Seconds that one reading of such a run takes, about."""
_MISSED = 1e-3
"""How often a bound of `ratio_bounds` is wrong."""
_WARM_UP_RUNS = 20
"""At most, behind the two that it takes to bind outputs."""
_WARM_UP_SHARE = 0.1
_SEVERITY_ERROR = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Latency of one session in seconds a run, over `runs` readings.

    share: the median of its readings each divided by that of the first session in the same round. Where the
        machine is slow for a while, it is so for both of them: this is steadier than the quotient of medians.
    """

    minimum: float
    median: float
    runs: int
    share: float = 1.0


def session_options(threads: int, spinning: bool = False) -> ort.SessionOptions:
    """Options with every optimisation of onnxruntime on and `threads` threads inside an operator.

    Spinning pools of two sessions in one process take the cores from each other: leave it off
    wherever sessions are compared in one process.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SEVERITY_ERROR
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return options


def interleaved(
    sessions: Sequence[ort.InferenceSession],
    feeds: Mapping[str, np.ndarray],
    *,
    seconds: float,
    minimum_runs: int = 5,
    maximum_runs: int = 10_000,
    enough: Callable[[Sequence[Sequence[float]]], bool] = lambda readings: False,
    device: str = "cpu",
) -> list[Timing]:
    """The timing of each session on the same inputs, read in turn: A B, B A, A B, ...

    Inputs and outputs are bound, so that no copy of them is measured, and all sessions share them: where in
    memory they lie can make a run take 1.4 times as long. `device` is what onnxruntime calls the place. The
    rounds end after `seconds` for all sessions together, yet not before `minimum_runs` readings of each and
    never after `maximum_runs`. They end sooner where `enough` is true of the readings so far, in seconds, of
    each session.
    """
    if not sessions:
        raise ValueError("no session to measure")
    if not 1 <= minimum_runs <= maximum_runs:
        raise ValueError(
            f"expected 1 <= minimum_runs <= maximum_runs, found {minimum_runs} and {maximum_runs}"
        )
    values = {name: ort_value(array, device) for name, array in feeds.items()}
    places: dict[str, ort.OrtValue] = {}
    runs = [_bound(session, values, places, device) for session in sessions]
    with _no_garbage_collection():
        shortest = min(_warm_up(run, seconds * _WARM_UP_SHARE / len(runs)) for run in runs)
        repeats = round(_READING / max(shortest, 1e-6)) if shortest < _SHORT else 1
        readings: list[list[float]] = [[] for _ in runs]
        order = list(range(len(runs)))
        end = perf_counter() + seconds
        while len(readings[0]) < minimum_runs or (len(readings[0]) < maximum_runs and perf_counter() < end):
            for position in order:
                readings[position].append(_reading(runs[position], repeats))
            order.reverse()
            if len(readings[0]) >= minimum_runs and enough(readings):
                break
    return [
        Timing(
            min(times), statistics.median(times), len(times), statistics.median(ratios(times, readings[0]))
        )
        for times in readings
    ]


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    """The quotients of readings that were taken in turn."""
    return [a / b for a, b in zip(times, others, strict=True)]


def ratio_bounds(times: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Between what the median of the quotients lies, of readings that were taken in turn.

    By the sign test, whatever the distribution: one in a thousand such intervals misses it to either side.
    Too few readings bound nothing.
    """
    found = sorted(ratios(times, others))
    count, beyond, tail = len(found), 0, 0.0
    while True:
        tail += math.comb(count, beyond) / 2**count
        if tail > _MISSED:
            break
        beyond += 1
    return (found[beyond - 1], found[-beyond]) if beyond else (0.0, math.inf)


def noise(
    session_factory: Callable[[], ort.InferenceSession],
    feeds: Mapping[str, np.ndarray],
    *,
    seconds: float,
    minimum_runs: int = 5,
    maximum_runs: int = 10_000,
) -> float:
    """How far a model seems to be from itself: the larger over the smaller least time, 1.0 at best.

    A speed-up within this figure says nothing.
    """
    one, other = interleaved(
        [session_factory(), session_factory()],
        feeds,
        seconds=seconds,
        minimum_runs=minimum_runs,
        maximum_runs=maximum_runs,
    )
    return max(one.minimum, other.minimum) / min(one.minimum, other.minimum)


def _bound(
    session: ort.InferenceSession,
    values: Mapping[str, ort.OrtValue],
    places: dict[str, ort.OrtValue],
    device: str,
) -> Callable[[], None]:
    """One run of the session with the inputs it has in place and outputs written to the same place each time.

    places: of outputs by name, of sessions before; those that are missing are added, made by this one.
    A model may make outputs of another shape than it declares: onnxruntime makes them and just warns, but
    does not write to them again. There each run makes its outputs anew.
    """
    binding = session.io_binding()
    for argument in session.get_inputs():
        if argument.name not in values:
            raise ValueError(f"no value for input {argument.name!r}, only for {sorted(values)}")
        binding.bind_ortvalue_input(argument.name, values[argument.name])
    outputs = [argument.name for argument in session.get_outputs()]

    def bind(known: Mapping[str, ort.OrtValue]) -> None:
        for name in outputs:
            if name in known:
                binding.bind_ortvalue_output(name, known[name])
            else:
                binding.bind_output(name, device)

    def run() -> None:
        session.run_with_iobinding(binding)

    def run_anew() -> None:
        bind({})
        run()

    bind(places)
    try:
        run()
        made = dict(zip(outputs, binding.get_outputs(), strict=True))
        run()
    except Exception:  # onnxruntime raises classes of its own for each status
        run_anew()
        return run_anew
    places.update(made)
    return run


def _warm_up(run: Callable[[], None], seconds: float) -> float:
    """Runs until the first-run costs are paid; the least seconds of a run."""
    end = perf_counter() + seconds
    least = _reading(run, 1)
    for _ in range(_WARM_UP_RUNS - 1):
        if perf_counter() >= end:
            break
        least = min(least, _reading(run, 1))
    return least


def _reading(run: Callable[[], None], repeats: int) -> float:
    """Seconds of a run, over `repeats` runs in a row."""
    start = perf_counter()
    for _ in range(repeats):
        run()
    return (perf_counter() - start) / repeats


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
