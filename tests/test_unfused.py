"""What onnxruntime's own operators are predicted to take: its profile, broadcasts, views, memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import parser

from apollo_fuse.cpu import Cpu
from apollo_fuse.descriptions import a100, generic
from apollo_fuse.dtypes import DType
from apollo_fuse.measure import session_options
from apollo_fuse.unfused import Ran, Tensor, ran, unfused_seconds

CPU = generic(Cpu("x86-64", 4), cores=2)
assert CPU.runtime is not None
RUNTIME = CPU.runtime


def tensor(*shape: int, dtype: DType = DType.FLOAT32) -> Tensor:
    return Tensor(dtype, shape)


def node(op_type: str, *inputs: Tensor, output: Tensor) -> Ran:
    return Ran(op_type, inputs, (output,))


def seconds(*nodes: Ran, threads: int = 1) -> float:
    return unfused_seconds(nodes, CPU, threads)


def profiled(model: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> tuple[Ran, ...]:
    options = session_options(1)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for _ in range(2):
        session.run(None, feeds)
    return ran(json.loads(Path(session.end_profiling()).read_text()))


def test_a_profile_gives_each_node_once_with_the_shapes_that_it_ran_on(tmp_path: Path) -> None:
    text = """g (float[n, 8] x, int64[n] i) => (float[n, 8] y, int64[n] j) {
        t = Exp(x) y = Mul(t, x) j = Add(i, i) }"""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    found = profiled(model, {"x": np.ones((4, 8), np.float32), "i": np.ones(4, np.int64)}, tmp_path)
    matrix, vector = tensor(4, 8), tensor(4, dtype=DType.INT64)
    assert sorted(found, key=lambda one: one.op_type) == [
        node("Add", vector, vector, output=vector),
        node("Exp", matrix, output=matrix),
        node("Mul", matrix, matrix, output=matrix),
    ]


def test_a_profile_shows_what_onnxruntime_itself_has_fused(tmp_path: Path) -> None:
    text = """g (float[64, 8] x) => (float[64, 8] y) {
        two = Constant<value_float = 2.0>() tiny = Constant<value_float = 0.00001>()
        m = ReduceMean<axes = [1]>(x) d = Sub(x, m) s = Pow(d, two) v = ReduceMean<axes = [1]>(s)
        e = Add(v, tiny) r = Sqrt(e) n = Div(d, r) g = Mul(n, scale) y = Add(g, scale) }"""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "scale"))
    found = profiled(model, {"x": np.ones((64, 8), np.float32)}, tmp_path)
    assert [one.op_type for one in found] == ["LayerNormalization"]


@pytest.mark.parametrize(
    ("left", "right", "spans"),
    [
        ((32, 32), (32, 32), 1),
        ((32, 32), (), 1),
        ((64, 64), (64,), 64),
        ((64, 64), (64, 1), 64),
        ((1024, 1), (1,), 1024),  # a turn for each element, as onnxruntime does it
        ((1024, 1), (1024, 1), 1),
        ((100, 100, 3), (3,), 10000),
        ((8, 16, 32), (16, 1), 128),
        ((1, 16, 32), (16, 32), 1),
    ],
)
def test_a_broadcast_costs_each_run_of_neighbours(
    left: tuple[int, ...], right: tuple[int, ...], spans: int
) -> None:
    shape = np.broadcast_shapes(left, right)
    found = seconds(node("Mul", tensor(*left), tensor(*right), output=tensor(*shape)))
    elements = float(np.prod(shape)) * RUNTIME.elements["Mul"]
    assert found == pytest.approx(RUNTIME.node + elements + spans * RUNTIME.span, rel=0.01)


def test_a_view_costs_its_dispatch_alone() -> None:
    assert seconds(node("Reshape", tensor(4096, 4096), output=tensor(4096 * 4096))) == RUNTIME.node


def test_nodes_add_up() -> None:
    one = node("Exp", tensor(64, 64), output=tensor(64, 64))
    assert seconds(one, one) == pytest.approx(2 * seconds(one))
    assert seconds() == 0.0


def test_an_operator_that_is_not_known_takes_the_time_of_any() -> None:
    known, unknown = (node(name, tensor(64, 64), output=tensor(64, 64)) for name in ("Softplus", "Strange"))
    assert RUNTIME.node < seconds(unknown) < seconds(known)


def test_a_large_copy_takes_its_bytes_over_the_bandwidth_of_memory() -> None:
    large = tensor(64 << 20)
    memory = CPU.levels[-1]
    expected = (256 << 20) / memory.read + (256 << 20) / memory.write
    assert seconds(node("Relu", large, output=large)) >= expected


@pytest.mark.parametrize("size", [1, 1 << 10, 1 << 14, 1 << 20, 1 << 26])
def test_more_elements_and_fewer_threads_are_never_cheaper(size: int) -> None:
    few, many = (node("Tanh", tensor(n), output=tensor(n)) for n in (size, 2 * size))
    assert seconds(many) >= seconds(few)
    assert seconds(few, threads=2) <= seconds(few, threads=1)


def test_a_slice_reads_no_more_than_it_writes() -> None:
    part = tensor(16)
    assert seconds(node("Slice", tensor(1 << 24), output=part)) == seconds(node("Slice", part, output=part))


def test_a_machine_without_onnxruntime_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a100"):
        unfused_seconds([], a100(), 1)
    with pytest.raises(ValueError, match="no description of onnxruntime"):
        unfused_seconds([], replace(CPU, runtime=None), 1)
