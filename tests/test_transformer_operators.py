"""Operators of transformers against onnxruntime: rotary positions, embeddings, gated activations and norms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.writing import Graph
from tests.fusing import fuse_to_session
from tests.test_operators import (
    KINDS,
    Case,
    Dims,
    Table,
    check,
    check_reduced,
    fused,
    ints,
    number_of,
    several,
    shapes,
    sized,
    values,
)

MICROSOFT = "com.microsoft"
ROWS = 16


def rotary(dtype: str) -> Table:
    """Of four heads of eight elements, whole and in part, by positions and without."""
    inputs: dict[str, tuple[str, Dims]] = {
        "x": (dtype, ["n", 5, 32]), "heads": (dtype, ["n", 4, 5, 8]),
        "ids": ("int64", ["n", 5]), "first": ("int64", [1]), "angles": (dtype, ["n", 5, 4]), "few": (dtype, ["n", 5, 2]),
    }  # fmt: skip
    tables = {"cos": (ROWS, 4), "sin": (ROWS, 4), "cos2": (ROWS, 2), "sin2": (ROWS, 2)}
    constants = {name: values(dtype, shape, seed) for seed, (name, shape) in enumerate(tables.items())}
    cases = [
        *(Case("RotaryEmbedding", reads, {"interleaved": pairs, **a}) for pairs in (0, 1) for reads, a in (
            ("x cos sin ids", {"num_heads": 4}), ("heads cos sin ids", {}), ("heads angles angles", {}),
            ("x few few", {"num_heads": 4, "rotary_embedding_dim": 4}), ("heads cos2 sin2 ids", {"rotary_embedding_dim": 4}),
        )),
        *(Case("RotaryEmbedding", reads, {"interleaved": pairs, **a}, MICROSOFT) for pairs in (0, 1) for reads, a in (
            ("x ids cos sin", {}), ("x first cos sin", {}), ("heads ids cos sin", {}), ("heads first cos sin", {}),
            ("x ids cos2 sin2", {"num_heads": 4, "rotary_embedding_dim": 4}),
        )),
    ]  # fmt: skip
    return Table(inputs, cases, constants)


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_rotary_positions(dtype: str, tmp_path: Path, cache: Path) -> None:
    table = rotary(dtype)
    model = fused(table, tmp_path, cache, shapes(sized(table, {"n": 2})))
    for n in (3, 1):
        ids = np.random.default_rng(n).integers(0, ROWS, (n, 5))
        check_reduced(model, sized(table, {"n": n}) | {"ids": ids, "first": np.array([n * 3])})


def test_a_position_beyond_the_table_is_an_error(tmp_path: Path, cache: Path) -> None:
    table = rotary("float32")
    cases = [case for case in table.cases if case.reads == "x ids cos sin"]
    model = fused(Table(table.inputs, cases, table.constants), tmp_path, cache, {"x": (2, 5, 32)})
    with pytest.raises(Exception, match=f"index {ROWS}"):
        model.fused.run(None, {"x": values("float32", (1, 5, 32)), "ids": np.full((1, 5), ROWS)})


def gated(dtype: str) -> Table:
    inputs: dict[str, tuple[str, Dims]] = {
        "x": (dtype, ["n", 6, 24]), "y": (dtype, ["n", 6, 24]), "gate": (dtype, ["n", 6, 1]), "branches": (dtype, ["n", 3, 8]),
    }  # fmt: skip
    constants = {f"s{n}": values(dtype, (n,)) for n in (8, 24)} | {"s38": values(dtype, (3, 8))}
    constants |= {"half": np.array(0.5, np.float32), "own": np.array(1.5, dtype)}
    cases = [
        Case("GatedAdd", "x y gate", domain=MICROSOFT), Case("ScaledSiLU", "x", domain=MICROSOFT),
        Case("ScaledSiLU", "x", {"alpha": 1.7}, MICROSOFT), Case("ScaledSiLU", "x half", domain=MICROSOFT), Case("ScaledSiLU", "x own", domain=MICROSOFT),
        Case("GatedRMSNorm", "x s8 y", domain=MICROSOFT), Case("GatedRMSNorm", "x s24 y", {"activation": "sigmoid", "epsilon": 0.1}, MICROSOFT),
        Case("BranchwiseRMSNorm", "branches", domain=MICROSOFT), Case("BranchwiseRMSNorm", "branches s8", domain=MICROSOFT),
        Case("BranchwiseRMSNorm", "branches s24", domain=MICROSOFT), Case("BranchwiseRMSNorm", "branches s38", domain=MICROSOFT),
        Case("BranchwiseRMSNorm", "x s24", {"num_branches": 3, "epsilon": 0.1}, MICROSOFT),
    ]  # fmt: skip
    return Table(inputs, cases, constants)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_gated_activations_and_norms(dtype: str, tmp_path: Path, cache: Path) -> None:
    table = gated(dtype)
    model = fused(table, tmp_path, cache, shapes(sized(table, {"n": 2})))
    for n in (3, 1):
        check_reduced(model, sized(table, {"n": n}))


EMBEDDED = {
    "all": ("ids segments words positions kinds w b mask places", ["a", "m", "s"]),
    "the sum": ("ids segments words positions kinds w b - -", ["a", "_m", "s"]),
    "shared places": ("ids segments words positions kinds w b - line", ["a", "_m"]),
    "no segments": ("ids - words positions - w b mask", ["a", "m"]),
    "no mask": ("ids segments words positions kinds w b", ["a", "_m"]),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_embeddings(name: str, tmp_path: Path, cache: Path) -> None:
    reads, writes = EMBEDDED[name]
    inputs: dict[str, tuple[str, Dims]] = {
        key: ("int32", ["n", 7]) for key in ("ids", "segments", "mask", "places")
    }
    inputs["line"] = ("int32", [1, 7])
    names = ["" if part == "-" else part for part in reads.split()]
    inputs = {key: value for key, value in inputs.items() if key in names}
    node = helper.make_node("EmbedLayerNormalization", names, writes, "case", domain=MICROSOFT, epsilon=1e-3)
    proto = several([node], inputs, [w for w in writes if w[0] != "_"])
    tables = {"words": (ROWS, 12), "positions": (ROWS, 12), "kinds": (8, 12), "w": (12,), "b": (12,)}
    weights = [(key, values("float32", shape)) for key, shape in tables.items() if key in names]
    proto.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in weights)
    model = fuse_to_session(proto, tmp_path, cache, shapes={"ids": (2, 7)})
    assert not model.unfused_nodes
    for n in (3, 1):
        feeds = {
            key: values(d, [n if e == "n" else int(e) for e in dims]) for key, (d, dims) in inputs.items()
        }
        check_reduced(model, {key: np.abs(x) % 8 for key, x in feeds.items()})


def others(dtype: str) -> Table:
    """The rest of com.microsoft's forms of ONNX operators, and of newer ones."""
    inputs: dict[str, tuple[str, Dims]] = {
        "x": (dtype, ["n", 4, 6]), "pairs": ("int64", ["m", 2]), "line": ("float32", ["n", 9]),
        "past": (dtype, ["n", 3, 6, 5]), "new": (dtype, ["n", 3, 2, 5]), "at": ("int64", ["n"]),
    }  # fmt: skip
    constants = ints(above=1, p=[0, 0, 2, 0, 0, 3], wide=[[0, 1, 0, 0, 0, 1]]) | {
        "second": np.array(1, np.int32)
    }
    constants |= {"v": np.array(7, dtype), "start": np.array(3, dtype), "limit": np.array(12, dtype)}
    cases = [
        Case("Trilu", "x above", domain=MICROSOFT), Case("Trilu", "x", {"upper": 0}, MICROSOFT),
        Case("Pad", "x p v", domain=MICROSOFT), Case("Pad", "x p", {"mode": "edge"}, MICROSOFT), Case("Pad", "x wide", {"mode": "reflect"}, MICROSOFT),
        Case("GatherND", "x pairs", domain=MICROSOFT), Case("ExpandDims", "x second", domain=MICROSOFT),
        Case("TensorScatter", "past new at"), Case("TensorScatter", "past new"),
        Case("TensorScatter", "past new at", {"mode": "circular"}), Case("TensorScatter", "past new at", {"axis": 2}),
        Case("GlobalLpPool", "past"), Case("GlobalLpPool", "past", {"p": 1}), Case("GlobalLpPool", "past", {"p": 3}),
    ]  # fmt: skip
    return Table(inputs, cases, constants)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16", "int64"))
