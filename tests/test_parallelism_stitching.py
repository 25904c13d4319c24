"""Layer III: kernels that do not need each other share launches, and nothing is later for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_fuse import InputShape, Options, acceptance, driver, fuse, joining, runtime
from apollo_fuse.acceptance import Judgement
from apollo_fuse.cost import cost_of, cost_of_stitch
from apollo_fuse.descriptions import generic
from apollo_fuse.measure import Timing
from apollo_fuse.partition import plan
from apollo_fuse.passes.extract_clusters import node_successors
from apollo_fuse.passes.parallelism_stitching import FEW, ParallelismStitching, Unit
from apollo_fuse.report import Report
from apollo_fuse.tolerance import compare
from models import memory_bound
from tests.properties.test_partition import assert_acyclic, graphs
from tests.test_end_to_end import text_model


def graph_of(successors: Sequence[set[int]]) -> ir.Graph:
    """A graph whose nodes need each other as these numbers do."""
    producers: list[list[int]] = [[] for _ in successors]
    for node, users in enumerate(successors):
        for user in users:
            producers[user].append(node)
    start = ir.Value(name="x")
    nodes: list[ir.Node] = []
    for own in producers:
        nodes.append(ir.node("Sum", [start, *(nodes[place].outputs[0] for place in own)]))
    return ir.Graph([start], [nodes[-1].outputs[0]], nodes=nodes)


def unit(nodes: Sequence[ir.Node], kind: object = "", pays_alone: bool = True, tensors: int = 1) -> Unit:
    own = frozenset((nodes[0].outputs[0], number) for number in range(tensors))
    return Unit(tuple(nodes), kind, own, pays_alone)  # type: ignore[arg-type]


def longest_path(groups: Sequence[Sequence[int]], successors: Sequence[set[int]]) -> int:
    group_of = {node: number for number, members in enumerate(groups) for node in members}
    needs: dict[int, set[int]] = {number: set() for number in range(len(groups))}
    for node, users in enumerate(successors):
        for user in users:
            if group_of[node] != group_of[user]:
                needs[group_of[user]].add(group_of[node])
    length: dict[int, int] = {}
    for number in TopologicalSorter(needs).static_order():
        length[number] = 1 + max((length[before] for before in needs[number]), default=0)
    return max(length.values())


@settings(max_examples=300, deadline=None)
@given(graphs(), st.data())
def test_stitches_close_no_cycle_and_make_no_path_longer(
    successors: list[set[int]], data: st.DataObject
) -> None:
    graph = graph_of(successors)
    nodes = list(graph)
    places = data.draw(st.lists(st.sampled_from(range(len(nodes))), unique=True))
    most = data.draw(st.integers(1, 8))
    units = [
        unit([nodes[place]], data.draw(st.sampled_from("ab")), data.draw(st.booleans()), tensors=2)
        for place in places
    ]
    found = ParallelismStitching(most)(graph, units)
    members = [place for group in found for place in group]
    assert len(members) == len(set(members))
    for group in found:
        assert len(group) > 1 and 2 * len(group) <= max(most, 2)
    joined = [[places[m] for m in group] for group in found]
    alone = [[n] for n in range(len(nodes)) if n not in {n for group in joined for n in group}]
    assert node_successors(graph) == successors
    assert_acyclic([*joined, *alone], successors)
    assert longest_path([*joined, *alone], successors) == longest_path(
        [[n] for n in range(len(nodes))], successors
    )


def wide(count: int) -> tuple[ir.Graph, list[ir.Node]]:
    """So many nodes that do not need each other, before one that needs all."""
    graph = graph_of([*({count} for _ in range(count)), set()])
    return graph, list(graph)[:-1]


def test_kinds_are_dealt_out_evenly() -> None:
    graph, nodes = wide(100)
    units = [unit([node], "abcde"[place % 5], tensors=4) for place, node in enumerate(nodes)]
    found = ParallelismStitching(64)(graph, units)
    kinds = [Counter(units[place].kind for place in group) for group in found]
    assert len(found) == 9 and len({tuple(sorted(kind.items())) for kind in kinds}) == 2
    assert sum(map(len, found)) == 100 and all(4 * len(group) <= 64 for group in found)


def test_tensors_that_many_read_count_once() -> None:
    graph, nodes = wide(60)
    shared = frozenset({"rate", "step"})
    units = [replace(one, tensors=one.tensors | shared) for one in (unit([node]) for node in nodes)]
    assert [len(group) for group in ParallelismStitching(62)(graph, units)] == [60]
    assert [len(group) for group in ParallelismStitching(61)(graph, units)] == [30, 30]


def test_what_does_not_pay_alone_takes_several_of_its_kind() -> None:
    graph, nodes = wide(FEW + 1)
    small = [unit([node], "small", pays_alone=False) for node in nodes]
    assert [len(group) for group in ParallelismStitching()(graph, small)] == [FEW + 1]
    assert ParallelismStitching()(graph, small[: FEW - 1]) == ()
    beside = [*small[: FEW - 1], unit([nodes[-2]], "large"), unit([nodes[-1]], "larger")]
    assert ParallelismStitching()(graph, beside) == ((FEW - 1, FEW),)


def test_kernels_that_share_nothing_fill_stitches_in_turn() -> None:
    graph, nodes = wide(7)
    units = [unit([node], place, tensors=3) for place, node in enumerate(nodes)]
    assert ParallelismStitching(9)(graph, units) == ((0, 1, 2), (3, 4, 5))


# -- whole models -------------------------------------------------------------------------------------


def fused(model: onnx.ModelProto, folder: Path, **options: object) -> Report:
    onnx.save(model, folder / "net.onnx")
    shapes = tuple(
        InputShape(value.name, tuple(d.dim_value or 3 for d in value.type.tensor_type.shape.dim))
        for value in model.graph.input
        if value.type.tensor_type.shape.dim
    )
    chosen = Options(shapes=shapes, cache_dir=folder / "cache", threads=2, measure=False, strict=True)
    return fuse(folder / "net.onnx", options=replace(chosen, **options))  # type: ignore[arg-type]


def assert_computes_the_same(report: Report) -> None:
    """With its kernels and with its functions."""
    random = np.random.default_rng(3)
    original = ort.InferenceSession(str(report.model), providers=["CPUExecutionProvider"])
    feeds = {
        x.name: np.asarray(
            np.abs(random.standard_normal([d if isinstance(d, int) else 5 for d in x.shape])), np.float32
        )
        for x in original.get_inputs()
    }
    expected = original.run(None, feeds)
    for session in (
        runtime.session(report.output),
        ort.InferenceSession(str(report.output), providers=["CPUExecutionProvider"]),
    ):
        for place, (a, b) in enumerate(zip(expected, session.run(None, feeds), strict=True)):
            assert not compare(str(place), a, b).problem
    onnx.checker.check_model(str(report.output), full_check=True)


def stitches(report: Report) -> list[tuple[int, int]]:
    """Members and places of the stitches that the written model uses."""
    return [(len(k.members), k.instances) for k in report.accepted if k.layer == 3]


def test_an_optimizer_step_is_a_few_nodes(tmp_path: Path) -> None:
    model = memory_bound.adam(144, shapes=((64,), (96,), (7, 5)))
    report = fused(model, tmp_path)
    assert stitches(report) == [(144, 1)]
    assert report.fused_nodes == 1 and report.nodes_after <= 1 + 4  # what the moments are corrected by
    assert_computes_the_same(report)
    apart = fused(model, tmp_path, layers="I,II")
    assert not stitches(apart) and apart.fused_nodes == 144


@pytest.mark.parametrize(
    ("count", "most", "found"),
    [(144, 1 << 14, [(144, 1)]), (144, 400, [(48, 3)]), (150, 1 << 14, [(150, 1)])],
)
def test_equal_stitches_are_judged_once_and_put_together(
    count: int, most: int, found: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(joining, "ParallelismStitching", lambda: ParallelismStitching(200))
    monkeypatch.setattr(joining, "_MOST_TENSORS", most)
    judged: list[int] = []
    real = joining._Judge.__call__

    def judge(self: object, joined: joining.Stitch, expected: object) -> Judgement:
        judged.append(len(joined.members))
        return real(self, joined, expected)  # type: ignore[arg-type]

    monkeypatch.setattr(joining._Judge, "__call__", judge)
    report = fused(memory_bound.adam(count, shapes=((64,), (96,), (7, 5))), tmp_path)
    assert judged == ([24] if count == 144 else [6, 24])  # of 150 six are left over
    assert stitches(report) == found
    assert_computes_the_same(report)


def test_what_shares_a_launch_is_dumped(tmp_path: Path) -> None:
    report = fused(memory_bound.adam(3, shapes=((64,), (96,))), tmp_path, dump=tmp_path / "dump")
    (found,) = [k for k in report.kernels if k.layer == 3]
    lines = (tmp_path / "dump" / f"{found.name}.stitch.txt").read_text().splitlines()
    assert lines[0] == f"stitch {found.name}" and len(lines) == 4
    assert [line.split()[0] for line in lines[1:]] == list(found.members)


def test_what_is_too_small_for_a_kernel_shares_a_launch(tmp_path: Path) -> None:
    report = fused(memory_bound.lamb(20, divisor=4), tmp_path)
    tails = [k for k in report.kernels if k.layer == 1 and k.ops[-1] == "Mul" and "Where" in k.ops]
    assert tails and all(k.accepted and k.reason.startswith("pays in a launch with others") for k in tails)
    assert not any("Where" in node.op_type for node in onnx.load(report.output).graph.node)
    assert_computes_the_same(report)


def test_stitches_are_the_same_on_every_run(tmp_path: Path) -> None:
    written: list[bytes] = []
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        report = fused(memory_bound.wide_deep(40, 12), folder)
        assert report.library is not None
        written += [report.output.read_bytes(), report.library.read_bytes()]
    assert written[:2] == written[2:]


TWO_BRANCHES = """g (bool c, float[N, 64] x, float[N, 64] z) => (float[N, 64] y) {
  y = If (c) <then_branch = t () => (float[N, 64] p)
    { a = Exp(x) b = Add(a, x) d = Exp(z) e = Mul(d, z) p = Sub(b, e) },
    else_branch = f () => (float[N, 64] q) { q = Identity(x) }>
}"""


def test_kernels_of_a_body_stay_in_it(tmp_path: Path) -> None:
    model = text_model(TWO_BRANCHES)
    onnx.save(model, tmp_path / "net.onnx")
    chosen = plan(ir.load(tmp_path / "net.onnx"), Options(measure=False, fuse_all=True))
    assert chosen.candidates  # one kernel: nothing to stitch across graphs
    judgements = {x.variant: Judgement(acceptance.NOTHING, 1.0, 0.5, "", 1.0, 0.5) for x in chosen.candidates}
    assert not list(joining.stitches(ir.load(tmp_path / "net.onnx"), (), judgements))


# -- what measuring decides ---------------------------------------------------------------------------


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that stitches are measured to take: together, apart and in onnxruntime."""
    seconds = {"together": 1.0, "apart": 2.0, "unfused": 4.0}

    def interleaved(sessions: Sequence[object], *_: object, **__: object) -> list[Timing]:
        apart = seconds["apart"]
        found = (apart, seconds["together"], seconds["unfused"])
        return [Timing(each, each, 5, each / apart) for each in found]

    monkeypatch.setattr(joining, "interleaved", interleaved)
    return seconds


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"together": 2.1}, ""),  # no loss that can be told from noise: the model decides
        ({"together": 2.6}, "slower than its kernels one by one"),
        ({"unfused": 1.0}, "not faster than onnxruntime"),
    ],
)
def test_a_stitch_has_to_beat_onnxruntime_and_not_to_lose_to_its_kernels(
    changed: dict[str, float], reason: str, times: dict[str, float], tmp_path: Path
) -> None:
    times |= changed
    model = memory_bound.adam(20, shapes=((64,), (96,)))
    report = fused(model, tmp_path, measure=True, measure_seconds=0.1)
    (found,) = [k for k in report.kernels if k.layer == 3]
    assert found.reason.split(" (")[0] == (reason or f"{4 / times['together']:.2f}x as fast as onnxruntime")
    assert found.apart_us == pytest.approx(2e6) and len(found.members) == 20
    assert_computes_the_same(report)


