"""What need not be computed in each iteration of a loop is computed once, and everything is as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from apollo_fuse.bodies import bodies, nodes
from apollo_fuse.layout import Layout, cut, load_clean_at
from apollo_fuse.tolerance import compare
from tests.fusing import assert_agrees, fuse_to_session, op_types, with_shapes
from tests.test_end_to_end import normal, text_model

WEIGHTS = {
    "w": normal(16, 8),
    "v": normal(16, 8),
    "turned": normal(8, 16),
    "narrow": normal(1, 64),
    "column": normal(3, 5, 1),
    "r": normal(8, 8),
    "b": normal(8),
    "few": np.array(3, np.int32),
    "zero": np.array(0),
    "one": np.array(1),
    "four": np.array(4),
    "ones": np.array([1]),
    "zeros": np.array([0]),
}
X = normal(5, 3, 16)


def loop(body: str, *states: tuple[str, str, str], x: str = "T, B, 16") -> onnx.ModelProto:
    """A recurrent network: `body` makes p of a row of x.

    Each state has a declaration, what it starts from, and what follows it.
    """
    declared, starts, follow = ("".join(f", {state[n]}" for state in states) for n in range(3))
    ends = "".join(f", q{n}" for n in range(len(states)))
    return text_model(
        f"g (float[{x}] x, int64 n, float[B, 8] h, int64[T] ids) => (float[B, 8] y, float[S, B, 8] all) {{ "
        f"yes = Constant <value = bool {{1}}> () y{ends}, all = Loop (n, yes, h{starts}) "
        f"<body = b (int64 i, bool go, float[B, 8] s{declared}) => "
        f"(bool more, float[B, 8] o{follow}, float[B, 8] k) "
        f"{{ more = Identity(go) {body} u = MatMul(s, r) d = Add(p, u) o = Tanh(d) k = Identity(o) }}> }}",
        **WEIGHTS,
    )


def products(model: ir.Model) -> tuple[int, int]:
    """How many there are outside of the loop, and in it."""
    kinds = ("MatMul", "Gemm")
    outside = sum(node.op_type in kinds for node in model.graph)
    return outside, sum(op_types(model)[kind] for kind in kinds) - outside


def inside(model: ir.Model) -> list[str]:
    """The operators of the one loop's body."""
    (node,) = (node for node in nodes(model.graph) if node.op_type in ("Loop", "Scan"))
    return [node.op_type for node in bodies(node)[0]]


def feeds(count: int, x: np.ndarray = X) -> dict[str, np.ndarray]:
    return {"x": x, "n": np.array(count), "h": normal(3, 8), "ids": np.array([3, 1, 1, 0, 2])}


# -- Loop ---------------------------------------------------------------------------------------------

