"""Weights in files of their own: found wherever they lie, mapped instead of copied, and never lost."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import apollo_fuse
from apollo_fuse import onnx_files, onnx_io
from apollo_fuse.driver import fuse
from apollo_fuse.errors import OutputError
from apollo_fuse.options import Options
from apollo_fuse.report import Report

SIDE = 64
FLOAT = TensorProto.FLOAT


def outside(folder: Path, file: str, array: np.ndarray, name: str) -> TensorProto:
    """The array behind whatever lies in the file already, as a tensor that points there."""
    tensor = numpy_helper.from_array(array, name)
    data = tensor.raw_data
    place = folder / file
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.open("ab") as opened:
        offset = opened.tell()
        opened.write(data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(len(data)))):
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with weights in two files, one in a sub-folder, at offsets, and in the bodies of an If."""
    folder = tmp_path / "in"
    folder.mkdir()
    random = np.random.default_rng(0)

    def weight(file: str, name: str) -> TensorProto:
        return outside(folder, file, random.standard_normal((SIDE, SIDE), np.float32) / 8, name)

    square = [SIDE, SIDE]
    w, v, u = weight("a.bin", "w"), weight("parts/b.bin", "v"), weight("a.bin", "u")
    then = helper.make_graph(
        [helper.make_node("MatMul", ["x", "v"], ["t"])],
        "then",
        [],
        [helper.make_tensor_value_info("t", FLOAT, square)],
        [v],
    )
    otherwise = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=u), helper.make_node("MatMul", ["x", "c"], ["e"])],
        "otherwise",
        [],
        [helper.make_tensor_value_info("e", FLOAT, square)],
    )
    nodes = [
        helper.make_node("If", ["which"], ["i"], then_branch=then, else_branch=otherwise),
        helper.make_node("MatMul", ["i", "w"], ["m"]),
        helper.make_node("Tanh", ["m"], ["h"]),
        helper.make_node("Mul", ["h", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, square),
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", FLOAT, square)],
        [w],
    )
    path = folder / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def fused(model: Path, output: Path, cache: Path) -> Report:
    return fuse(model, output, Options(measure=False, strict=True, fuse_all=True, cache_dir=cache, threads=2))


def assert_same(model: Path, output: Path) -> None:
    original, session = ort.InferenceSession(model), apollo_fuse.session(output)
    plain = ort.InferenceSession(output)
    for which in (True, False):
        feeds = {"x": np.random.default_rng(1).standard_normal((SIDE, SIDE), np.float32)}
        feeds["which"] = np.array(which)
        (expected,) = original.run(None, feeds)
        for found in (session.run(None, feeds)[0], plain.run(None, feeds)[0]):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def hashes(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_weights_in_several_files_come_along_and_stay_where_they_were(
    model: Path, limit: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "_LARGE", limit)
    before = hashes(model.parent)
    (tmp_path / "out").mkdir()
    report = fused(model, tmp_path / "out" / "net.onnx", cache)
    assert report.library is not None
    assert hashes(model.parent) == before
    elsewhere = tmp_path / "elsewhere"
    shutil.move(tmp_path / "out", elsewhere)
    expected = ["net.onnx", "net.so"] if limit else ["net.onnx", "net.onnx.data", "net.so"]
    assert sorted(file.name for file in elsewhere.iterdir()) == expected
    onnx.checker.check_model(str(elsewhere / "net.onnx"))
    assert_same(model, elsewhere / "net.onnx")


def test_a_large_result_is_replaced_with_its_weights(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_files, "_LARGE", 0)
    output = model.with_name("fused.onnx")
    for _ in range(2):
        fused(model, output, cache)
        assert_same(model, output)


def test_weights_of_another_model_are_not_overwritten(model: Path, cache: Path) -> None:
    output = model.with_name("fused.onnx")
    stray = model.with_name("fused.onnx.data")
    stray.write_bytes(b"the weights of something else")
    with pytest.raises(OutputError, match=r"fused\.onnx\.data"):
        fused(model, output, cache)
    assert stray.read_bytes() == b"the weights of something else"
    assert not output.exists()


def test_weights_of_the_model_itself_are_not_overwritten(tmp_path: Path, cache: Path) -> None:
    weight = outside(tmp_path, "fused.onnx.data", np.ones((SIDE, SIDE), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [SIDE, SIDE])],
        [helper.make_tensor_value_info("y", FLOAT, [SIDE, SIDE])],
        [weight],
    )
    onnx.save(helper.make_model(graph, ir_version=8), tmp_path / "net.onnx")
    before = hashes(tmp_path)
    with pytest.raises(OutputError, match=r"net\.onnx"):
        fused(tmp_path / "net.onnx", tmp_path / "fused.onnx", cache)
    assert hashes(tmp_path) == before


def test_no_weight_of_a_clean_model_is_in_memory(model: Path, tmp_path: Path) -> None:
    working = tmp_path / "working"
    working.mkdir()
    clean = onnx_io.load_clean(model, working)
    weights = [
        value.const_value
        for graph in clean.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > 1024
    ]
    assert len(weights) == 3
    for tensor in weights:
        assert isinstance(tensor, ir.ExternalTensor)
        assert working in Path(tensor.path).parents


LARGE = """
import sys
from pathlib import Path
import numpy as np, onnx
from onnx import TensorProto, helper
folder, count = Path(sys.argv[1]), int(sys.argv[2])
width, layers = 4096, count
nodes, weights, value = [], [], "x"
random = np.random.default_rng(0)
block = random.standard_normal((width, width), np.float32) / 64
with open(folder / "net.bin", "wb") as file:
    for place in range(layers):
        tensor = TensorProto(name=f"w{place}", data_type=1, dims=[width, width], data_location=1)
        for key, number in (("location", "net.bin"), ("offset", file.tell()), ("length", block.nbytes)):
            tensor.external_data.add(key=key, value=str(number))
        file.write(np.roll(block, place).tobytes())
        weights.append(tensor)
        for op in ("MatMul", "Tanh", "Abs", "Neg"):
            inputs = [value, tensor.name] if op == "MatMul" else [value]
            nodes.append(helper.make_node(op, inputs, [f"{op}{place}"]))
            value = nodes[-1].output[0]
shape = [64, width]
graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, shape)],
                          [helper.make_tensor_value_info(value, 1, shape)], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
onnx.save(model, folder / "net.onnx")
"""
# ru_maxrss would count what the process that started this one had held
COMPILE = """
import re, sys
from pathlib import Path
from apollo_fuse import Options, fuse
report = fuse(sys.argv[1], options=Options(cache_dir=Path(sys.argv[2]), threads=2, measure=False))
(peak,) = re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(report.fused_nodes, int(peak) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [8, 33])  # 0.5 and 2.2 GB
def test_a_large_model_takes_twice_its_size_and_a_gibibyte_at_most(
    count: int, tmp_path: Path, cache: Path
) -> None:
    size = count * 4096 * 4096 * 4
    if shutil.disk_usage(tmp_path).free < 4 * size:
        pytest.skip(f"needs {4 * size / 1e9:.0f} GB of disk")
    subprocess.run([sys.executable, "-c", LARGE, str(tmp_path), str(count)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(tmp_path / "net.onnx"), str(cache)],
        check=True,
        capture_output=True,
        text=True,
    )
    nodes, peak = map(int, done.stdout.split())
    assert nodes == count
    assert peak <= 2 * size + (1 << 30)
    assert (tmp_path / "net.fused.onnx.data").exists() == (size > 1 << 30)