def test_a_stitch_that_computes_something_else_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = joining.stitch

    def crossed(members: Sequence[object]) -> object:
        made = real(members)  # type: ignore[arg-type]
        return replace(made, inputs=(*made.inputs[-4:], *made.inputs[:-4]))

    monkeypatch.setattr(joining, "stitch", crossed)
    report = fused(
        memory_bound.adam(20, shapes=((64,), (96,))),
        tmp_path,
        measure=True,
        measure_seconds=0.01,
        strict=False,
    )
    (found,) = [k for k in report.kernels if k.layer == 3]
    assert not found.accepted and found.reason.startswith("does not verify")
    assert any(found.name in warning for warning in report.warnings)


def test_sharing_a_launch_saves_calls_by_the_cost_model(tmp_path: Path) -> None:
    onnx.save(memory_bound.adam(2, shapes=((64,), (96,))), tmp_path / "net.onnx")
    clean = driver.load_clean_at(tmp_path / "net.onnx", driver.Layout.PORTABLE, tmp_path)
    start = driver.cut(clean, driver.Layout.PORTABLE)
    one, other = plan(start.model, Options()).candidates
    machine = generic(Options().cpu.cpus[-1])
    alone = cost_of(one.group, {}, machine, 2)
    beside = cost_of(other.group, {}, machine, 2)
    both = cost_of_stitch([(one.group, {}), (other.group, {})], machine, 2)
    assert cost_of_stitch([(one.group, {})], machine, 2) == alone
    assert both.seconds == pytest.approx(alone.seconds + beside.seconds - machine.node)