ROWS = {
    "by the iteration's number": "e = Gather(x, i) p = MatMul(e, w)",
    "from the end": "j = Sub(four, i) e = Gather(x, j) p = MatMul(e, w)",
    "by a number of another type": "c = Cast <to = 6> (i) j = Add(c, few) t = Sub(j, few) e = Gather(x, t) "
    "p = MatMul(e, w)",
    "with weights of the body": "e = Gather(x, i) l = ReduceMax(e, ones) c = Constant <value = float[1, 8] "
    "{1, 2, 3, 4, 5, 6, 7, 8}> () m = MatMul(l, c) q = MatMul(e, w) p = Add(m, q)",
    "with a bias": "e = Gather(x, i) p = Gemm(e, w, b)",
    "with weights that are turned": "e = Gather(x, i) p = Gemm <transB = 1> (e, turned, b)",
    "with weights that the body turns": "t = Transpose <perm = [1, 0]> (turned) e = Gather(x, i) "
    "p = MatMul(e, t)",
    "that is needed besides": "e = Gather(x, i) m = MatMul(e, w) l = ReduceMax(e, ones) p = Mul(m, l)",
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_multiplied_before_the_loop(name: str, tmp_path: Path) -> None:
    model = loop(ROWS[name])
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (1, 2 if name == "with weights of the body" else 1)
    assert "Transpose" not in inside(clean)
    assert_agrees(clean, model, *(feeds(count) for count in (0, 1, 5)))


def test_each_product_of_a_row_is_taken_out(tmp_path: Path) -> None:
    model = loop("e = Gather(x, i) m = MatMul(e, w) l = MatMul(e, v) p = Mul(m, l)")
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (2, 1)
    assert inside(clean).count("Gather") == 2
    assert_agrees(clean, model, feeds(5))


def test_rows_may_lie_along_a_later_axis(tmp_path: Path) -> None:
    model = loop("e = Gather <axis = 1> (x, i) p = MatMul(e, w)", x="B, T, 16")
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (1, 1)
    assert_agrees(clean, model, feeds(5, normal(3, 5, 16)))


@pytest.mark.parametrize(("step", "start"), [("Add(at, one)", "zero"), ("Sub(at, one)", "four")])
def test_a_state_may_count_the_rows(step: str, start: str, tmp_path: Path) -> None:
    model = loop(f"e = Gather(x, at) p = MatMul(e, w) on = {step}", ("int64 at", start, "int64 on"))
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (1, 1)
    assert_agrees(clean, model, feeds(5), feeds(2))


LEFT = {
    "a place that data decides": ["t = Gather(ids, i) e = Gather(x, t) p = MatMul(e, w)"],
    "a state that does not count": [
        "e = Gather(x, at) p = MatMul(e, w) on = Mul(at, at)", ("int64 at", "one", "int64 on"),
    ],
    "weights that change": [
        "e = Gather(x, i) p = MatMul(e, m) on = Tanh(m)", ("float[16, 8] m", "w", "float[16, 8] on"),
    ],
    "rows of what changes": [
        "e = Gather(m, i) p = MatMul(e, w) on = Tanh(m)", ("float[T, B, 16] m", "x", "float[T, B, 16] on"),
    ],
    "a product that is far larger": [
        "c = Gather <axis = 1> (z, at) l = MatMul(c, narrow) m = ReduceMax <keepdims = 0> (l) p = Add(m, b) "
        "on = Add(at, one)",
        ("int64 at", "zero", "int64 on"), ("float[B, T, 1] z", "column", "float[B, T, 1] z"),
    ],
    "a weight that is a result": [
        f"e = Gather(x, i) c = Constant <value = float[16, 8] {{{', '.join(['0.5'] * 128)}}}> () "
        "p = MatMul(e, c)",
        ("float[16, 8] l", "w", "float[16, 8] c"),
    ],
    "half of a product": ["e = Gather(x, i) p = Gemm <alpha = 0.5> (e, w)"],
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_a_product_stays_in_the_loop(name: str, tmp_path: Path) -> None:
    """Where it is not one of rows that are there before, each read once, or would take much memory."""
    model = loop(*LEFT[name])  # type: ignore[arg-type]
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (0, 2)
    assert_agrees(clean, model, feeds(3))


def test_products_along_the_axis_of_the_rows_stay(tmp_path: Path) -> None:
    model = loop("e = Gather <axis = 2> (x, i) p = MatMul(e, w)", x="B, 16, 16")
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (0, 2)
    assert_agrees(clean, model, feeds(5, normal(3, 16, 16)))


@pytest.mark.parametrize(("trips", "left"), [(1, 2), (2, 1)])
def test_products_of_many_rows_of_which_few_are_read_stay(trips: int, left: int, tmp_path: Path) -> None:
    body = (
        "<body = b (int64 i, bool go, float[8] s) => (bool more, float[8] o) "
        "{ more = Identity(go) e = Gather(x, i) p = MatMul(e, w) u = MatMul(s, r) d = Add(p, u) "
        "o = Tanh(d) }>"
    )
    model = text_model(
        f"g (float[16, 16] x, float[8] h) => (float[8] y) {{ y = Loop (trips, , h) {body} }}",
        **WEIGHTS,
        trips=np.array(trips),
    )
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (2 - left, left)
    assert_agrees(clean, model, {"x": normal(16, 16), "h": normal(8)})


SAME = {
    "a product": "m = MatMul(x, w)",
    "all that is made of one": "j = MatMul(x, w) a = Add(j, b) t = Tanh(a) "
    "q = Transpose <perm = [1, 0, 2]> (t) m = Transpose <perm = [1, 0, 2]> (q)",
    "a product of the body's weights": "c = Constant <value = float[16, 1] "
    f"{{{', '.join(map(str, range(16)))}}}> () m = MatMul(x, c)",
    "a product of two axes": "j = MatMul(h, r) m = Gemm <transB = 1> (j, square, b)",
}


@pytest.mark.parametrize("name", SAME)
def test_what_each_iteration_would_compute_anew_is_computed_once(name: str, tmp_path: Path) -> None:
    read = "f = Identity(m) l = Gather(x, i) e = ReduceMax(l, ones)" if "two" in name else "e = Gather(m, i)"
    model = loop(f"{SAME[name]} {read} p = Add(e, {'f' if 'two' in name else 'b'})")
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(8, 8), "square"))
    clean = with_shapes(model, tmp_path)
    assert products(clean)[1] == 1
    assert "Transpose" not in inside(clean) and inside(clean).count("Tanh") == 1
    assert_agrees(clean, model, *(feeds(count) for count in (0, 1, 5)))


