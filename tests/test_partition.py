"""What is worth a kernel of its own before anything is measured."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from apollo_fuse import onnx_io
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.symbolic import infer_shapes


@pytest.mark.parametrize(
    ("operator", "kernels"), [("PRelu(x, slope)", ["PRelu"]), ("Mul(x, slope)", []), ("Relu(x)", [])]
)
def test_a_lone_operator_becomes_a_kernel_only_where_onnxruntime_is_slow_at_it(
    operator: str, kernels: list[str], tmp_path: Path
) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        f"g (float[n,16,h,w] x, float[16,1,1] slope) => (float[n,16,h,w] y) {{ y = {operator} }}"
    )
    onnx.save(model, tmp_path / "net.onnx")
    clean = onnx_io.load_clean(tmp_path / "net.onnx", tmp_path)
    infer_shapes(clean)
    found = plan(clean, Options())
    assert [o.op_type for x in found.candidates for o in x.micro_graph.operators] == kernels
    assert [r.reason for r in found.refused] == ([] if kernels else ["a single operator"])
