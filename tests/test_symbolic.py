"""Extents that follow from others, and kernels over them at many extents, 0 and 1 among them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apollo_fuse import onnx_io
from apollo_fuse.extents import at_least_zero, evaluate, greatest, least, quotient, sliced
from apollo_fuse.index import Index, Symbol
from apollo_fuse.symbolic import infer_shapes, values_of
from models.writing import Graph
from tests.fusing import fuse_to_session

A, B = Symbol("a"), Symbol("b")
_END = 2**63 - 1


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def scalar(number: int) -> np.ndarray:
    return np.array(number, np.int64)


@st.composite
def extents(draw: st.DrawFn, depth: int = 3) -> tuple[Index, Callable[[int, int], int]]:
    """An index over two extents, and the function that it stands for."""
    if depth == 0 or draw(st.booleans()):
        number = draw(st.integers(-4, 9))
        leaves: list[tuple[Index, Callable[[int, int], int]]] = [
            (Index.of(A), lambda a, b: a),
            (Index.of(B), lambda a, b: b),
            (Index.of(number), lambda a, b: number),
        ]
        return draw(st.sampled_from(leaves))
    (left, f), (right, g) = draw(extents(depth - 1)), draw(extents(depth - 1))
    match draw(st.sampled_from(["+", "-", "*", "//", "min", "max"])):
        case "+":
            return left + right, lambda a, b: f(a, b) + g(a, b)
        case "-":
            return left - right, lambda a, b: f(a, b) - g(a, b)
        case "*":
            return left * right, lambda a, b: f(a, b) * g(a, b)
        case "//":
            divisor = draw(st.integers(1, 5))
            return quotient(left, divisor), lambda a, b: f(a, b) // divisor
        case "min":
            found = least(left, right)
            return (left, f) if found is None else (found, lambda a, b: min(f(a, b), g(a, b)))
        case _:
            found = greatest(left, right)
            return (left, f) if found is None else (found, lambda a, b: max(f(a, b), g(a, b)))


@given(extents(), st.integers(0, 12), st.integers(0, 12))
def test_extents_are_what_their_formulas_come_to(
    made: tuple[Index, Callable[[int, int], int]], a: int, b: int
) -> None:
    index, expected = made
    assert evaluate(index, {A: a, B: b}) == expected(a, b)
    assert not at_least_zero(index) or expected(a, b) >= 0
    for symbol in index.symbols() - {A, B}:
        found = evaluate(Index.of(symbol), {A: a, B: b})
        assert found is not None and found >= 0


@given(
    st.integers(0, 8),
    st.integers(-9, 9),
    st.one_of(st.none(), st.integers(-9, 9)),
    st.sampled_from([1, 2, 3, -1, -2]),
)
def test_a_slice_along_an_open_axis_is_the_one_that_python_takes(
    extent: int, start: int, end: int | None, step: int
) -> None:
    found = sliced(Index.of(A), Index.of(start), None if end is None else Index.of(end), step)
    places = range(extent)[slice(start, end, step)]
    if found is None:
        assert step < 0
        return
    first, length = (evaluate(index, {A: extent}) for index in found)
    assert length == len(places)
    assert not places or first == places[0]


def identity(graph: Graph, value: str, shape: Sequence[str | int]) -> None:
    graph.output(graph.op("Identity", value), f"out_{value}", shape)


def dim(graph: Graph, value: str, axis: int) -> str:
    return graph.op("Gather", graph.op("Shape", value), scalar(axis), axis=0)


def one(graph: Graph, value: str) -> str:
    return graph.op("Unsqueeze", value, ints(0))


def open_slices() -> onnx.ModelProto:
    graph = Graph("slices")
    x = graph.input("x", ["n", "m"])
    bounds = [(1, _END, 1), (0, -1, 1), (2, -2, 1), (-3, _END, 1), (0, 4, 1), (1, _END, 2), (-1, -_END, -1)]
    for start, end, step in bounds:
        taken = graph.op("Slice", x, ints(start), ints(end), ints(1), ints(step))
        value = graph.op("Mul", graph.op("Exp", taken), 0.5)
        graph.output(
            value, f"from_{start}_to_{end}_by_{step}".replace("-", "minus_"), ["n", f"k{start}{end}"]
        )
    return graph.model()


def differences() -> onnx.ModelProto:
    graph = Graph("differences")
    x = graph.input("x", ["n", "m"])
    later, earlier = (
        graph.op("Slice", x, ints(1), ints(_END), ints(1)),
        graph.op("Slice", x, ints(0), ints(-1), ints(1)),
    )
    change = graph.op("Abs", graph.op("Sub", later, earlier))
    graph.output(
        graph.op("Concat", graph.op("Slice", x, ints(0), ints(1), ints(1)), change, axis=1), "out", ["n", "k"]
    )
    return graph.model()


def halves() -> onnx.ModelProto:
    graph = Graph("halves")
    x = graph.input("x", ["n", "m"])
    half = one(graph, graph.op("Div", dim(graph, x, 1), scalar(2)))
    first = graph.op("Relu", graph.op("Slice", x, ints(0), half, ints(1)))
    second = graph.op("Tanh", graph.op("Slice", x, half, ints(_END), ints(1)))
    graph.output(graph.op("Concat", second, first, axis=1), "out", ["n", "m"])
    return graph.model()


def positions() -> onnx.ModelProto:
    graph = Graph("positions")
    x = graph.input("x", ["n", "m", 4])
    table = graph.weight("table", np.linspace(-2, 2, 48, dtype=np.float32).reshape(1, 12, 4))
    taken = graph.op("Slice", table, ints(0), one(graph, dim(graph, x, 1)), ints(1))
    graph.output(graph.op("Relu", graph.op("Add", x, taken)), "out", ["n", "m", 4])
    return graph.model()


def split_rows() -> onnx.ModelProto:
    """Extents that no dimension of the flat tensor has on its own come from the shape that it is given."""
    graph = Graph("split_rows")
    x = graph.input("x", ["n", "m", 8])
    flat = graph.op("MatMul", graph.op("Reshape", x, ints(-1, 8)), np.eye(8, dtype=np.float32))
    size = graph.op("Concat", one(graph, dim(graph, x, 0)), one(graph, dim(graph, x, 1)), ints(2, 4), axis=0)
    parts = graph.op("Transpose", graph.op("Reshape", graph.op("Relu", flat), size), perm=[0, 2, 1, 3])
    graph.output(graph.op("Mul", parts, 0.5), "out", ["n", 2, "m", 4])
    return graph.model()


def expanded() -> onnx.ModelProto:
    """The way torch writes expand(b, 1, s, s), where -1 would keep an extent."""
    graph = Graph("expanded")
    x = graph.input("x", ["n", "m"])
    n, m = one(graph, dim(graph, x, 0)), one(graph, dim(graph, x, 1))
    target = graph.op("Concat", n, ints(1), m, m, axis=0)
    ones = np.ones(4, np.int64)
    size = graph.op("Where", graph.op("Equal", target, -ones), ones, target)
    wide = graph.op("Expand", graph.op("Unsqueeze", x, ints(1, 2)), size)
    graph.output(graph.op("Mul", graph.op("Sub", 1.0, wide), -3.0), "out", ["n", 1, "m", "m"])
    return graph.model()


SIZES = [(2, 6), (1, 1), (3, 1), (2, 5), (1, 12), (2, 0), (0, 3), (2, 2), (3, 3)]
MODELS: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[int, ...]]] = {
    "open_slices": (open_slices, ()),
    "differences": (differences, ()),
    "halves": (halves, ()),
    "positions": (positions, (4,)),
    "split_rows": (split_rows, (8,)),
    "expanded": (expanded, ()),
}


def feed(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)}


@pytest.mark.parametrize("name", MODELS)
def test_kernels_agree_at_every_extent(name: str, tmp_path: Path, cache: Path) -> None:
    make, more = MODELS[name]
    fused = fuse_to_session(make(), tmp_path, cache, shapes={"x": (2, 6, *more)})
    assert fused.report.fused_nodes > 0
    for size in SIZES:
        if name == "split_rows" and 0 in size:
            continue  # onnxruntime itself refuses to find -1 where an extent is 0
        for expected, found in fused.run(feed(*size, *more)).values():
            assert expected.shape == found.shape, size
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_sequence_that_is_longer_than_the_table_is_an_error_as_it_was(tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(positions(), tmp_path, cache, shapes={"x": (2, 6, 4)})
    for session in (fused.original, fused.fused):
        with pytest.raises(Exception, match="broadcast|expected equal"):
            session.run(None, feed(2, 13, 4))


def test_an_extent_of_0_that_a_reshape_would_take_from_its_operand_is_an_error(
    tmp_path: Path, cache: Path
) -> None:
    graph = Graph("copies")
    x = graph.input("x", ["n", "m", 8])
    n, m = dim(graph, x, 0), dim(graph, x, 1)
    rows = graph.op("Concat", one(graph, graph.op("Mul", n, m)), ints(8), axis=0)
    flat = graph.op("MatMul", graph.op("Reshape", x, rows), np.eye(8, dtype=np.float32))
    size = graph.op("Concat", one(graph, n), one(graph, m), ints(2, 4), axis=0)
    graph.output(graph.op("Exp", graph.op("Reshape", graph.op("Relu", flat), size)), "out", ["n", "m", 2, 4])
    fused = fuse_to_session(graph.model(), tmp_path, cache, shapes={"x": (2, 6, 8)})
    ((expected, found),) = fused.run(feed(0, 3, 8)).values()
    assert expected.shape == found.shape == (0, 3, 2, 4)
    assert fused.original.run(None, feed(0, 0, 8))[0].shape == (0, 8, 2, 4)
    with pytest.raises(Exception, match="expected equal"):
        fused.fused.run(None, feed(0, 0, 8))


def shapes_of(model: onnx.ModelProto, folder: Path) -> Mapping[str, str]:
    """The shape of every output, as it was inferred."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    clean = onnx_io.load_clean(path, path.parent)
    infer_shapes(clean)
    known = values_of(clean.graph)
    return {
        str(v.name): str(known[v]).partition("[")[2][:-1] if v in known else "?" for v in clean.graph.outputs
    }