LEFT_INSIDE = ("MatMul", "Add", "Div", "Transpose")


@pytest.mark.parametrize(
    "made",
    [
        "m = MatMul(x, other)",  # whether it has 16 rows is not known
        "m = Add(x, row)",
        "m = MatMul(thin, narrow)",
        "m = Add(x, like)",  # of the same names, and other extents
        "m = Transpose <perm = [1, 0, 2]> (turned)",  # of three axes or not
        "c = Div(count, by) t = Cast <to = 1> (c) m = Mul(x, t)",
    ],
)
def test_what_might_fail_or_take_much_memory_is_computed_where_it_was(made: str, tmp_path: Path) -> None:
    model = loop(f"{made} q = Gather(m, i) e = ReduceMax(q, ones) p = Add(e, b)")
    for name, kind, shape in (
        ("other", 1, ["K", 8]),
        ("row", 1, ["L"]),
        ("thin", 1, ["T", "B", 1]),
        ("like", 1, ["T", "B", 16]),
        ("count", 7, []),
        ("by", 7, []),
        ("shape", 7, ["R"]),
    ):
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, shape))
    model.graph.node.insert(0, onnx.helper.make_node("Reshape", ["x", "shape"], ["turned"]))
    del model.graph.initializer[[x.name for x in model.graph.initializer].index("turned")]
    clean = with_shapes(model, tmp_path)
    assert [node.op_type for node in clean.graph if node.op_type in LEFT_INSIDE] == []
    unfit = {"other": normal(3, 8), "row": normal(7), "thin": normal(5, 3, 1)}
    unfit |= {"count": np.array(3), "by": np.array(0), "like": normal(5, 2, 16), "shape": np.array([15, 16])}
    assert_agrees(clean, model, feeds(0) | unfit)


def test_what_a_loop_stacks_keeps_its_shape_where_none_runs(tmp_path: Path) -> None:
    model = text_model(
        "g (float[T, B, 16] x, int64 n) => (float[S, 3, 8] y) { yes = Constant <value = bool {1}> () "
        "y = Loop (n, yes) <body = b (int64 i, bool go) => (bool more, float[3, 8] k) "
        "{ more = Identity(go) e = Gather(x, i) k = MatMul(e, w) }> }",
        **WEIGHTS,
    )
    onnx.save(model, tmp_path / "model.onnx")
    found = cut(load_clean_at(tmp_path / "model.onnx", Layout.PORTABLE, tmp_path), Layout.PORTABLE)
    assert products(found.clean) == (1, 0) and found.rewritten
    assert_agrees(found.clean, model, *({"x": X, "n": np.array(count)} for count in (0, 3)))


def test_what_may_fail_stays_in_a_loop_that_may_not_run(tmp_path: Path) -> None:
    model = text_model(
        "g (float[B, 8] h, int64 n, string[1] q) => (float[B, 8] y) { yes = Constant <value = bool {1}> () "
        "y = Loop (n, yes, h) <body = b (int64 i, bool go, float[B, 8] s) => (bool more, float[B, 8] o) "
        "{ more = Identity(go) t = Cast <to = 1> (q) o = Add(s, t) }> }"
    )
    clean = with_shapes(model, tmp_path)
    assert_agrees(clean, model, {"h": normal(3, 8), "n": np.array(0), "q": np.array(["no number"], object)})


def test_what_leaves_a_loop_leaves_the_one_around_it(tmp_path: Path) -> None:
    model = text_model(
        "g (float[3, 8] h, int64 n, int64[3, 8] q) => (float[3, 8] y) { yes = Constant <value = bool {1}> () "
        "y = Loop (n, yes, h) <body = b (int64 i, bool go, float[3, 8] s) => (bool more, float[3, 8] o) "
        "{ more = Identity(go) o = Loop (n, yes, s) <body = c (int64 j, bool on, float[3, 8] t) => "
        "(bool again, float[3, 8] u) { again = Identity(on) f = Cast <to = 1> (q) u = Add(t, f) }> }> }"
    )
    clean = with_shapes(model, tmp_path)
    assert [node.op_type for node in clean.graph] == ["Cast", "Loop"]
    assert_agrees(clean, model, {"h": normal(3, 8), "n": np.array(2), "q": np.arange(24).reshape(3, 8)})


