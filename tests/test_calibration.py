"""Calibration: what is measured is plausible, what is kept is read back, and what is damaged is made anew."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from apollo_fuse.calibration import measuring, stored
from apollo_fuse.calibration.kernels import timeable
from apollo_fuse.calibration.measuring import believed, bounded, cache_sizes
from apollo_fuse.calibration.stored import calibrated, from_json, recall, remember, to_json
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cpu import Cpu
from apollo_fuse.descriptions import generic
from apollo_fuse.machine import Machine, Unit

FACTS = {"cpu": "any", "threads": "2"}
MACHINE = generic(Cpu("x86-64", 3), cores=2)


@pytest.fixture(scope="module")
def toolchain() -> Toolchain:
    return Toolchain.find(os.environ)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stands in for the measurement, and counts how often it is made: each gives another machine."""
    made: list[int] = []

    def count(*_: object) -> Machine:
        made.append(len(made))
        return replace(MACHINE, name=f"measured {len(made)}")

    monkeypatch.setattr(stored, "measure", count)
    return made


def test_what_is_measured_is_a_plausible_machine(toolchain: Toolchain, cache: Path) -> None:
    machine = measuring.measure(toolchain, cache, 2)
    described = generic(toolchain.cpu, 2)
    assert {key for key in machine.seconds if key[1] == 4} >= {(unit, 4) for unit in Unit}
    for key, seconds in machine.seconds.items():
        assert math.isfinite(seconds) and 0 < seconds < 100 * described.of(*key)
    assert 0 <= machine.hidden <= 1
    rates = [level.read for level in machine.levels]
    assert rates == sorted(rates, reverse=True)  # no level is faster than a nearer one
    assert machine.runtime is not None and machine.runtime.elements["Softplus"] > 0
    assert "measured" in machine.source and str(toolchain.cpu) in machine.source
    assert from_json(json.loads(json.dumps(to_json(machine)))) == machine


def test_a_machine_is_read_back_as_it_was_kept(tmp_path: Path) -> None:
    place = tmp_path / "machines" / "one.json"
    remember(place, FACTS, MACHINE)
    assert recall(place, FACTS) == MACHINE
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert [file.name for file in place.parent.iterdir()] == ["one.json"]


def test_a_file_of_other_facts_is_not_taken(tmp_path: Path) -> None:
    remember(tmp_path / "one.json", FACTS, MACHINE)
    assert recall(tmp_path / "one.json", FACTS | {"threads": "4"}) is None
    assert recall(tmp_path / "none.json", FACTS) is None


def edit(change: Callable[[dict[str, object]], None]) -> Callable[[str], str]:
    def run(text: str) -> str:
        found = json.loads(text)
        change(found["machine"])
        return json.dumps(found)

    return run


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"format": ', '"format": 9'),
        edit(lambda machine: machine.pop("seconds")),
        edit(lambda machine: machine.update(loop=-1.0)),
        edit(lambda machine: machine.update(loop=float("nan"))),
        edit(lambda machine: machine.update(hidden=1.5)),
        edit(lambda machine: machine.update(cores="two")),
        edit(lambda machine: machine.update(levels=[])),
        edit(lambda machine: machine.update(levels=[["L1", None, False, 1e9, 0, None]])),
        edit(lambda machine: machine.update(seconds=[["no unit", 4, 1e-9]])),
        edit(lambda machine: machine.update(runtime={"node": 1e-7})),
    ],
)
def test_a_damaged_file_is_ignored_and_made_anew(
    damage: Callable[[str], str], toolchain: Toolchain, tmp_path: Path, counted: list[int]
) -> None:
    first = calibrated(toolchain, tmp_path, 2)
    (place,) = (tmp_path / "machines").iterdir()
    place.write_text(damage(place.read_text()))
    second = calibrated(toolchain, tmp_path, 2)
    assert (first.name, second.name) == ("measured 1", "measured 2")
    assert calibrated(toolchain, tmp_path, 2) == second  # which is whole again
    assert len(counted) == 2


def test_each_number_of_threads_level_and_compiler_has_a_calibration_of_its_own(
    toolchain: Toolchain, tmp_path: Path, counted: list[int]
) -> None:
    others = (replace(toolchain, cpu=toolchain.cpu.baseline), replace(toolchain, identification="another"))
    for chosen, threads in ((toolchain, 1), (toolchain, 2), *((other, 2) for other in others)):
        for _ in range(2):
            calibrated(chosen, tmp_path, threads)
    assert len(counted) == 4


def test_a_calibration_is_made_anew_on_demand(
    toolchain: Toolchain, tmp_path: Path, counted: list[int]
) -> None:
    calibrated(toolchain, tmp_path, 2)
    assert calibrated(toolchain, tmp_path, 2, anew=True).name == "measured 2"
    assert calibrated(toolchain, tmp_path, 2).name == "measured 2"


@pytest.mark.parametrize(("found", "kept"), [(2e-9, 2e-9), (1e-12, 1e-9), (1e-6, 1e-9), (0.0, 1e-9)])
def test_a_figure_beyond_belief_is_left_at_the_description(found: float, kept: float) -> None:
    assert believed(found, 1e-9) == kept


@pytest.mark.parametrize(
    ("found", "kept"),
    [([2e-6], 2e-6), ([8e-6, 3e-6], 3e-6), ([1e-3], 6e-6), ([0.0, 5e-6], 1e-6 / 6), ([], 1e-6)],
)
def test_threads_take_the_least_that_was_found_within_bounds(found: list[float], kept: float) -> None:
    assert bounded(found, 1e-6) == pytest.approx(kept)


def test_every_unit_has_a_kernel_or_a_loop_that_measures_it() -> None:
    timed = {(x.unit, x.size) for x in timeable().units}
    moves = {
        Unit.LOAD,
        Unit.STORE,
        Unit.LOAD_ACROSS,
        Unit.STORE_ACROSS,
        Unit.STRIDED,
        Unit.GATHER,
        Unit.SCATTER,
        Unit.FAR_GATHER,
        Unit.FAR_SCATTER,
        Unit.CLAMPED,
    }
    integers = {Unit.REMAINDER}
    assert {unit for unit, size in timed if size == 4} >= set(Unit) - moves - integers
    names = [kernel.name for kernel in timeable().group.kernels]
    assert len(names) == len(set(names))


def test_the_caches_of_this_machine_grow_outwards() -> None:
    sizes = cache_sizes()
    known = [sizes[name] for name in sorted(sizes)]
    assert known == sorted(known)