def test_of_two_open_extents_none_is_taken_for_their_broadcast(tmp_path: Path, cache: Path) -> None:
    graph = Graph("two")
    a, b = graph.input("a", ["n", 4]), graph.input("b", ["m", 4])
    total = graph.op("MatMul", graph.op("Add", a, b), np.eye(4, dtype=np.float32))
    graph.output(graph.op("Add", graph.op("Exp", graph.op("Mul", total, 0.5)), 1.0), "out", ["k", 4])
    model = graph.model()
    assert shapes_of(model, tmp_path)["out"].split(", ")[0] not in ("s0", "s1")
    fused = fuse_to_session(model, tmp_path, cache, shapes={"a": (1, 4), "b": (3, 4)})
    for rows in ((1, 3), (3, 1), (2, 2), (1, 0)):
        feeds = {name: np.ones((n, 4), np.float32) for name, n in zip("ab", rows, strict=True)}
        ((expected, found),) = fused.run(feeds).values()
        assert expected.shape == found.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def twice(graph: Graph, x: str) -> str:
    return graph.op("Resize", x, "", np.array([2, 1], np.float32), mode="nearest")


@pytest.mark.parametrize("operator", ["Add", "Where", "Expand"])
def test_an_extent_that_cannot_be_1_is_that_of_the_broadcast(
    operator: str, tmp_path: Path, cache: Path
) -> None:
    """What lies beside twice as many rows as there are has as many, or one."""
    graph = Graph("pyramid")
    a, b = graph.input("a", ["n", 4]), graph.input("b", ["m", 4])
    fine, coarse = graph.op("Exp", b), twice(graph, a)
    match operator:
        case "Add":
            joined = graph.op("Add", fine, coarse)
        case "Where":
            joined = graph.op("Where", graph.op("Greater", coarse, 0.5), fine, 2.0)
        case _:
            joined = graph.op("Expand", fine, graph.op("Shape", coarse))
    graph.output(graph.op("Abs", joined), "out", ["k", 4])
    model = graph.model()
    assert shapes_of(model, tmp_path)["out"] == "2*s0, 4"
    fused = fuse_to_session(model, tmp_path, cache, shapes={"a": (3, 4), "b": (6, 4)})
    assert not fused.unfused_nodes or operator == "Expand"
    for rows in ((3, 6), (3, 1), (40, 80), (40, 1), (0, 0), (0, 1)):
        feeds = {name: feed(n, 4)["x"] for name, n in zip("ab", rows, strict=True)}
        ((expected, found),) = fused.run(feeds).values()
        assert expected.shape == found.shape == (2 * rows[0], 4)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    for session in (fused.original, fused.fused):
        with pytest.raises(Exception, match="roadcast|expected equal|incompatible|invalid expand"):
            session.run(None, {"a": np.ones((3, 4), np.float32), "b": np.ones((5, 4), np.float32)})