def test_what_iterations_hand_on_is_read_from_outside(tmp_path: Path) -> None:
    """As TensorFlow's loops hand on their weights."""
    model = loop(
        "e = Gather(z, i) f = Cast <to = 1> (c) m = MatMul(e, l) p = Add(m, f) "
        "l2 = Identity(l) z2 = Identity(z)",
        ("float[16, 8] l", "w", "float[16, 8] l2"),
        ("float[T, B, 16] z", "x", "float[T, B, 16] z2"),
        ("int32 c", "few", "int32 c"),
    )
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (1, 1)
    assert "Cast" not in inside(clean)
    assert_agrees(clean, model, feeds(0), feeds(4))


def test_loops_of_the_same_names_and_bodies_in_bodies(cache: Path, tmp_path: Path) -> None:
    """The kernels compute the same as well."""
    body = (
        "<body = b (int64 i, bool go, float[3, 8] s, float[16, 8] l) => "
        "(bool more, float[3, 8] o, float[16, 8] l) "
        "{ more = Identity(go) e = Gather(x, i) f = Cast <to = 1> (few) m = MatMul(e, l) a = Mul(m, f) "
        "u = MatMul(s, r) d = Add(a, u) o = Tanh(d) }>"
    )
    model = text_model(
        "g (float[5, 3, 16] x, int64 n, float[3, 8] h, bool c) => (float[3, 8] y) { "
        f"yes = Constant <value = bool {{1}}> () y0, l0 = Loop (n, yes, h, w) {body} "
        f"y1, l1 = Loop (n, yes, y0, v) {body} y2 = If (c) <"
        f"then_branch = t () => (float[3, 8] z) {{ z, l2 = Loop (n, yes, y1, w) {body} }}, "
        "else_branch = f () => (float[3, 8] z) { z = Neg(y1) }> y = Tanh(y2) }",
        **WEIGHTS,
    )
    fused = fuse_to_session(model, tmp_path, cache)
    for condition in (True, False):
        case = {"x": X, "n": np.array(5), "h": normal(3, 8), "c": np.array(condition)}
        for name, (expected, found) in fused.run(case).items():
            assert not compare(name, expected, found).problem
    assert [op for op in fused.unfused_nodes if op != "If"] == ["MatMul", "Loop", "Gemm"] * 3


# -- Scan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("backwards", [0, 1])
def test_what_a_scan_reads_is_multiplied_before(axis: int, backwards: int, tmp_path: Path) -> None:
    sizes = "T, B, 16" if axis == 0 else "B, T, 16"
    model = text_model(
        f"g (float[{sizes}] x, float[T, B] z, float[B, 8] h) => (float[B, 8] y, float[T, B, 8] all) {{ "
        f"y, l0, all = Scan <num_scan_inputs = 2, scan_input_axes = [0, {axis}], "
        f"scan_input_directions = [0, {backwards}], "
        "body = b (float[B, 8] s, float[16, 8] l, float[B] f, float[B, 16] e) => "
        "(float[B, 8] o, float[16, 8] l2, float[B, 8] k) "
        "{ l2 = Identity(l) a = Gemm(e, l, b) k = MatMul(e, v) c = Tanh(k) p = Add(a, c) "
        "u = MatMul(s, r) d = Add(p, u) "
        "q = Unsqueeze(f, ones) t = Mul(d, q) o = Tanh(t) }> (h, w, z, x) }",
        **WEIGHTS,
    )
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (2, 1)
    case = {"x": X if axis == 0 else normal(3, 5, 16), "z": normal(5, 3), "h": normal(3, 8)}
    assert_agrees(clean, model, case)


def test_a_scan_along_the_last_axis_multiplies_inside(tmp_path: Path) -> None:
    model = text_model(
        "g (float[B, 16, T] x, float[B, 8] h) => (float[B, 8] y) { y = Scan <num_scan_inputs = 1, "
        "scan_input_axes = [-1], body = b (float[B, 8] s, float[B, 16] e) => (float[B, 8] o) "
        "{ m = MatMul(e, w) d = Add(m, s) o = Tanh(d) }> (h, x) }",
        **WEIGHTS,
    )
    clean = with_shapes(model, tmp_path)
    assert products(clean) == (0, 1)
    assert_agrees(clean, model, {"x": normal(3, 16, 5), "h": normal(3, 8)})
