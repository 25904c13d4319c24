"""`benchmarks.cost`: errors, ranks and decisions over rows, and what failed beside them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from apollo_fuse.cpu import Cpu
from apollo_fuse.descriptions import generic
from apollo_fuse.machine import Unit
from benchmarks.cost import quietest
from benchmarks.cost_table import (
    KernelRow,
    figures,
    rank_correlation,
    relative_error,
    summary,
    table,
    to_json,
    to_markdown,
)

MACHINE = {"CPU": "any"}
SETTINGS = {"seconds": 0.1, "threads": 2.0}


def row(
    measured: float, predicted: float, unfused: float = 1e-3, predicted_unfused: float = 1e-3
) -> KernelRow:
    return KernelRow(
        "net", "exp_mul", "exp_mul(4)", measured, predicted, "operations", 3e-6, unfused, predicted_unfused
    )


FAILED = replace(row(0, 0), error="it | fell over")


def test_the_error_is_relative_to_what_was_measured() -> None:
    assert relative_error(2.0, 3.0) == relative_error(2.0, 1.0) == 0.5
    assert relative_error(0.0, 1.0) == relative_error(-1e-9, 1.0) == 1.0


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        ([1, 1, 2], [3, 3, 9], 1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),
        ([1], [2], 1.0),
    ],
)
def test_the_rank_correlation_is_spearmans(one: list[float], other: list[float], expected: float) -> None:
    assert rank_correlation(one, other) == pytest.approx(expected)


def test_figures_are_over_all_that_was_measured_and_count_right_decisions() -> None:
    rows = [
        row(10e-6, 11e-6),
        row(20e-6, 26e-6),
        row(0.5e-6, 1e-6),
        row(2e-3, 1.5e-3, predicted_unfused=1.4e-3),
        row(2e-3, 0.5e-3),  # loses, and was to win
        FAILED,
    ]
    found = figures(rows)
    assert (found["kernels"], found["kernels_from_1_us"], found["right_decisions"]) == (5, 4, 4)
    assert found["median_error"] == pytest.approx(0.3)
    assert found["median_error_from_1_us"] == pytest.approx(0.275)
    assert figures([FAILED]) == {}


def test_what_failed_stands_in_every_form() -> None:
    rows = [row(10e-6, 11e-6), FAILED]
    assert "1 failed" in summary(rows) and "1 failed" in summary([FAILED])
    assert "| failed |" in to_markdown(rows, MACHINE, SETTINGS)
    written = json.loads(json.dumps(to_json(rows, MACHINE, SETTINGS)))
    assert [kernel["error"] for kernel in written["kernels"]] == [None, "it | fell over"]
    console = Console(width=200, record=True, file=None)
    with console.capture() as captured:
        console.print(table(rows))
    assert "it | fell over" in captured.get() and "10.00" in captured.get()


def test_a_line_of_markdown_has_as_many_cells_as_its_head() -> None:
    lines = [
        x for x in to_markdown([row(1e-5, 1e-5), FAILED], MACHINE, SETTINGS).splitlines() if x[:1] == "|"
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_of_several_calibrations_each_figure_is_the_quietest() -> None:
    machine = generic(Cpu("x86-64", 3), cores=2)
    near, *further = machine.levels
    busy = replace(
        machine,
        seconds=machine.seconds | {(Unit.EXP, 4): 1.0},
        levels=(replace(near, read=near.read / 2), *further),
        wake=machine.wake / 2,
    )
    assert (
        quietest([machine, busy]) == quietest([busy, machine]) == replace(machine, wake=0.75 * machine.wake)
    )