def test_a_rounded_scale_makes_an_extent_of_its_own(tmp_path: Path, cache: Path) -> None:
    """In single precision 25 times 0.04 is 1, and exactly a little less, as that 0.04 is."""
    graph = Graph("thumbnail")
    x = graph.input("x", ["n", 64])
    small = graph.op("Resize", x, "", np.array([0.04, 1], np.float32), mode="nearest")
    parts = [graph.op("Sigmoid", graph.op("Exp", part)) for part in (x, small)]
    graph.output(graph.op("Tanh", graph.op("Concat", *parts, axis=0)), "out", ["k", 64])
    fused = fuse_to_session(graph.model(), tmp_path, cache, shapes={"x": (100, 64)})
    assert fused.unfused_nodes == ("Resize",)
    for rows, found in ((25, 26), (24, 24), (100, 104), (725, 754)):
        ((one, other),) = fused.run(feed(rows, 64)).values()
        assert one.shape == other.shape == (found, 64)
        np.testing.assert_allclose(other, one, rtol=1e-5)


def test_extents_that_keep_an_aspect_ratio_are_not_known(tmp_path: Path) -> None:
    graph = Graph("aspect")
    x = graph.input("x", ["n", 4])
    sizes = np.array([6, 8], np.int64)
    aspect = {"mode": "nearest", "keep_aspect_ratio_policy": "not_larger"}
    graph.output(graph.op("Exp", graph.op("Resize", x, "", "", sizes, **aspect)), "out", ["k", "l"])
    assert "8" not in shapes_of(graph.model(), tmp_path)["out"]