def test_other_operators(dtype: str, tmp_path: Path, cache: Path) -> None:
    table = others(dtype)
    model = fused(table, tmp_path, cache, shapes(sized(table, {"n": 2, "m": 3})) | {"at": (2,)})
    for n in (3, 1):
        at = np.random.default_rng(n).integers(0, 5, n)
        pairs = np.stack([np.arange(n), np.arange(n) % 4], 1)
        check(model, sized(table, {"n": n, "m": n}) | {"at": at, "pairs": pairs})


def newest(dtype: str) -> Table:
    """Operators of opsets that came after the others' tables."""
    inputs: dict[str, tuple[str, Dims]] = {"x": (dtype, ["n", 4, 9]), "y": (dtype, ["n", 4, 9])}
    cases = [
        Case("CumProd", "x first"), Case("CumProd", "x last", {"exclusive": 1}), Case("CumProd", "x last", {"reverse": 1}),
        Case("SwiGLU", "x y"), Case("SwiGLU", "x y", {"alpha": 1.7}),
    ]  # fmt: skip
    return Table(inputs, cases, ints(first=1, last=-1), 28)


def bits(dtype: str) -> Table:
    """The bits of a type as each other type of as many."""
    alike = [
        k
        for k in (*KINDS, "bfloat16")
        if np.dtype(k).itemsize == np.dtype(dtype).itemsize and k not in (dtype, "bool")
    ]
    cases = [Case("BitCast", "x", {"to": number_of(kind)}) for kind in alike]
    return Table({"x": (dtype, ["n", 42])}, cases, opset=28)


