"""Builders of `models`: each computes what it is named for, and what fusion makes of it the same."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import models
from apollo_fuse.measure import session_options
from models import BUILDERS, columns, detection, networks
from tests.fusing import fuse_to_session
from tests.test_models import SHAPES, outputs, small, small_feeds

Array = np.ndarray


def weights_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def feeds_for(name: str, model: onnx.ModelProto) -> dict[str, Array]:
    return models.feeds_of(BUILDERS[name], model, shapes={})


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


@pytest.mark.parametrize("name", BUILDERS)
def test_every_builder_is_fused_to_kernels_that_agree(name: str, tmp_path: Path, cache: Path) -> None:
    model = small(name)
    fused = fuse_to_session(model, tmp_path, cache, shapes=SHAPES.get(name))
    assert fused.report.fused_nodes > 0
    for output, (expected, found) in fused.run(small_feeds(name, model)).items():
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=output)


def test_a_token_of_gpt2_sees_those_before_it_alone() -> None:
    model = small("gpt2_block")
    feeds = small_feeds("gpt2_block", model)
    (before,) = outputs(model, feeds)
    feeds["hidden_states"][:, 5] *= -1.0
    (after,) = outputs(model, feeds)
    np.testing.assert_allclose(before[:, :5], after[:, :5], rtol=1e-4, atol=1e-5)
    assert all(not np.allclose(before[:, token], after[:, token]) for token in range(5, before.shape[1]))


def test_gpt2_token_by_token_is_gpt2_over_the_text() -> None:
    block = small("gpt2_block")
    feeds = small_feeds("gpt2_block", block)
    (whole,) = outputs(block, feeds)
    text = feeds["hidden_states"]
    session = ort.InferenceSession(small("gpt2_decode").SerializeToString(), session_options(1))
    key = value = np.zeros((text.shape[0], 3, 0, 8), np.float32)
    for token in range(text.shape[1]):
        state = text[:, token : token + 1]
        key, value, found = session.run(
            ["present_key", "present_value", "out"],
            {"hidden_states": state, "past_key": key, "past_value": value},
        )
        np.testing.assert_allclose(found, whole[:, token : token + 1], rtol=1e-4, atol=1e-5)


def test_the_layers_of_bert_large_share_their_weights() -> None:
    one, two = (networks.bert_large(hidden=24, heads=3, layers=count) for count in (1, 2))
    assert [each.name for each in one.graph.initializer] == [each.name for each in two.graph.initializer]
    assert one.ByteSize() < two.ByteSize() < 2 * one.ByteSize()


def test_the_weights_of_bert_large_fit_the_cache() -> None:
    assert models.load("bert_large").ByteSize() < 64 * 2**20


def test_onnxruntime_recognises_no_gelu_in_matmul_add_gelu(tmp_path: Path) -> None:
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(models.load("matmul_add_gelu").SerializeToString(), options)
    types = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert types == ["MatMul", "Add", "Mul", "Erf", "Add", "Mul", "Mul"]


def test_matmul_add_gelu_is_a_dense_layer_and_gelu() -> None:
    model = small("matmul_add_gelu")
    weights, feeds = weights_of(model), small_feeds("matmul_add_gelu", model)
    expected = gelu(feeds["x"] @ weights["dense.weight"] + weights["dense.bias"])
    np.testing.assert_allclose(outputs(model, feeds)[0], expected, rtol=1e-4, atol=1e-5)


def test_levit_hardswish_normalises_each_channel_over_all_tokens() -> None:
    model = small("levit_hardswish")
    weights, feeds = weights_of(model), small_feeds("levit_hardswish", model)

    def linear_norm(x: Array, name: str) -> Array:
        scale, bias, mean, variance = (
            weights[f"{name}_norm.{part}"] for part in ("scale", "bias", "mean", "variance")
        )
        return (x @ weights[f"{name}.weight"] - mean) / np.sqrt(variance + 1e-5) * scale + bias

    inner = linear_norm(feeds["x"], "up")
    inner = inner * np.clip(inner + 3, 0, 6) / 6
    expected = feeds["x"] + linear_norm(inner, "down")
    np.testing.assert_allclose(outputs(model, feeds)[0], expected, rtol=1e-4, atol=1e-5)


def test_reduce_sum_square_is_the_distance_from_the_centre() -> None:
    model = small("reduce_sum_square")
    feeds = small_feeds("reduce_sum_square", model)
    expected = np.linalg.norm(feeds["x"] - weights_of(model)["centre"], axis=1)
    np.testing.assert_allclose(outputs(model, feeds)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["adam100", "lamb100"])
def test_an_optimizer_takes_the_step_of_its_paper(name: str) -> None:
    model = small(name)
    feeds = small_feeds(name, model)
    feeds["parameter_1"][:] = 0  # LAMB trusts the step as it is where a norm is 0
    names = [output.name for output in model.graph.output]
    found = dict(zip(names, outputs(model, feeds), strict=True))
    rate, step = float(feeds["learning_rate"]), float(feeds["step"])
    for index in range(6):
        parameter, gradient, first, second = (
            feeds[f"{part}_{index}"].astype(np.float64)
            for part in ("parameter", "gradient", "first", "second")
        )
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        if name == "lamb100":
            update += 0.01 * parameter
            length, step_length = np.linalg.norm(parameter), np.linalg.norm(update)
            update *= length / step_length if length > 0 and step_length > 0 else 1.0
        np.testing.assert_allclose(found[f"new_first_{index}"], first, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[f"new_second_{index}"], second, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            found[f"new_parameter_{index}"], parameter - rate * update, rtol=1e-3, atol=1e-5
        )


def test_wide_deep_preprocessing_puts_each_count_in_one_bucket() -> None:
    buckets = 5
    model = columns.wide_deep_preprocessing(rows=40, columns=2, buckets=buckets)
    feeds = feeds_for("wide_deep_preprocessing", model)
    (found,) = outputs(model, feeds)
    generator = np.random.default_rng(0)
    for index, part in enumerate(np.split(found, 2, axis=1)):
        boundaries = np.sort(generator.uniform(0.1, 2.0, (1, buckets - 1)).astype(np.float32))
        mean, deviation = generator.uniform(0.5, 1.0, (2, 1)).astype(np.float32)
        scaled = np.log1p(feeds[f"count_{index}"])
        np.testing.assert_allclose(part[:, :1], (scaled - mean) / deviation, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(
            part[:, 1:], np.eye(buckets)[np.searchsorted(boundaries[0], scaled[:, 0], side="right")]
        )


def test_detection_decode_places_boxes_by_cell_and_anchor() -> None:
    model = detection.detection_decode(size=64, classes=3)
    feeds = feeds_for("detection_decode", model)
    boxes, scores = outputs(model, feeds)
    first = feeds["map_8"].reshape(3, 8, 8, 8)  # anchor, value, row, column
    anchor, row, column = 1, 5, 2
    x, y, width, height, known, *kinds = first[anchor, :, row, column].astype(np.float64)
    centre = (sigmoid(np.array([x, y])) + [column, row]) * 8
    half = np.exp([width, height]) * [16, 30] / 2
    place = (anchor * 8 + row) * 8 + column
    np.testing.assert_allclose(boxes[0, place], [*(centre - half), *(centre + half)], rtol=1e-4)
    every = sigmoid(first[:, 4]) * sigmoid(first[:, 5:]).max(1)
    expected = np.where(every > 0.25, every, 0).reshape(-1)
    assert 0 < (expected == 0).mean() < 1
    np.testing.assert_allclose(scores[0, : expected.size], expected, rtol=1e-4)
    assert boxes.shape == (1, 3 * (64 + 16 + 4), 4)
