"""onnxruntime's blocked layout, NCHWc: its block size on this machine, and the shapes of its operators.

A blocked tensor lies in memory as [N, C / block, H, W, block]. onnxruntime gives it the shape [N, C, H, W],
where C is rounded up to whole blocks; what fills the last block up is no part of any result. The operators
are those of the domain `com.microsoft.nchwc`, and a few of `com.microsoft`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from onnx_shape_inference import ShapeInferenceContext, registry

DOMAIN = "com.microsoft.nchwc"
_LIKE_ONNX = (  # operators whose shapes follow those of an ONNX operator of that name, less "Fused"
    ("", "LayerNormalization"),  # onnxruntime writes it into models of older opsets too
    (DOMAIN, "Conv"),
    (DOMAIN, "MaxPool"),
    (DOMAIN, "AveragePool"),
    (DOMAIN, "GlobalMaxPool"),
    (DOMAIN, "GlobalAveragePool"),
    ("com.microsoft", "FusedConv"),
    ("com.microsoft", "FusedGemm"),
)


@cache
def block_size() -> int:
    """The channels in a block on this machine: 16 with AVX-512, else 8. 1 where there is no such layout."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4, 1, 1]))
    node = ir.node("ReorderInput", [x], domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 17, DOMAIN: 1}, name="probe")
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception:  # onnxruntime raises classes of its own; builds without the layout lack the operator
        return 1
    (blocked,) = session.run(None, {"x": np.zeros((1, 4, 1, 1), np.float32)})
    return int(np.asarray(blocked).shape[1])


def whole_blocks(channels: int, block: int) -> int:
    """The channels of a blocked tensor that holds this many."""
    return -(-channels // block) * block


registry.collect()
for _domain, _name in _LIKE_ONNX:
    _infer = registry.get("", _name.removeprefix("Fused"), 22)
    assert _infer is not None
    registry.register(_domain, _name, since_version=1)(_infer)


@registry.register(DOMAIN, "ReorderInput", since_version=1)  # type: ignore[untyped-decorator]
def _infer_reorder_input(context: ShapeInferenceContext, node: ir.Node) -> None:
    shape = _image(node)
    if shape is None:
        return
    batch, channels, *spatial = (
        shape if not _flag(node, "channels_last") else (shape[0], shape[3], *shape[1:3])
    )
    if isinstance(channels, int):
        dims = [batch, whole_blocks(channels, block_size()), *spatial]
        _set(context, node, ir.Shape(dims))


@registry.register(DOMAIN, "ReorderOutput", since_version=1)  # type: ignore[untyped-decorator]
def _infer_reorder_output(context: ShapeInferenceContext, node: ir.Node) -> None:
    shape = _image(node)
    if shape is None:
        return
    channels = node.attributes["channels"].as_int()
    batch, _, *spatial = shape
    last = _flag(node, "channels_last")
    _set(context, node, ir.Shape([batch, *spatial, channels] if last else [batch, channels, *spatial]))


@registry.register(DOMAIN, "Upsample", since_version=1)  # type: ignore[untyped-decorator]
def _infer_upsample(context: ShapeInferenceContext, node: ir.Node) -> None:
    shape = _image(node)
    if shape is not None:
        scales = node.attributes["scales"].as_ints()
        _set(context, node, ir.Shape([dim * scale for dim, scale in zip(shape, scales, strict=True)]))


def _image(node: ir.Node) -> tuple[int | ir.SymbolicDim, ...] | None:
    value = node.inputs[0]
    if value is None or value.shape is None or value.shape.rank() != 4:
        return None
    return tuple(value.shape)


def _flag(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def _set(context: ShapeInferenceContext, node: ir.Node, shape: ir.Shape) -> None:
    context.set_shape_and_dtype(node.outputs[0], shape, ir.DataType.FLOAT)
