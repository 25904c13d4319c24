"""Other compilers are measured as they report it, and held against the fused model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import peers
from benchmarks.bench import Failed
from benchmarks.peer_row import least_of
from benchmarks.peers import Row, measured, to_markdown

PEERS = ("OpenVINO", "IREE")


def test_the_least_repetition_counts_and_no_mean() -> None:
    entries = [
        {"run_type": "iteration", "real_time": 3.0, "time_unit": "ms"},
        {"run_type": "iteration", "real_time": 2500.0, "time_unit": "us"},
        {"run_type": "aggregate", "real_time": 1.0, "time_unit": "us"},
    ]
    assert least_of({"benchmarks": entries}) == pytest.approx(2.5e-3)


@pytest.mark.parametrize(
    ("others", "lead", "behind"),
    [({"IREE": 2e-3, "OpenVINO": 3e-3}, 2.0, False), ({"IREE": 0.8e-3}, 0.8, True), ({}, None, False)],
)
def test_the_best_of_the_others_is_what_counts(
    others: dict[str, float], lead: float | None, behind: bool
) -> None:
    row = Row("chain", 4e-3, 1e-3, others)
    assert row.lead == (None if lead is None else pytest.approx(lead)) and row.behind == behind


def test_the_table_tells_who_failed_and_who_is_behind() -> None:
    rows = (
        Row("near", 4e-3, 1e-3, {"OpenVINO": 2e-3, "IREE": 0.5e-3}),
        Row("alone", 4e-3, 1e-3, {}, {"OpenVINO": "no such operator", "IREE": "crashed"}),
        Row("broken", error="no such model"),
    )
    text = to_markdown(rows, {"CPU": "some"}, PEERS)
    assert "| near | 4.000 | 4.00x | 2.00x | 8.00x | 0.50x (!) |" in text
    assert "| alone | 4.000 | 4.00x | - | - | - |" in text and "- alone, IREE: crashed" in text
    assert "| broken | failed: no such model |" in text


def test_one_that_fails_costs_a_cell_and_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def child(module: str, arguments: list[str], result: Path) -> dict[str, object]:
        what = arguments[0]
        turns.append(what)
        if what == "IREE":
            raise Failed("IREE: no such operator")
        return {"minimum": 2e-3 / len(turns), "seconds": 1e-3}

    monkeypatch.setattr(peers, "child", child)
    row = measured("softmax", tmp_path, PEERS, seconds=0.1, threads=2)
    assert row.peers == {"OpenVINO": 1e-3} and row.failures == {"IREE": "IREE: no such operator"}
    assert turns.count("OpenVINO") == 2 and turns.count("IREE") == 1  # a second turn would fail as well
    assert row.unfused == 2e-3 / 6 and row.fused == 2e-3 / 7  # the least of two turns


def test_without_others_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "installed", dict)
    assert peers.main([]) == 1
    assert "install one of openvino, iree-base-compiler" in capsys.readouterr().err
