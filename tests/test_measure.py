"""`apollo_fuse.measure`: what is run, how often and in which order; never how long it takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from apollo_fuse import measure
from apollo_fuse.running import ort_value

FEEDS = {"x": np.ones((2, 3), np.float32), "unused": np.ones(1, np.float32)}
CONCAT = "Concat <axis = 0> (x, x)"


def opened(graph: str) -> ort.InferenceSession:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> {graph}')
    quiet = measure.session_options(1)
    quiet.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), quiet, providers=["CPUExecutionProvider"])


def made_of(expression: str, data_type: str = "float") -> ort.InferenceSession:
    return opened(f"g ({data_type}[N, 3] x) => ({data_type}[N, 3] y) {{ y = {expression} }}")


def doubled(data_type: str = "float") -> ort.InferenceSession:
    return made_of(CONCAT, data_type)


def test_session_options_are_what_a_comparison_needs() -> None:
    options = measure.session_options(3)
    assert options.intra_op_num_threads == 3
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    spinning = measure.session_options(3, spinning=True)
    assert spinning.get_session_config_entry("session.intra_op.allow_spinning") == "1"


def test_each_session_is_read_as_often_as_the_limits_say() -> None:
    timings = measure.interleaved(
        [doubled(), doubled(), doubled()], FEEDS, seconds=0, minimum_runs=4, maximum_runs=9
    )
    assert [timing.runs for timing in timings] == [4, 4, 4]
    (timing,) = measure.interleaved([doubled()], FEEDS, seconds=60, minimum_runs=1, maximum_runs=7)
    assert timing.runs == 7
    assert 0 < timing.minimum <= timing.median


def test_rounds_alternate_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = doubled(), doubled()
    order: list[str] = []
    clock = iter(range(1_000_000))
    monkeypatch.setattr(measure, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(
        measure,
        "_bound",
        lambda session, values, places, device: lambda: order.append("A" if session is first else "B"),
    )
    measure.interleaved([first, second], FEEDS, seconds=0, minimum_runs=4, maximum_runs=4)
    assert "".join(order[-8:]) == "ABBAABBA"


def test_short_runs_are_repeated_inside_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves 10 us a run, a reading takes 40 runs and still reports 10 us a run."""
    now = 0.0

    def run() -> None:
        nonlocal now
        now += 10e-6

    monkeypatch.setattr(measure, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "_bound", lambda session, values, places, device: run)
    (timing,) = measure.interleaved([doubled()], FEEDS, seconds=0, minimum_runs=3, maximum_runs=3)
    assert timing.minimum == pytest.approx(10e-6)
    assert now == pytest.approx((1 + 3 * 40) * 10e-6)


def test_rounds_end_where_the_readings_are_enough() -> None:
    seen: list[int] = []

    def enough(readings: Sequence[Sequence[float]]) -> bool:
        seen.append(len(readings[0]))
        assert len(readings) == 2 and len(readings[1]) == len(readings[0])
        return len(readings[0]) >= 6

    timings = measure.interleaved([doubled(), doubled()], FEEDS, seconds=60, minimum_runs=4, enough=enough)
    assert seen == [4, 5, 6]
    assert [timing.runs for timing in timings] == [6, 6]


def test_the_bounds_of_a_median_quotient_need_readings_and_miss_it_seldom() -> None:
    random = np.random.default_rng(0)
    assert measure.ratio_bounds([1.0] * 9, [2.0] * 9) == (0.0, np.inf)
    assert measure.ratio_bounds([1.0] * 10, [2.0] * 10) == (0.5, 0.5)
    times = 0.9 * random.lognormal(0.0, 0.05, (1000, 40))
    found = np.array([measure.ratio_bounds(list(row), [1.0] * 40) for row in times])
    assert np.count_nonzero(found[:, 0] > 0.9) <= 5
    assert np.count_nonzero(found[:, 1] < 0.9) <= 5
    assert np.median(found[:, 1] - found[:, 0]) < 0.1


