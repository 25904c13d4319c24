"""Models with tensors of bfloat16, float8 and 4 bits: what onnxruntime runs of them runs fused as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import apollo_fuse
from apollo_fuse import Options
from apollo_fuse.errors import ModelError
from apollo_fuse.feeds import inputs_of, read_inputs
from tests.fusing import fuse_to_session
from tests.test_operators import check_reduced

FLOAT, BFLOAT16, FLOAT8 = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN
NODES = {
    "an island in float32": (["f=Cast(x,1)", "t=Tanh(f)", "m=Mul(t,f)", f"y=Cast(m,{BFLOAT16})"], BFLOAT16, BFLOAT16),
    "bfloat16 between floats": ([f"b=Cast(x,{BFLOAT16})", "t=Transpose(b)", "f=Cast(t,1)", "y=Exp(f)"], FLOAT, FLOAT),
    "weights": (["f=Cast(w,1)", "m=Mul(x,f)", "y=Tanh(m)"], FLOAT, FLOAT),
    "moved": (["t=Transpose(x)", "y=Identity(t)"], BFLOAT16, BFLOAT16),
    "signs": (["p=Sign(x)", "f=Cast(p,1)", "y=Exp(f)"], BFLOAT16, FLOAT),
    "float8 that is moved": (["t=Transpose(x)", "f=Cast(t,1)", "e=Exp(f)", "y=Add(e,f)"], FLOAT8, FLOAT),
    "float8 between floats": ([f"q=Cast(x,{FLOAT8})", "f=Cast(q,1)", "e=Sub(x,f)", "y=Abs(e)"], FLOAT, FLOAT),
    "float8 as a result": (["t=Tanh(x)", "m=Mul(t,x)", f"y=Cast(m,{FLOAT8})"], FLOAT, FLOAT8),
    "float8 by scales": (["q=QuantizeLinear(x,s,z8)", "d=DequantizeLinear(q,s,z8)", "t=Tanh(d)", "y=Mul(t,x)"], FLOAT, FLOAT),
    "weights of 4 bits": (["f=DequantizeLinear(w4,s)", "m=Mul(x,f)", "y=Tanh(m)"], FLOAT, FLOAT),
}  # fmt: skip


def model(nodes: Sequence[str], source: int, target: int) -> onnx.ModelProto:
    """``result=Op(operands)``, with the number of a type behind a Cast's operand."""
    weights: Mapping[str, np.ndarray] = {
        "w": np.linspace(-3, 3, 24).astype(ml_dtypes.bfloat16), "s": np.array(0.05, np.float32),
        "z8": np.array(0, ml_dtypes.float8_e4m3fn), "w4": np.arange(-8, 16).clip(-8, 7).astype(ml_dtypes.int4),
    }  # fmt: skip
    made = []
    for text in nodes:
        result, _, call = text.partition("=")
        op, _, operands = call.removesuffix(")").partition("(")
        reads = [name for name in operands.split(",") if not name.isdigit()]
        to = {"to": int(operands.split(",")[-1])} if op == "Cast" else {}
        made.append(helper.make_node(op, reads, [result], **to))
    used = {name for node in made for name in node.input}
    x = helper.make_tensor_value_info("x", source, ["n", 24])
    y = onnx.ValueInfoProto(name="y")
    y.type.tensor_type.elem_type = target
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items() if name in used]
    graph = helper.make_graph(made, "narrow", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.parametrize("name", NODES)
def test_models_with_narrow_tensors(name: str, tmp_path: Path, cache: Path) -> None:
    nodes, source, target = NODES[name]
    fused = fuse_to_session(model(nodes, source, target), tmp_path, cache, shapes={"x": (8, 24)})
    held = {node.op_type for node in model(nodes, source, target).graph.node}
    if "float8" in name or "4 bits" in name:
        held -= {"Cast", "Transpose", "QuantizeLinear", "DequantizeLinear"}
    assert not held & set(fused.unfused_nodes)
    dtype = helper.tensor_dtype_to_np_dtype(source)
    for n in (5, 1, 0):
        x = np.random.default_rng(n).standard_normal((n, 24)) * 3
        check_reduced(fused, {"x": x.astype(dtype)})


def test_a_model_in_bfloat16_is_told_what_to_do(tmp_path: Path) -> None:
    onnx.save(model(["a=Add(x,w)", "y=Tanh(a)"], BFLOAT16, BFLOAT16), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="Add.*holds bfloat16.*float32 behind a Cast"):
        apollo_fuse.fuse(tmp_path / "model.onnx", tmp_path / "fused.onnx", Options())


def test_inputs_of_bfloat16_come_from_a_file(tmp_path: Path) -> None:
    """NumPy writes them as two bytes of no type."""
    x = np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "inputs.npz", x=x)
    inputs = inputs_of(model(["y=Cast(x,1)"], BFLOAT16, FLOAT))
    found = read_inputs(tmp_path / "inputs.npz", inputs)["x"]
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.astype(np.float32), x.astype(np.float32))
