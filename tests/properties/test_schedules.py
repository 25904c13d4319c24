"""Every schedule runs each point once, after all that write what it reads: counted out, without isl."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from hypothesis import assume, given, settings

from apollo_fuse import onnx_io
from apollo_fuse.graph import Refused
from apollo_fuse.index import Atom, Index
from apollo_fuse.index import Iterator as Axis
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.passes.build_scop import BuildScop
from apollo_fuse.passes.loop_fusion import Band, Fused, Leaf, LoopFusion, Sequence, Tree
from apollo_fuse.scop import Scop, Statement
from apollo_fuse.symbolic import infer_shapes
from tests.properties.graphs import RandomModel, models

Point = tuple[str, tuple[int, ...]]
Element = tuple[str, tuple[int, ...]]


def scops(model: RandomModel, folder: str) -> Iterator[Scop]:
    """The Scop of each kernel of the model."""
    path = Path(folder) / "model.onnx"
    onnx.save(model.proto, path)
    clean = onnx_io.load_clean(path, path.parent)
    infer_shapes(clean)
    for candidate in plan(clean, Options(fuse_all=True)).candidates:
        scop = BuildScop()(candidate.micro_graph)
        if isinstance(scop, Scop):
            yield scop


def number(index: Index, values: Mapping[Atom, Index]) -> int:
    result = index.substitute(values).constant
    assert result is not None
    return result


def order(tree: Tree, domains: Mapping[str, tuple[Axis, ...]], extents: Mapping[Atom, Index]) -> list[Point]:
    """All points in the order that the tree runs them in."""

    def run(tree: Tree, fixed: Mapping[str, Mapping[Axis, int]]) -> Iterator[Point]:
        match tree:
            case Leaf(names):
                for name in names:
                    if name in fixed:
                        yield name, tuple(fixed[name][axis] for axis in domains[name])
            case Sequence(children, _):
                for child in children:
                    yield from run(child, fixed)
            case Band(members, _, child):
                ranges = [range(number(m.iterators[0][1].extent, extents)) for m in members]
                for point in itertools.product(*ranges):
                    inside: dict[str, Mapping[Axis, int]] = {}
                    for name, own in fixed.items():
                        axes = [m.of(name) for m in members]
                        if all(axis is not None or at == 0 for axis, at in zip(axes, point, strict=True)):
                            steps = zip(axes, point, strict=True)
                            inside[name] = {**own, **{a: at for a, at in steps if a is not None}}
                    yield from run(child, inside)

    return list(run(tree, {name: {} for name in domains}))


def elements(
    statement: Statement, point: tuple[int, ...], extents: Mapping[Atom, Index]
) -> tuple[Element, list[Element]]:
    """What a point writes, and what it reads of the tensors that statements write."""
    values: dict[Atom, Index] = {**extents}
    values |= {axis: Index.of(at) for axis, at in zip(statement.domain, point, strict=True)}
    written = (statement.target.name, tuple(number(i, values) for i in statement.indices))
    reads = [
        (load.tensor, tuple(number(i, values) for i in load.indices))
        for load in statement.block.loads
        if not load.tensor.startswith("in")
    ]
    return written, reads


def check(scop: Scop, fused: Fused) -> None:
    extents: dict[Atom, Index] = {e.symbol: Index.of(3 + n) for n, e in enumerate(scop.extents)}
    statements = {s.name: s for s in scop.statements}
    domains = {name: s.domain for name, s in statements.items()}
    every = {
        (name, point)
        for name, domain in domains.items()
        for point in itertools.product(*(range(number(i.extent, extents)) for i in domain))
    }
    points = order(fused.tree, domains, extents)
    assert len(points) == len(every) and set(points) == every
    left: dict[Element, int] = {}
    for name, point in points:
        written, _ = elements(statements[name], point, extents)
        left[written] = left.get(written, 0) + 1
    for name, point in points:
        written, reads = elements(statements[name], point, extents)
        assert not any(left.get(element, 0) for element in reads), f"{name}{point} reads too early"
        left[written] -= 1


@settings(max_examples=40)
@given(models(most_nodes=8))
def test_schedules_keep_every_dependence(model: RandomModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = list(scops(model, folder))
    assume(found)
    for scop in found:
        fused = LoopFusion()(scop)
        if isinstance(fused, Refused):
            continue
        check(scop, fused)
