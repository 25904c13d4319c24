"""`benchmarks.ablation`: what a layer gains is told apart from what was there without it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from apollo_fuse.measure import Timing
from benchmarks.ablation import VARIANTS, Ablation, Variant, ablate, from_json, plot, to_markdown

SETTINGS = {"seconds": 1.0, "threads": 2.0}


def row(name: str = "softmax") -> Ablation:
    milliseconds = dict(zip(VARIANTS, (8.0, 2.0, 1.0, 1.5), strict=True))
    variants = {
        variant: Variant(Timing(time / 1e3, time / 1e3, 5), 10 - place, 2, place, 0.5)
        for place, (variant, time) in enumerate(milliseconds.items())
    }
    return Ablation(name, Timing(8e-3, 8e-3, 5), variants)


def test_a_layers_own_gain_is_over_the_variant_without_it() -> None:
    assert [row().speedup(variant) for variant in VARIANTS] == pytest.approx([1, 4, 8, 16 / 3])
    assert [row().own_gain(part) for part in ("II", "III", "feedback")] == pytest.approx([4, 2, 1.5])


def test_the_table_has_every_model_and_the_means_of_each_group() -> None:
    rows = [row(), row("resnet50"), Ablation("gpt2_block", error="did not | run")]
    text = to_markdown(rows, {"CPU": "any"}, SETTINGS)
    assert (
        "| softmax | 8.000 | 1.00x | 4.00x | 8.00x | 5.33x | 4.00x | 2.00x | 1.50x | 10 -> 9 -> 8 | 2 |"
        in text
    )
    assert "| gpt2_block | failed: did not \\| run |" in text
    assert "| memory-bound builders | 1.00x | 4.00x | 8.00x | 5.33x | 4.00x | 2.00x | 1.50x | 1 |" in text
    assert (
        len({line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| ")}) == 2
    )


def test_json_holds_all_of_a_row() -> None:
    assert from_json(json.loads(json.dumps(asdict(row())))) == row()


def test_the_plot_is_drawn_without_the_rows_that_failed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the notebook extra draws the plot")
    plot([row(), Ablation("gpt2_block", error="failed")], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert "softmax" in drawn and "gpt2_block" not in drawn


def test_a_reduction_and_its_consumers_are_one_node_from_layer_two_on(tmp_path: Path) -> None:
    found = ablate("rmsnorm", tmp_path, seconds=0.02, threads=1)
    assert found.variants is not None
    nodes = [found.variants[variant].nodes for variant in ("I", "I,II")]
    assert nodes[0] > nodes[1] == 1
