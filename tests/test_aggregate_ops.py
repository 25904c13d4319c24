"""Which operators the rules bring together, and which they keep apart before a scheduler has to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from apollo_fuse import onnx_io
from apollo_fuse.passes.aggregate_ops import AggregateOps
from apollo_fuse.passes.extract_clusters import ExtractClusters
from apollo_fuse.passes.open_compound_ops import OpenCompoundOps
from apollo_fuse.symbolic import infer_shapes, values_of


def micro_graphs(nodes: list[onnx.NodeProto], shape: Sequence[int | str], folder: Path) -> list[list[str]]:
    """Op types of each micro-graph of a network from `x` to `y`."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None)))
    path = folder / "net.onnx"
    graph = helper.make_graph(nodes, "net", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    clean = onnx_io.load_clean(path, folder)
    infer_shapes(clean)
    opened = OpenCompoundOps(clean.opset_imports[""])(clean.graph, values_of(clean.graph))
    clusters = ExtractClusters()(clean.graph, opened)
    return [
        [o.op_type for o in m.operators]
        for cluster in clusters
        for m in AggregateOps()(cluster, frozenset({"y"}))
    ]


def pool(source: str, result: str, size: int, stride: int = 1) -> onnx.NodeProto:
    pads = [(size - 1) // 2] * 4 if stride == 1 else [0] * 4
    return helper.make_node(
        "MaxPool", [source], [result], kernel_shape=[size, size], strides=[stride, stride], pads=pads
    )


@pytest.mark.parametrize("shape", [[1, 8, 20, 20], ["n", 8, "h", "w"]])
def test_windows_over_the_results_of_windows_stay_apart(shape: list[int | str], tmp_path: Path) -> None:
    """The spatial pyramid of YOLO networks: no loop has both a result and those beside it."""
    nodes = [pool("x", "a", 5), pool("a", "b", 5), pool("b", "c", 5)]
    nodes.append(helper.make_node("Concat", ["x", "a", "b", "c"], ["y"], axis=1))
    groups = micro_graphs(nodes, shape, tmp_path)
    assert max(group.count("MaxPool") for group in groups) == 1
    assert sorted(op for group in groups for op in group) == ["Concat", "MaxPool", "MaxPool", "MaxPool"]


def test_what_reads_the_results_of_a_window_one_by_one_joins_it(tmp_path: Path) -> None:
    nodes = [pool("x", "a", 3), helper.make_node("Exp", ["a"], ["b"]), helper.make_node("Neg", ["b"], ["y"])]
    assert micro_graphs(nodes, ["n", 8, "h", "w"], tmp_path) == [["MaxPool", "Exp", "Neg"]]


def test_rows_that_a_reduction_keeps_are_read_by_another_through_a_split_axis(tmp_path: Path) -> None:
    """A softmax of scores that were normalised: both go row by row."""
    nodes = [
        helper.make_node("Softmax", ["x"], ["a"], axis=-1),
        helper.make_node("LogSoftmax", ["a"], ["y"], axis=-1),
    ]
    assert micro_graphs(nodes, [4, 16, 32], tmp_path) == [["Softmax", "LogSoftmax"]]