def test_two_extents_that_cannot_be_1_are_broadcast_where_they_agree(tmp_path: Path) -> None:
    graph = Graph("two_pyramids")
    a, b = graph.input("a", ["n", 4]), graph.input("b", ["m", 4])
    total = graph.op("Add", twice(graph, twice(graph, a)), twice(graph, b))
    graph.output(graph.op("Mul", graph.op("Exp", total), twice(graph, b)), "out", ["k", 4])
    assert shapes_of(graph.model(), tmp_path)["out"] == "4*s0, 4"


def test_what_a_valid_run_makes_equal_is_one_extent(tmp_path: Path) -> None:
    graph = Graph("equal")
    a, b = graph.input("a", ["n", 4]), graph.input("b", ["m", 4])
    both = graph.op("Concat", a, b, axis=1)
    graph.output(
        graph.op("Mul", graph.op("Exp", a), graph.op("Slice", both, ints(4), ints(8), ints(1))),
        "out",
        ["k", 4],
    )
    assert shapes_of(graph.model(), tmp_path)["out"] == "s0, 4"


def test_a_squeeze_without_axes_leaves_the_rank_open(tmp_path: Path) -> None:
    graph = Graph("squeeze")
    graph.output(graph.op("Squeeze", graph.op("Exp", graph.input("x", ["n", 1, "m"]))), "out", None)  # type: ignore[arg-type]
    assert shapes_of(graph.model(), tmp_path)["out"] == "?"