def test_what_slows_a_whole_round_leaves_the_share_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds take ever longer, one session always half as long as the other: its share is a half."""
    now = 0.0
    speed = iter(np.repeat(np.geomspace(0.1, 10, 1000), 2))
    sessions = {id(first := doubled()): 2.0, id(second := doubled()): 1.0}

    def bound(
        session: ort.InferenceSession, values: object, places: object, device: str
    ) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += sessions[id(session)] * next(speed)

        return run

    monkeypatch.setattr(measure, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "_bound", bound)
    one, other = measure.interleaved([first, second], FEEDS, seconds=0, minimum_runs=9, maximum_runs=9)
    assert one.share == 1.0
    assert other.share == pytest.approx(0.5)


def test_noise_is_the_larger_over_the_smaller_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timings = [measure.Timing(2.0, 3.0, 5), measure.Timing(1.6, 3.0, 5)]
    monkeypatch.setattr(measure, "interleaved", lambda *arguments, **settings: timings)
    assert measure.noise(doubled, FEEDS, seconds=0) == pytest.approx(1.25)


def test_noise_of_a_real_session_is_at_least_one() -> None:
    assert measure.noise(doubled, FEEDS, seconds=0) >= 1.0


def test_bfloat16_and_strided_inputs_can_be_measured() -> None:
    (timing,) = measure.interleaved(
        [doubled("bfloat16")], {"x": np.ones((2, 3), ml_dtypes.bfloat16)}, seconds=0, minimum_runs=1
    )
    assert timing.runs == 1
    strided = np.arange(6, dtype=np.float32).reshape(3, 2).T
    np.testing.assert_array_equal(ort_value(strided).numpy(), strided)
    assert ort_value(np.array(1.0, np.float32)).shape() == []


def test_sessions_that_are_compared_write_to_the_same_place() -> None:
    values = {"x": ort_value(np.full((1, 3), 5, np.float32))}
    places: dict[str, ort.OrtValue] = {}
    add, multiply = (measure._bound(made_of(f"{op} (x, x)"), values, places, "cpu") for op in ("Add", "Mul"))
    add()
    assert places["y"].numpy().tolist() == [[10] * 3]
    multiply()
    assert places["y"].numpy().tolist() == [[25] * 3]


def test_a_session_whose_output_does_not_fit_has_one_of_its_own() -> None:
    values = {"x": ort_value(np.full((2, 3), 5, np.float32))}
    places: dict[str, ort.OrtValue] = {}
    add, concat = (measure._bound(made_of(text), values, places, "cpu") for text in ("Add (x, x)", CONCAT))
    add()
    concat()
    assert places["y"].numpy().tolist() == [[10] * 3] * 2


def test_a_model_whose_outputs_are_not_of_the_shape_that_it_declares_can_be_measured() -> None:
    session = opened("g (float[N] x, int64[R] s) => (float[N] y) { y = Reshape(x, s) }")
    feeds = {"x": np.zeros(6, np.float32), "s": np.array([2, 3])}
    (timing,) = measure.interleaved([session], feeds, seconds=0, minimum_runs=3)
    assert timing.runs >= 3


def test_garbage_collection_is_left_as_it_was() -> None:
    assert gc.isenabled()
    measure.interleaved([doubled()], FEEDS, seconds=0, minimum_runs=1)
    assert gc.isenabled()
    gc.disable()
    try:
        measure.interleaved([doubled()], FEEDS, seconds=0, minimum_runs=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ValueError, match="no value for input 'x'"):
        measure.interleaved([doubled()], {"z": FEEDS["x"]}, seconds=0)


@pytest.mark.parametrize("limits", [(0, 5), (6, 5)])
def test_limits_that_allow_no_run_are_refused(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="minimum_runs <= maximum_runs"):
        measure.interleaved([doubled()], FEEDS, seconds=0, minimum_runs=limits[0], maximum_runs=limits[1])
    with pytest.raises(ValueError, match="no session"):
        measure.interleaved([], FEEDS, seconds=0)
