"""Models are read without their weights and written with them, as protobuf itself would."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, numpy_helper

from apollo_fuse import wire
from apollo_fuse.errors import ModelError
from tests.test_end_to_end import normal, text_model


def model_of(*weights: np.ndarray) -> ModelProto:
    model = text_model("g (float[N, 64] x) => (float[N, 64] y) { y = Tanh(x) }")
    for place, weight in enumerate(weights):
        tensor = numpy_helper.from_array(weight, f"w{place}")
        tensor.doc_string = "behind the data in the order of fields"
        model.graph.initializer.append(tensor)
    model.graph.initializer.append(TensorProto(name="floats", data_type=1, dims=[2], float_data=[1, 2]))
    model.metadata_props.add(key="behind", value="the graph")
    return model


def written(model: ModelProto, path: Path) -> bytes:
    file = io.BytesIO()
    wire.embed(model, lambda location: path, file)
    return file.getvalue()


@given(sizes=st.lists(st.integers(0, 100_000), max_size=5))
def test_what_is_read_without_weights_and_written_with_them_is_the_model(
    sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("wire") / "net.onnx"
    model = model_of(*(normal(size) for size in sizes))
    path.write_bytes(model.SerializeToString())
    outline = onnx.load_model_from_string(wire.outline(path))
    large = [x.name for x in model.graph.initializer if len(x.raw_data) > wire.KEPT]
    assert [x.name for x in outline.graph.initializer if wire.is_outside(x)] == large
    assert all(len(x.raw_data) <= wire.KEPT for x in outline.graph.initializer)
    assert onnx.load_model_from_string(written(outline, path)) == model


def test_where_a_weight_lies_changes_no_byte_of_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    model = model_of(normal(5000), normal(3), normal(70, 70))
    path.write_bytes(model.SerializeToString())
    outline = onnx.load_model_from_string(wire.outline(path))
    assert written(outline, path) == written(model, path)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\necho no model\n", b"\x3a\xff", b"\x3a\x7f\x00"])
def test_what_is_no_model_is_given_back(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    assert wire.outline(path) == content


def test_spans_are_compared_by_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_PIECE", 7)
    contents = {"a": b"..0123456789abcdef", "b": b"0123456789abcdef...", "c": b"0123456789abcdeF"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    a, b, c = (wire.Span(tmp_path / name, start, 16) for name, start in (("a", 2), ("b", 0), ("c", 0)))
    assert bytes(a) == b"0123456789abcdef"
    assert a.holds_what(b) and not a.holds_what(c)
    assert not a.holds_what(wire.Span(tmp_path / "b", 0, 15))


def test_a_file_that_ends_early_is_told(tmp_path: Path) -> None:
    (tmp_path / "short.bin").write_bytes(b"0123")
    with pytest.raises(ModelError, match=r"short\.bin: ends at 4 bytes, where 9 were expected"):
        bytes(wire.Span(tmp_path / "short.bin", 1, 8))
