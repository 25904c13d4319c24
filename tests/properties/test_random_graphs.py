"""Whatever is fused computes what the original computes, for every graph of operators that can be fused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, note, settings

from apollo_fuse.tolerance import compare
from tests.fusing import fuse_to_session
from tests.properties.graphs import RandomModel, models, models_with_bodies, tables


def check(model: RandomModel, cache: Path) -> None:
    note(str(model))
    with tempfile.TemporaryDirectory() as folder:
        fused = fuse_to_session(model.proto, Path(folder), cache, shapes=model.shapes)
        random = np.random.default_rng(1)
        feeds = {name: random.standard_normal(s).astype(np.float32) for name, s in model.shapes.items()}
        feeds |= model.feeds
        results = fused.run({v.name: feeds[v.name] for v in fused.original.get_inputs()})
    for name, (expected, found) in results.items():
        assert not compare(name, expected, found).problem


@settings(max_examples=30)
@given(models())
def test_a_random_graph_computes_what_it_did(cache: Path, model: RandomModel) -> None:
    check(model, cache)


@settings(max_examples=20)
@given(models_with_bodies())
def test_a_random_graph_with_a_body_computes_what_it_did(cache: Path, model: RandomModel) -> None:
    check(model, cache)


@settings(max_examples=15)
@given(tables())
def test_a_random_table_computes_what_it_did(cache: Path, model: RandomModel) -> None:
    check(model, cache)


@pytest.mark.slow
@settings(max_examples=400)
@given(models(most_nodes=25))
def test_many_larger_random_graphs_compute_what_they_did(cache: Path, model: RandomModel) -> None:
    check(model, cache)


@pytest.mark.slow
@settings(max_examples=300)
@given(models_with_bodies(most_nodes=25))
def test_many_larger_random_graphs_with_bodies_compute_what_they_did(cache: Path, model: RandomModel) -> None:
    check(model, cache)


@pytest.mark.slow
@settings(max_examples=300)
@given(tables(most_parts=60))
def test_many_larger_random_tables_compute_what_they_did(cache: Path, model: RandomModel) -> None:
    check(model, cache)
