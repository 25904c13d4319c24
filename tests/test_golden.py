"""Every intermediate form of a few models, as text that a person would review."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from apollo_fuse import onnx_io
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.symbolic import infer_shapes
from models import memory_bound, networks

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "softmax": lambda: memory_bound.softmax("rows", 512),
    "layernorm": lambda: memory_bound.layernorm("rows", 512),
    "gelu_tanh": lambda: memory_bound.gelu_tanh("rows", 512),
    "image_preprocessing": lambda: memory_bound.image_preprocessing("height", "width"),
    "bert_layer": lambda: networks.bert_layer(hidden=48, heads=4),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_model_is_as_reviewed(
    name: str, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(MODELS[name](), path)
    model = onnx_io.load_clean(path, tmp_path)
    infer_shapes(model)
    forms = plan(model, Options()).dumps
    for stage in ("clusters", "micro_graphs", "scop", "schedule", "kernel", "c"):
        texts = [f"// {key}\n{text}" for key, text in forms.items() if stage in key.split(".")]
        assert texts, stage
        golden(f"{name}.{stage}.txt", "\n".join(texts))