@pytest.mark.parametrize(
    "dtype", ("float32", "float64", "float16", "bfloat16", "int64", "uint32", "int16", "uint8")
)
def test_bits_of_one_type_as_another(dtype: str, tmp_path: Path, cache: Path) -> None:
    """Numbers alone: those that are none may lose what else their bits say on the way."""
    table = bits(dtype)
    model = fused(table, tmp_path, cache)
    for n in (3, 1, 0):
        check(model, sized(table, {"n": n}), exact=True)
    if dtype in ("float32", "float64", "int64"):
        check(model, sized(table, {"n": 2}, special=True), exact=True)


@pytest.mark.parametrize("dtype", ("float32", "float64", "int32"))
def test_newest_operators(dtype: str, tmp_path: Path, cache: Path) -> None:
    table = newest(dtype)
    model = fused(table, tmp_path, cache, shapes(sized(table, {"n": 2})))
    for n in (3, 1):
        check_reduced(model, sized(table, {"n": n}))


def test_masks_of_open_extents_are_made_where_they_are_read(tmp_path: Path, cache: Path) -> None:
    """What a causal mask is made of: a filled square, cut along its diagonal, and positions."""
    graph = Graph("mask")
    x = graph.input("x", ["n", "m"])
    length = graph.op("Shape", x, start=1, end=2)
    square = graph.op("Concat", length, length, axis=0)
    lowest = graph.op("ConstantOfShape", square, value=numpy_helper.from_array(np.array([-1e9], np.float32)))
    zeros = graph.op("ConstantOfShape", square)
    ones = graph.op("ConstantOfShape", square, value=numpy_helper.from_array(np.array([1], np.int64)))
    first, step = np.array(0, np.int64), np.array(1, np.int64)
    places = graph.op("Range", first, graph.op("Squeeze", length), step)
    placed = graph.op("Cast", graph.op("Add", ones, places), to=TensorProto.FLOAT)
    mask = graph.op("Add", graph.op("Trilu", lowest, np.array(1, np.int64)), graph.op("Sub", zeros, placed))
    graph.output(
        graph.op("Add", graph.op("Unsqueeze", x, np.array([1], np.int64)), mask), "y", ["n", "m", "m"]
    )
    proto = graph.model()
    proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    next(node for node in proto.graph.node if node.op_type == "Range").domain = MICROSOFT
    model = fuse_to_session(proto, tmp_path, cache, shapes={"x": (2, 9)})
    assert not {"ConstantOfShape", "Range", "Trilu"} & set(model.unfused_nodes)
    for n, m in ((3, 5), (1, 1), (2, 0)):
        check(model, {"x": values("float32", (n, m))})
