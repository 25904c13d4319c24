"""Factors and shifts beside convolutions go into weights, where that gives the same but for rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import apollo_fuse
from apollo_fuse.layout import Layout, cut, load_clean_at
from apollo_fuse.options import Options
from apollo_fuse.tolerance import compare
from tests.fusing import assert_agrees, fuse_to_session, op_types, with_shapes
from tests.test_end_to_end import normal, text_model

WEIGHTS = {
    "w": normal(6, 4, 3, 3),
    "point": normal(6, 4, 1, 1),
    "grouped": normal(6, 2, 3, 3),
    "deep": normal(4, 1, 3, 3),
    "b": normal(6),
    "two": np.array([2.5], np.float32),
    "half": np.array(0.3, np.float32),
    "nothing": np.array([0], np.float32),
    "endless": np.array([np.inf], np.float32),
    "vast": np.array([3e38], np.float32),
    "tiny": np.array([1e-38], np.float32),
    "no": np.zeros((0, 4, 1, 1), np.float32),
    "six": normal(6, 1, 1),
    "four": normal(1, 4, 1, 1),
    "place": normal(6, 7),
    "none": np.array([0]),
    "one": np.array([1]),
    "higher": normal(1, 1, 1, 1, 1),
}
X = normal(2, 4, 8, 9)


def model_of(body: str, **weights: np.ndarray) -> onnx.ModelProto:
    return text_model(f"g (float[N, 4, 8, 9] x) => (float[] y) {{ {body} }}", **(WEIGHTS | weights))


FOLDED = {
    "a factor for all": "c = Conv(x, w, b) m = Mul(c, two) y = Tanh(m)",
    "a factor on the other side": "c = Conv(x, w, b) m = Mul(half, c) y = Tanh(m)",
    "a shift without a bias": "c = Conv(x, w) m = Add(c, two) y = Tanh(m)",
    "a factor and a shift for each channel": "c = Conv(x, w) m = Mul(six, c) a = Add(m, six) y = Tanh(a)",
    "all four operators": "c = Conv(x, w, b) m = Mul(c, two) a = Sub(m, half) d = Div(a, six) "
    "e = Add(half, d) y = Tanh(e)",
    "a factor before": "t = Tanh(x) m = Mul(t, two) y = Conv(m, w, b)",
    "a factor before borders": "t = Tanh(x) m = Div(t, half) y = Conv <pads = [1, 1, 1, 1]> (m, w)",
    "a shift before": "t = Tanh(x) a = Sub(t, half) m = Mul(a, four) s = Add(m, four) y = Conv(s, w)",
    "a shift before a point": "t = Tanh(x) a = Add(t, four) y = Conv <auto_pad = \"VALID\"> (a, point, b)",
    "scales before groups": "t = Tanh(x) m = Mul(t, four) a = Add(m, four) "
    "y = Conv <group = 2> (a, grouped, b)",
    "scales around each channel": "t = Tanh(x) m = Mul(t, four) a = Add(m, half) "
    "c = Conv <group = 4> (a, deep) e = Mul(c, four) y = Tanh(e)",
    "scales between convolutions": "c = Conv <group = 4, pads = [1, 1, 1, 1]> (x, deep) "
    "m = Mul(c, two) a = Add(m, half) d = Conv <pads = [1, 1, 1, 1]> (a, w, b) y = Tanh(d)",
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_scales_are_folded(name: str, tmp_path: Path) -> None:
    model = model_of(FOLDED[name])
    clean = with_shapes(model, tmp_path)
    assert set(op_types(clean)) == {"Conv", "Tanh"}
    assert_agrees(clean, model, {"x": X})


LEFT = {
    "what others read, too": "c = Conv(x, w, b) m = Mul(c, two) t = Tanh(c) y = Mul(m, t)",
    "what is returned": "y = Conv(x, w, b) z = Mul(y, two)",
    "a scaled result that is returned": "c = Conv(x, w, b) y = Mul(c, two)",
    "the other way round": "c = Conv(x, w, b) m = Sub(half, c) t = Tanh(m) d = Conv(x, w) "
    "e = Div(half, d) y = Add(t, e)",
    "a factor of zero": "c = Conv(x, w, b) m = Mul(c, nothing) y = Tanh(m)",
    "a factor without end": "c = Conv(x, w, b) m = Mul(c, endless) y = Tanh(m)",
    "factors that make weights endless": "c = Conv(x, w, b) m = Mul(c, vast) y = Tanh(m)",
    "factors that make weights vanish": "c = Conv(x, w, b) m = Mul(c, tiny) n = Mul(m, vast) y = Tanh(n)",
    "no weights": "t = Tanh(x) m = Mul(t, two) y = Conv(m, no)",
    "a number for each place": "c = Conv(x, w, b) m = Mul(c, place) y = Tanh(m)",
    "another rank": "c = Conv(x, w, b) m = Mul(c, higher) y = Tanh(m)",
    "a shift before borders": "t = Tanh(x) m = Add(t, two) y = Conv <pads = [0, 0, 1, 1]> (m, w)",
    "a shift before borders of the same size": 'm = Add(x, two) y = Conv <auto_pad = "SAME_UPPER"> (m, w)',
    "what makes channels of one": "r = ReduceMax(x, one) m = Mul(r, four) y = Conv(m, w)",
    "what makes a rank": "r = ReduceMax <keepdims = 0> (x, none) m = Mul(r, four) y = Conv(m, w)",
    "a product of two tensors": "c = Conv(x, w, b) d = Conv(x, w) m = Mul(c, d) y = Tanh(m)",
    "the half of a Gelu": "d = Div(x, two) e = Erf(d) a = Add(e, two) p = Mul(x, a) m = Mul(p, half) "
    "y = Conv(m, w)",
    "that of one by tanh": "e = Tanh(x) a = Add(two, e) p = Mul(a, x) m = Mul(half, p) y = Conv(m, w)",
    "an operand that others read": "m = Mul(x, two) c = Conv(m, point) t = Tanh(m) r = ReduceMax(t) "
    "y = Add(c, r)",
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_other_constants_stay(name: str, tmp_path: Path) -> None:
    model = model_of(LEFT[name])
    if name == "what is returned":
        model.graph.output.append(onnx.helper.make_tensor_value_info("z", 1, None))
    scales = ("Add", "Sub", "Mul", "Div")
    before = sum(node.op_type in scales for node in model.graph.node)
    clean = with_shapes(model, tmp_path)
    assert sum(op_types(clean)[kind] for kind in scales) == before
    if name != "what is returned":
        assert_agrees(clean, model, {"x": X})


def test_a_scale_behind_a_gelu_is_folded_up_to_its_half(tmp_path: Path) -> None:
    """onnxruntime has one operator for it, and none for what is left without."""
    model = model_of(
        "d = Div(x, two) e = Erf(d) a = Add(e, two) p = Mul(x, a) m = Mul(p, half) "
        "n = Mul(m, four) y = Conv(n, w)"
    )
    clean = with_shapes(model, tmp_path)
    assert op_types(clean)["Mul"] == 2
    assert_agrees(clean, model, {"x": X})


@pytest.mark.parametrize("extents", [(9,), (4, 5, 6)])
def test_images_may_have_any_rank(extents: tuple[int, ...], tmp_path: Path) -> None:
    rank = len(extents)
    sizes = ", ".join(map(str, extents))
    model = text_model(
        f"g (float[N, 4, {sizes}] x) => (float[] y) {{ t = Tanh(x) m = Mul(t, k) c = Conv(m, v) "
        "a = Add(c, s) y = Tanh(a) }",
        v=normal(6, 4, *[3] * rank),
        k=normal(4, *[1] * rank),
        s=normal(1, 6, *[1] * rank),
    )
    clean = with_shapes(model, tmp_path)
    assert set(op_types(clean)) == {"Conv", "Tanh"}
    assert_agrees(clean, model, {"x": normal(2, 4, *extents)})


def test_weights_of_several_convolutions_are_copied(tmp_path: Path) -> None:
    model = model_of(
        "c = Conv(x, w, b) m = Mul(c, two) n = Neg(x) d = Conv(n, w, b) t = Tanh(d) y = Sub(t, m)"
    )
    clean = with_shapes(model, tmp_path)
    assert op_types(clean) == {"Conv": 2, "Neg": 1, "Sub": 1, "Tanh": 1}
    assert_agrees(clean, model, {"x": X})


def test_weights_that_a_caller_may_replace_stay(tmp_path: Path) -> None:
    body = "c = Conv(x, w, b) m = Mul(c, two) y = Tanh(m)"
    for name, shape in (("w", "6, 4, 3, 3"), ("b", "6"), ("two", "1")):
        model = text_model(
            f"g (float[N, 4, 8, 9] x, float[{shape}] {name}) => (float[] y) {{ {body} }}", **WEIGHTS
        )
        assert "Mul" in op_types(with_shapes(model, tmp_path))


def test_weights_of_16_bits_are_not_rounded_once_more(tmp_path: Path) -> None:
    model = text_model(
        "g (float16[N, 4, 8, 9] x) => (float16[] y) { c = Conv(x, v) m = Mul(c, k) y = Tanh(m) }",
        v=WEIGHTS["w"].astype(np.float16),
        k=WEIGHTS["two"].astype(np.float16),
    )
    assert "Mul" in op_types(with_shapes(model, tmp_path))


def test_weights_of_old_models_are_inputs_too(tmp_path: Path) -> None:
    """Which no caller can replace."""
    model = text_model(
        "g (float[N, 4, 8, 9] x, float[6, 4, 3, 3] w, float[1] two) => (float[] y, int64[] z) "
        "{ c = Conv(x, w) m = Mul(c, two) y = Tanh(m) z = Shape(x) }",
        opset=8,
        w=WEIGHTS["w"],
        two=WEIGHTS["two"],
    )
    model.ir_version = 3
    clean = with_shapes(model, tmp_path)
    assert op_types(clean) == {"Conv": 1, "Shape": 1, "Tanh": 1}
    assert op_types(cut(load_clean_at(tmp_path / "model.onnx", Layout.ORT, tmp_path), Layout.ORT).clean)


def test_a_branch_has_its_own_scales(cache: Path, tmp_path: Path) -> None:
    """A factor outside of a branch does not go into a convolution that runs in it alone."""
    model = text_model(
        "g (float[N, 4, 8, 9] x, bool q) => (float[N, 6, 6, 7] y) { m = Mul(x, two) y = If (q) <"
        "then_branch = t () => (float[N, 6, 6, 7] r) { c = Conv(m, w, b) e = Mul(c, six) r = Tanh(e) }, "
        "else_branch = o () => (float[N, 6, 6, 7] r) { d = Conv(x, w, b) r = Neg(d) }> }",
        **WEIGHTS,
    )
    fused = fuse_to_session(model, tmp_path, cache, shapes={"x": (2, 4, 8, 9)})
    for condition in (True, False):
        for name, (expected, found) in fused.run({"x": X, "q": np.array(condition)}).items():
            assert not compare(name, expected, found).problem
    clean = with_shapes(model, tmp_path)
    assert op_types(clean)["Mul"] == 1


def scaled_net(blocks: int = 6) -> onnx.ModelProto:
    """Convolutions over channels, which kernels are not made for, with learnt scales between them."""
    channels, random = 24, np.random.default_rng(1)
    shape = (channels, channels, 1, 1)
    weights = {f"k{n}": random.standard_normal(shape).astype(np.float32) / 6 for n in range(blocks)}
    layers = "".join(
        f"c{n} = Conv(x{n}, k{n}) l{n} = Mul(c{n}, half) m{n} = Add(l{n}, two) "
        f"o{n} = Mul(m{n}, half) x{n + 1} = Add(o{n}, two) "
        for n in range(blocks)
    )
    end = f"y = GlobalAveragePool(x{blocks})"
    text = f"g (float[1, {channels}, 112, 112] x0) => (float[] y) {{ {layers} {end} }}"
    return text_model(text, half=WEIGHTS["half"], two=WEIGHTS["two"], **weights)


def test_a_model_may_gain_with_no_kernel(tmp_path: Path, cache: Path) -> None:
    """It is written as it was rewritten, without a library, and remembered so."""
    path, output = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(scaled_net(), path)
    options = Options(cache_dir=cache, threads=2)
    report = apollo_fuse.fuse(path, output, options)
    assert report.library is None and report.without_kernels and report.made_for is None
    assert report.latency.speedup is not None and report.latency.speedup > 1
    assert report.verification.passed and report.nodes_after == 7
    written = output.read_bytes()
    assert not {"Mul", "Add"} & {node.op_type for node in onnx.load_from_string(written).graph.node}
    output.unlink()
    again = apollo_fuse.fuse(path, output, options)
    assert again.remembered and again.without_kernels and output.read_bytes() == written
