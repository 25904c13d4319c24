"""Every intermediate form of a few models, as text that a person would review."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest

from apollo_fuse import onnx_io
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.symbolic import infer_shapes
from models import chains, memory_bound, networks

MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "softmax": lambda: memory_bound.softmax("rows", 512),
    "layernorm": lambda: memory_bound.layernorm("rows", 512),
    "gelu_tanh": lambda: memory_bound.gelu_tanh("rows", 512),
    "image_preprocessing": lambda: memory_bound.image_preprocessing("height", "width"),
    "bert_layer": lambda: networks.bert_layer(hidden=48, heads=4),
}


CHAINS: dict[str, Callable[[], onnx.ModelProto]] = {
    "log_softmax": lambda: chains.log_softmax("rows", 512),
    "masked_softmax": lambda: chains.masked_softmax("batch", 4, "queries", "keys"),
    "group_norm": lambda: chains.group_norm("batch"),
    "cross_entropy": lambda: chains.cross_entropy("rows", 1000),
    "batch_norm_training": lambda: chains.batch_norm_training("batch"),
    "softmax_long": lambda: memory_bound.softmax(4, 1_000_000),
    "softmax_row": lambda: memory_bound.softmax(1, 4_000_000),
}
GPU = ("masked_softmax", "cross_entropy", "softmax_long")
"""Of which the Triton is reviewed too: rows of open length, gathers and forms, partial accumulators."""


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_model_is_as_reviewed(
    name: str, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    forms = _forms(MODELS[name](), tmp_path)
    for stage in ("clusters", "micro_graphs", "scop", "schedule", "kernel", "c", "triton"):
        golden(f"{name}.{stage}.txt", _stage(forms, stage))


@pytest.mark.parametrize("name", CHAINS)
def test_the_kernels_of_a_chain_of_reductions_are_as_reviewed(
    name: str, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    forms = _forms(CHAINS[name](), tmp_path)
    golden(f"{name}.kernel.txt", _stage(forms, "kernel"))
    if name in GPU:
        golden(f"{name}.triton.txt", _stage(forms, "triton"))


def _forms(model: onnx.ModelProto, folder: Path) -> Mapping[str, str]:
    path = folder / "model.onnx"
    onnx.save(model, path)
    clean = onnx_io.load_clean(path, folder)
    infer_shapes(clean)
    return plan(clean, Options(dump=folder)).dumps


def _stage(forms: Mapping[str, str], stage: str) -> str:
    texts = [f"// {key}\n{text}" for key, text in forms.items() if stage in key.split(".")]
    assert texts, stage
    return "\n".join(texts)
