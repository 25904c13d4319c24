"""`models.minilm`: both forms compute the network, here written down once more in numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest

import models
from models.minilm import encoder
from models.real import MiniLM
from tests.fusing import fuse_to_session
from tests.test_models import outputs

Array = np.ndarray
HEADS = 3
OPSETS = (14, 18)
CAT, OTHER_CAT, BANK = (
    [101, 1996, 4937, 7719, 2006, 1996, 13523, 102, 0],
    [101, 1037, 4937, 2003, 3564, 2006, 1037, 20452, 102],
    [101, 1996, 2924, 2992, 2049, 3037, 6165, 102, 0],
)
"""What the model's tokenizer makes of "the cat sits on the mat", "a cat is sitting on a rug" and "the bank
raised its interest rates", padded with 0."""


def reference(weights: dict[str, Array], feeds: dict[str, Array], heads: int) -> Array:
    """BERT's encoder in double precision."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x: Array, name: str) -> Array:
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return (x - x.mean(-1, keepdims=True)) / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: Array, name: str) -> Array:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def split(x: Array) -> Array:
        batch, length, hidden = x.shape
        return x.reshape(batch, length, heads, hidden // heads).transpose(0, 2, 1, 3)

    words, kinds, places = (
        w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "token_type", "position")
    )
    ids = feeds["input_ids"]
    x = words[ids] + kinds[feeds["token_type_ids"]] + places[: ids.shape[1]]
    x = norm(x, "embeddings.LayerNorm")
    blocked = feeds["attention_mask"][:, None, None, :] == 0
    for layer in range(sum(name.endswith("query.weight") for name in w)):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            split(dense(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
        scores = np.where(blocked, -np.inf, scores)
        likely = np.exp(scores - scores.max(-1, keepdims=True))
        likely /= likely.sum(-1, keepdims=True)
        context = (likely @ value).transpose(0, 2, 1, 3).reshape(x.shape)
        x = norm(x + dense(context, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = dense(x, f"{name}.intermediate.dense")
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = norm(x + dense(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    return x


def drawn_weights(
    hidden: int = 12, layers: int = 2, words: int = 30, positions: int = 16
) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (words, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
        "embeddings.position_embeddings.weight": (positions, hidden),
    }
    dense = {"attention.self.query": (hidden, hidden), "attention.self.key": (hidden, hidden)}
    dense |= {"attention.self.value": (hidden, hidden), "attention.output.dense": (hidden, hidden)}
    dense |= {"intermediate.dense": (4 * hidden, hidden), "output.dense": (hidden, 4 * hidden)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in dense.items()}
        shapes |= {f"{prefix}.{name}.bias": shape[:1] for name, shape in dense.items()}
        norms += [f"{prefix}.attention.output.LayerNorm", f"{prefix}.output.LayerNorm"]
    shapes |= {f"{name}.{part}": (hidden,) for name in norms for part in ("weight", "bias")}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def batch(generator: np.random.Generator) -> dict[str, Array]:
    mask = np.ones((2, 7), np.int64)
    mask[1, 5:] = 0
    return {
        "input_ids": generator.integers(0, 30, (2, 7)),
        "attention_mask": mask,
        "token_type_ids": generator.integers(0, 2, (2, 7)),
    }


@pytest.mark.parametrize("opset", OPSETS)
def test_both_forms_compute_the_network(opset: int) -> None:
    weights, feeds = drawn_weights(), batch(np.random.default_rng(1))
    model = encoder(weights, opset, HEADS)
    onnx.checker.check_model(model, full_check=True)
    (found,) = outputs(model, feeds)
    np.testing.assert_allclose(found, reference(weights, feeds, HEADS), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("opset", OPSETS)
def test_both_forms_are_fused_to_kernels_that_agree(opset: int, tmp_path: Path, cache: Path) -> None:
    model = encoder(drawn_weights(), opset, HEADS)
    shapes = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (2, 7))
    fused = fuse_to_session(model, tmp_path, cache, shapes=shapes)
    assert fused.report.fused_nodes > 0
    ((expected, found),) = fused.run(batch(np.random.default_rng(1))).values()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_model_is_measured_on_whole_texts_of_its_vocabulary() -> None:
    feeds = models.feeds_of(models.REAL["minilm"], encoder(drawn_weights(), 14, HEADS))
    assert {array.shape for array in feeds.values()} == {(8, 128)}
    assert 0 <= feeds["input_ids"].min() and 30_000 < feeds["input_ids"].max() < 30_522
    assert (feeds["attention_mask"] == 1).all() and (feeds["token_type_ids"] == 0).all()


def test_layer_norms_are_primitives_until_exporters_have_the_operator() -> None:
    old, new = (
        {node.op_type for node in encoder(drawn_weights(), opset, HEADS).graph.node} for opset in OPSETS
    )
    assert "LayerNormalization" not in old and "ReduceMean" in old
    assert "LayerNormalization" in new and "ReduceMean" not in new


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "minilm_op18"])
def test_the_released_weights_compute_the_network_and_tell_what_sentences_mean(name: str) -> None:
    ids = np.array([CAT, OTHER_CAT, BANK])
    mask = (ids != 0).astype(np.int64)
    feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    (states,) = outputs(models.load(name), feeds)
    source = models.REAL[name].source
    assert isinstance(source, MiniLM)
    expected = reference(models.minilm_weights(source), feeds, heads=12)
    np.testing.assert_allclose(states, expected, rtol=1e-3, atol=1e-4)
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    cat, other_cat, bank = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert cat @ other_cat > 0.6
    assert abs(cat @ bank) < 0.2