@pytest.mark.parametrize(
    ("operator", "inferred", "sizes"),
    [("Tile", "[^,]+, [^,]+", [(1, 2), (3, 1)]), ("Expand", "[^,]+, 4", [(3, 1), (1, 4)])],
)
def test_the_rank_is_known_where_extents_are_not(
    operator: str, inferred: str, sizes: list[tuple[int, int]], tmp_path: Path, cache: Path
) -> None:
    """The model asks for it, as exporters do of what they scatter to, and adds up an axis of that."""
    graph = Graph("rank")
    x, size = (
        graph.input("x", [1 if operator == "Expand" else "n", 4]),
        graph.input("size", [2], onnx.TensorProto.INT64),
    )
    large = graph.op(operator, x, size)
    base = graph.op("ConstantOfShape", graph.op("Shape", large))
    rank = graph.op("Size", graph.op("Shape", base))
    total = graph.op("Add", graph.op("Exp", large), graph.op("Cast", rank, to=onnx.TensorProto.FLOAT))
    graph.output(graph.op("Mul", total, large), "out", ["k", "l"])
    model = graph.model()
    assert re.fullmatch(inferred, shapes_of(model, tmp_path)["out"])
    feeds = [{"x": feed(1, 4)["x"], "size": np.array(one, np.int64)} for one in sizes]
    fused = fuse_to_session(model, tmp_path, cache, given=feeds[0])
    assert not {"Size", "Cast", "ConstantOfShape"} & {*fused.unfused_nodes}
    for one in feeds:
        ((expected, found),) = fused.run(one).values()
        assert expected.shape == found.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_a_loop_stacks_keeps_its_rank_where_none_runs(tmp_path: Path, cache: Path) -> None:
    """Onnxruntime sees no rank behind a kernel in a body, so none is inferred there that was not before."""
    text = """<ir_version: 8, opset_import: ["": 17]>
      g (float[2, 1] x, int64 n, bool c, int64[2] t0) => (float w) {
        tt, y = Loop <body = b (int64 i, bool go, int64[2] t) => (bool more, int64[2] to, float e) {
          f = Expand(x, t) e = Exp(f) to = Add(t, t) more = Identity(go)
        }> (n, c, t0) z = Exp(y) w = Mul(z, z) }"""
    model = onnx.parser.parse_model(text)
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    for value in (model.graph.output[0], loop.attribute[0].g.output[2]):
        value.type.tensor_type.ClearField("shape")
    feeds = {"x": feed(2, 1)["x"], "c": np.array(True), "t0": np.array([2, 2])}
    fused = fuse_to_session(model, tmp_path, cache, given={**feeds, "n": np.array(1)})
    for count in (1, 0):
        ((expected, found),) = fused.run({**feeds, "n": np.array(count)}).values()
        assert expected.shape == found.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_never_runs_need_not_fit(tmp_path: Path, cache: Path) -> None:
    """A branch that is not taken, as captured tensors show, would end in an error."""
    text = """<ir_version: 8, opset_import: ["": 17]>
      g (float[1, 1, 1] x, int64[3] size, bool c) => (float[P, Q, R] y) <int64[2] other = {3, 3}> {
        r = Expand(x, size) e = Exp(r) v = Mul(e, e) z = If (c) <
          then_branch = a () => (float[P, Q, R] p) { k = Expand(v, other) m = Exp(k) p = Mul(m, k) },
          else_branch = b () => (float[P, Q, R] q) { q = Identity(v) }> y = Abs(z) }"""
    feeds = {"x": feed(1, 1, 1)["x"], "size": np.array([3, 5, 4]), "c": np.array(False)}
    fused = fuse_to_session(onnx.parser.parse_model(text), tmp_path, cache, given=feeds)
    ((expected, found),) = fused.run(feeds).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_slice_says_its_bounds_in_attributes(tmp_path: Path) -> None:
    """As those of the first opsets do."""
    text = """<ir_version: 4, opset_import: ["": 9]> g (float[N, 8, M] x) => (float[a, b, c] out) {
      y = Slice <starts = [1, 0], ends = [-2, 2147483647], axes = [1, 2]> (x) out = Exp (y)
    }"""
    assert shapes_of(onnx.parser.parse_model(text), tmp_path)["out"] == "s0, 5, s1"


def test_arithmetic_on_shapes_is_folded(tmp_path: Path) -> None:
    graph = Graph("folded")
    x = graph.input("x", ["n", "m", 6])
    n, m = dim(graph, x, 0), dim(graph, x, 1)
    rest = graph.op("Sub", m, graph.op("Mul", graph.op("Div", m, scalar(4)), scalar(4)))
    parts = [
        graph.op("Mod", m, scalar(4)),
        graph.op("Max", n, scalar(0)),
        graph.op("Cast", graph.op("Cast", n, to=onnx.TensorProto.INT32), to=onnx.TensorProto.INT64),
        graph.op("ReduceProd", graph.op("Shape", x), keepdims=0),
        graph.op("Min", m, graph.op("Add", m, n)),
    ]
    sizes = graph.op("Concat", one(graph, rest), *(one(graph, p) for p in parts), axis=0)
    graph.output(graph.op("ConstantOfShape", sizes), "out", ["a", "b", "c", "d", "e", "f"])
    remainder = "-4*floor((s1) / 4) + s1"
    assert shapes_of(graph.model(), tmp_path)["out"] == f"{remainder}, {remainder}, s0, s0, 6*s0*s1, s1"
