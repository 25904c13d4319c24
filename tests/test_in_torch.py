"""Models as functions of torch's tensors, which kernels on a GPU are held against, compute what they did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from apollo_fuse import onnx_io
from apollo_fuse.tolerance import compare
from models import BUILDERS
from tests.test_models import small, small_feeds

torch = pytest.importorskip("torch", reason="torch is not installed")

from benchmarks.in_torch import NotInTorch, function_of  # noqa: E402  which imports torch

CHAINS = [name for name, builder in BUILDERS.items() if builder.memory_bound]


def clean(model: onnx.ModelProto, folder: Path) -> ir.Model:
    onnx.save(model, folder / "model.onnx")
    return onnx_io.load_clean(folder / "model.onnx", folder)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_operators_computes_what_it_did(name: str, tmp_path: Path) -> None:
    model = small(name)
    feeds = small_feeds(name, model)
    graph = clean(model, tmp_path).graph
    inputs = [value for value in graph.inputs if value.name in feeds]
    function = function_of(list(graph), inputs, list(graph.outputs), "cpu")
    found = function(*(torch.from_numpy(np.array(feeds[value.name or ""])) for value in inputs))
    expected = ort.InferenceSession(model.SerializeToString()).run(None, feeds)
    for output, right, made in zip(graph.outputs, expected, found, strict=True):
        assert not compare(output.name or "", np.asarray(right), made.numpy()).problem


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("y = Selu(x)", "Selu"),
        ("shape = Shape(x) y = Reshape(x, shape)", "Shape"),
        ("y = ReduceSum(x, axes)", "axes that are no constant"),
    ],
)
def test_what_the_table_does_not_have_is_named(body: str, words: str, tmp_path: Path) -> None:
    text = f"g (float[n, 4] x, int64[k] axes) => (float[n, 4] y) {{ {body} }}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    graph = clean(model, tmp_path).graph
    with pytest.raises(NotInTorch, match=words):
        function_of(list(graph), list(graph.inputs), list(graph.outputs), "cpu")
