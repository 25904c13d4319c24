"""Kernels on the GPU at hand, of builders and of random graphs; `make gpu` runs these, and then measures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, note, settings

from apollo_fuse.capture import capture
from apollo_fuse.options import Options
from benchmarks import device_rows
from benchmarks.device import Device, DeviceError, first_device
from benchmarks.device_rows import rows_for, wanted
from models import BUILDERS
from tests.interpreted import candidates_of
from tests.properties.graphs import RandomModel, models
from tests.stub import patched
from tests.test_models import small, small_feeds

pytestmark = pytest.mark.gpu
_GRAPHS = 20


@pytest.fixture(scope="module")
def device() -> Device:
    try:
        return first_device()
    except DeviceError as error:
        pytest.skip(f"there is no GPU: {error}")


def check(device: Device, model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], folder: Path) -> int:
    """Each kernel of the model gives what onnxruntime does; how many rows there are of them."""
    clean, candidates = candidates_of(model, folder)
    arrays = capture(clean, wanted(candidates), feeds, 2).arrays
    with patched(device_rows, "LAUNCHES", 1), patched(device_rows, "ROUNDS", 1):
        rows = rows_for("model", candidates, arrays, device, Options())
    assert not [row.problem for row in rows if row.problem]
    return len(rows)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_kernels_of_a_builder_agree(name: str, device: Device, tmp_path: Path) -> None:
    model = small(name)
    assert check(device, model, small_feeds(name, model), tmp_path)


@settings(max_examples=_GRAPHS)
@given(models())
def test_a_random_graph_computes_what_it_did(device: Device, model: RandomModel) -> None:
    note(str(model))
    random = np.random.default_rng(1)
    feeds = {name: random.standard_normal(s).astype(np.float32) for name, s in model.shapes.items()}
    with tempfile.TemporaryDirectory() as folder:
        check(device, model.proto, feeds | model.feeds, Path(folder))
