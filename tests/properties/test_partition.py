"""Contracted graphs stay acyclic, whatever is merged, and partitions hold every operator once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_fuse import onnx_io
from apollo_fuse.graph import Operator
from apollo_fuse.passes.aggregate_ops import PARTS, AggregateOps, Limits
from apollo_fuse.passes.contraction import Contraction
from apollo_fuse.passes.extract_clusters import ExtractClusters, node_successors
from apollo_fuse.passes.open_compound_ops import OpenCompoundOps
from apollo_fuse.symbolic import infer_shapes, values_of
from tests.properties.graphs import RandomModel, models


@st.composite
def graphs(draw: st.DrawFn) -> list[set[int]]:
    """Successors of each node of an acyclic graph, numbered in topological order."""
    size = draw(st.integers(2, 12))
    later = [st.sets(st.integers(node + 1, size - 1)) for node in range(size - 1)]
    return [draw(users) for users in later] + [set()]


def assert_acyclic(groups: Sequence[Sequence[int]], successors: Sequence[set[int]]) -> None:
    group_of = {node: number for number, members in enumerate(groups) for node in members}
    assert sorted(group_of) == list(range(len(successors)))
    sorter = TopologicalSorter(
        {n: {group_of[p] for p in range(len(successors)) for s in successors[p] if group_of[s] == n} - {n}
         for n in range(len(groups))}
    )  # fmt: skip
    sorter.prepare()  # raises CycleError


def reaches_around(successors: Sequence[set[int]], groups: Sequence[Sequence[int]], a: int, b: int) -> bool:
    """Whether a path from group a to group b has another group on it, found by walking all of them."""
    group_of = {node: number for number, members in enumerate(groups) for node in members}
    pending = [s for node in groups[a] for s in successors[node] if group_of[s] not in (a, b)]
    seen: set[int] = set()
    while pending:
        group = group_of[pending.pop()]
        if group == b:
            return True
        if group not in seen:
            seen.add(group)
            pending += [s for node in groups[group] for s in successors[node]]
    return False


@settings(max_examples=500)
@given(graphs(), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_merging_where_there_is_no_detour_closes_no_cycle(
    successors: list[set[int]], pairs: list[tuple[int, int]]
) -> None:
    contraction = Contraction(successors)
    for a, b in pairs:
        if max(a, b) >= len(successors):
            continue
        one, two = contraction.find(a), contraction.find(b)
        if one == two:
            continue
        groups = contraction.groups()
        place = {contraction.find(members[0]): n for n, members in enumerate(groups)}
        detour = contraction.detour(one, two) or contraction.detour(two, one)
        around = reaches_around(successors, groups, place[one], place[two])
        around |= reaches_around(successors, groups, place[two], place[one])
        assert detour == around
        if not detour:
            contraction.merge(one, two)
        assert_acyclic(contraction.groups(), successors)


@settings(max_examples=60)
@given(models(most_nodes=20), st.integers(1, 8))
def test_micro_graphs_partition_the_operators_without_a_cycle(model: RandomModel, most: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model.proto, path)
        clean = onnx_io.load_clean(path, path.parent)
        infer_shapes(clean)
        opened = OpenCompoundOps(clean.opset_imports[""])(clean.graph, values_of(clean.graph))
        operators = {o.position for o in opened if isinstance(o, Operator)}
        groups: list[list[int]] = []
        for cluster in ExtractClusters()(clean.graph, opened):
            for micro_graph in AggregateOps(Limits(most))(cluster, frozenset()):
                puts_together = any(o.op_type == "Concat" for o in micro_graph.operators)
                assert len(micro_graph.operators) <= most * (PARTS if puts_together else 1)
                groups.append([o.position for o in micro_graph.operators])
        assert sorted(p for group in groups for p in group) == sorted(operators)
        rest = [[place] for place, o in enumerate(opened) if not isinstance(o, Operator)]
        assert_acyclic([*groups, *rest], node_successors(clean.graph))
