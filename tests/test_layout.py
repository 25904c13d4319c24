"""Models cut behind all of onnxruntime's optimisations: tensors in blocks, and what works on them there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import apollo_fuse
from apollo_fuse import layout
from apollo_fuse.blocked import DOMAIN, block_size
from apollo_fuse.cpu import CpuTargets
from apollo_fuse.errors import UsageError
from apollo_fuse.layout import Cut, Layout, cut, load_clean_at, pin
from apollo_fuse.onnx_io import beside_weights, load_clean
from apollo_fuse.options import Options
from apollo_fuse.tolerance import compare
from models import networks
from models.writing import Graph

pytestmark = pytest.mark.skipif(block_size() < 2, reason="this onnxruntime has no blocked layout")

Array = np.ndarray
SIZE = 6
SHAPE = apollo_fuse.InputShape("x", (1, 3, 8, 8))
_ANY = ["n", "c", "h", "w"]


class Net:
    """A graph of convolutions of `channels` channels over images of SIZE by SIZE."""

    def __init__(self, channels: int, batch: int | str = 1) -> None:
        self.graph = Graph("net")
        self.channels = channels
        self.batch = batch
        self.random = np.random.default_rng(0)
        self.count = 0

    def start(self) -> str:
        return self.convolution(self.graph.input("x", [self.batch, 3, SIZE, SIZE]), 3)

    def weight(self, *shape: int) -> str:
        self.count += 1
        return self.graph.weight(f"w{self.count}", self.random.standard_normal(shape).astype(np.float32))

    def convolution(self, x: str, inputs: int | None = None) -> str:
        weight = self.weight(self.channels, self.channels if inputs is None else inputs, 3, 3)
        return self.graph.op("Conv", x, weight, kernel_shape=[3, 3], pads=[1] * 4)

    def finish(self, x: str, *others: str) -> onnx.ModelProto:
        """The model, with a last convolution of `x`; `others` are outputs too."""
        self.graph.output(self.convolution(x), "out", _ANY)
        model = self.graph.model()
        types = [helper.make_tensor_value_info(name, TensorProto.FLOAT, _ANY) for name in others]
        model.graph.output.extend(types)
        return model


def cut_blocked(model: onnx.ModelProto, folder: Path) -> Cut:
    onnx.save(model, folder / "model.onnx")
    return cut(load_clean_at(folder / "model.onnx", Layout.ORT, folder), Layout.ORT)


def op_types(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(model: onnx.ModelProto | ir.Model, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if isinstance(model, ir.Model):
        beside_weights(options, model)
        model = ir.to_proto(model)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, feeds)]


def image(batch: int = 1) -> dict[str, Array]:
    random = np.random.default_rng(1)
    return {"x": random.standard_normal((batch, 3, SIZE, SIZE)).astype(np.float32)}


def assert_same(expected: list[Array], found: list[Array]) -> None:
    for place, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert a.shape == b.shape
        assert not compare(f"output {place}", a, b).problem


def assert_cut_computes(model: onnx.ModelProto, blocked: Cut, batch: int = 1) -> None:
    assert_same(run(model, image(batch)), run(blocked.clean, image(batch)))


def test_what_onnxruntime_writes_behind_all_optimisations_computes_the_same_bits(tmp_path: Path) -> None:
    net = Net(24)
    model = net.finish(net.graph.op("Tanh", net.graph.op("Add", net.start(), 3.0)))
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=True, location="weights", size_threshold=64
    )
    level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    loaded = load_clean(tmp_path / "model.onnx", tmp_path, level)
    assert any(node.domain == DOMAIN for node in loaded.graph)
    for a, b in zip(run(net.graph.model(), image()), run(loaded, image()), strict=True):
        assert a.tobytes() == b.tobytes()


def test_a_default_that_the_caller_may_replace_is_no_constant(tmp_path: Path) -> None:
    net = Net(block_size())
    scale = net.weight(net.channels, 1, 1)
    model = net.finish(net.graph.op("Mul", net.start(), scale))
    shape = [net.channels, 1, 1]
    model.graph.input.append(helper.make_tensor_value_info(scale, TensorProto.FLOAT, shape))
    blocked = cut_blocked(model, tmp_path)
    for feeds in (image(), image() | {scale: np.full(shape, 2.0, np.float32)}):
        assert_same(run(model, feeds), run(blocked.clean, feeds))


@pytest.mark.parametrize("channels", [48, 40, 24, 20])
def test_elementwise_operators_between_convolutions_need_no_reorder(tmp_path: Path, channels: int) -> None:
    net = Net(channels)
    x = net.start()
    x = net.graph.op("Mul", x, net.graph.op("Clip", net.graph.op("Add", x, 3.0), 0.0, 6.0))
    model = net.finish(net.graph.op("Div", x, 6.0))
    blocked = cut_blocked(model, tmp_path)
    found = op_types(blocked.clean)
    assert found["ReorderInput"] == 0
    assert found["ReorderOutput"] == 1  # of the result
    assert_cut_computes(model, blocked)


def test_squeeze_and_excitation_is_computed_in_blocks(tmp_path: Path) -> None:
    model = networks.hardswish_se_net(channels=32, size=8, blocks=2)
    onnx.save(model, tmp_path / "model.onnx")
    blocked = cut(load_clean_at(tmp_path / "model.onnx", Layout.ORT, tmp_path), Layout.ORT)
    found = op_types(blocked.clean)
    assert (found["ReorderInput"], found["ReorderOutput"]) == (0, 1)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    assert_same(run(model, feeds), run(blocked.clean, feeds))


@pytest.mark.parametrize("channels", [48, 40, 20])
@pytest.mark.parametrize("pool", ["MaxPool", "AveragePool"])
def test_pools_that_make_images_smaller_do_so_in_blocks(tmp_path: Path, channels: int, pool: str) -> None:
    """Before the reorder, where others need rows, which has less to move then."""
    net = Net(channels)
    x = net.graph.op(pool, net.start(), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    x = net.graph.op("Transpose", net.graph.op(pool, x, kernel_shape=[2, 2]), perm=[0, 1, 3, 2])
    model = net.finish(x)
    blocked = cut_blocked(model, tmp_path)
    smaller, same = (node for node in blocked.clean.graph if node.op_type == pool)
    assert smaller.domain == DOMAIN
    assert same.domain == (DOMAIN if channels % block_size() == 0 else "")  # as onnxruntime has it
    assert_cut_computes(model, blocked)


def test_what_is_needed_flat_and_in_its_true_shape_is_written_flat(tmp_path: Path) -> None:
    """The gate, which no kernel can hold beside what it is made from, sees the flat tensor through a view."""
    net = Net(2 * block_size())
    x = net.graph.op("Sub", net.weight(net.channels, 1, 1), net.start())
    gate = net.convolution(net.graph.op("GlobalAveragePool", x))
    model = net.finish(net.graph.op("Mul", x, net.graph.op("Tanh", gate)))
    blocked = cut_blocked(model, tmp_path)
    made, gated = (next(n for n in blocked.clean.graph if n.op_type == name) for name in ("Sub", "Mul"))
    (view,) = {user for user, _ in made.outputs[0].uses()}
    again = next(v.producer() for v in gated.inputs if v.producer().inputs[0] in view.outputs)
    assert view.op_type == again.op_type == "Reshape"
    assert_cut_computes(model, blocked)


def test_what_is_undefined_at_zero_stays_in_rows_where_channels_do_not_fill_blocks(tmp_path: Path) -> None:
    for channels, reorders in ((block_size() * 2, 0), (block_size() + 4, 1)):
        net = Net(channels)
        model = net.finish(net.graph.op("Reciprocal", net.start()))
        blocked = cut_blocked(model, tmp_path)
        assert op_types(blocked.clean)["ReorderInput"] == reorders
        assert bool(blocked.refused) == bool(reorders)
        assert_cut_computes(model, blocked)


def test_an_operator_that_looks_at_places_stays_in_rows(tmp_path: Path) -> None:
    net = Net(block_size())
    model = net.finish(net.graph.op("Trilu", net.start()))
    blocked = cut_blocked(model, tmp_path)
    assert op_types(blocked.clean)["ReorderInput"] == 1
    assert [r.evidence for r in blocked.refused] == [
        "an element of the result depends on others than those of its place"
    ]
    assert_cut_computes(model, blocked)


def test_an_operand_that_is_a_shape_is_not_taken_for_data(tmp_path: Path) -> None:
    net = Net(block_size(), "batch")
    x = net.graph.op("Add", net.start(), 3.0)
    model = net.finish(net.graph.op("Expand", x, net.graph.op("Shape", x)))
    blocked = cut_blocked(model, tmp_path)
    assert "Expand needs rows" in [r.reason for r in blocked.refused]
    assert_cut_computes(model, blocked, 2)


def test_results_that_rows_are_needed_of_are_had_in_both_layouts(tmp_path: Path) -> None:
    net = Net(block_size())
    x = net.graph.op("Add", net.start(), 3.0)
    model = net.finish(x, x, net.graph.op("Transpose", x, perm=[0, 2, 3, 1]))
    blocked = cut_blocked(model, tmp_path)
    assert op_types(blocked.clean)["ReorderInput"] == 0
    assert_cut_computes(model, blocked)


def test_joins_pools_and_upsampling_stay_in_blocks(tmp_path: Path) -> None:
    net = Net(block_size())
    x = net.graph.op("Add", net.start(), 3.0)
    scales = np.array([1, 1, 2, 2], np.float32)
    nearest = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    wide = net.graph.op("Resize", x, "", scales, **nearest)
    joined = net.graph.op("Concat", wide, net.graph.op("Mul", wide, 2.0), axis=1)
    pooled = net.graph.op("ReduceMean", joined, np.array([2, 3], np.int64), keepdims=1)
    gated = net.graph.op("Mul", joined, pooled)
    weight = net.weight(16, 2 * net.channels, 3, 3)
    out = net.graph.op("Conv", gated, weight, kernel_shape=[3, 3])
    net.graph.output(out, "out", _ANY)
    model = net.graph.model()
    blocked = cut_blocked(model, tmp_path)
    found = op_types(blocked.clean)
    assert (found["ReorderInput"], found["Upsample"], found["GlobalAveragePool"]) == (0, 1, 1)
    assert_cut_computes(model, blocked)


_UNARY = ("Relu", "Sigmoid", "Neg", "HardSwish", "Abs", "Exp", "Softplus")
_STEPS = st.lists(
    st.sampled_from(
        [*_UNARY, "scalar", "channels", "places", "columns", "gate", "expand", "sum", "transpose", "conv"]
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30)
@given(st.sampled_from([4, 8, 16, 20, 32]), st.sampled_from([1, 2, "batch"]), _STEPS)
def test_the_blocked_graph_computes_the_same(
    tmp_path_factory: pytest.TempPathFactory, channels: int, batch: int | str, steps: list[str]
) -> None:
    # no step lets values grow beyond bounds: a gate would show the rounding of what is large in all of it
    net = Net(channels, batch)
    graph, made = net.graph, [net.start()]
    for step in steps:
        x = made[-1]
        match step:
            case "scalar":
                y = graph.op("Mul", x, net.weight(1))
            case "channels":
                y = graph.op("Add", x, net.weight(channels, 1, 1))
            case "places":
                greatest = graph.op("ReduceMax", x, np.array([1], np.int64), keepdims=1)
                y = graph.op("Mul", x, graph.op("Tanh", greatest))
            case "columns":
                y = graph.op("Sub", net.weight(SIZE), x)
            case "gate":
                y = graph.op("Mul", graph.op("Sigmoid", graph.op("GlobalAveragePool", x)), x)
            case "expand":
                y = graph.op("Expand", x, np.array([1, channels, 1, SIZE], np.int64))
            case "sum":
                y = graph.op("Add", x, made[0])
            case "transpose":
                y = graph.op("Transpose", x, perm=[0, 1, 3, 2])
            case "conv":
                y = graph.op("Tanh", net.convolution(x))
            case "Exp":
                y = graph.op("Exp", graph.op("Neg", graph.op("Abs", x)))
            case _:
                y = graph.op(step, x)
        made.append(y)
    model = net.finish(made[-1])
    blocked = cut_blocked(model, tmp_path_factory.mktemp("net"))
    assert_cut_computes(model, blocked, 2 if batch == "batch" else int(batch))


@pytest.mark.parametrize("build", [networks.silu_net, networks.hardswish_se_net])
@pytest.mark.parametrize("chosen", ["portable", "ort"])
def test_a_fused_model_computes_the_same_with_and_without_its_library(
    tmp_path: Path, cache: Path, chosen: str, build: object
) -> None:
    assert callable(build)
    model = build(channels=24, size="size", blocks=2)
    path, output = tmp_path / "model.onnx", tmp_path / "fused.onnx"
    onnx.save(model, path)
    options = Options(
        layout=chosen, measure=False, strict=True, fuse_all=True, cache_dir=cache, shapes=(SHAPE,)
    )
    report = apollo_fuse.fuse(path, output, options)
    assert report.library is not None
    assert report.layout == chosen
    onnx.checker.check_model(str(output))
    blocked = any(node.domain == DOMAIN for node in onnx.load(output).graph.node)
    assert blocked == (report.made_for is not None) == (chosen == "ort")
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 10, 10)).astype(np.float32)}
    with_library = [np.asarray(a) for a in apollo_fuse.session(output).run(None, feeds)]
    assert_same(run(model, feeds), with_library)
    assert_same(with_library, run(onnx.load(output), feeds))


@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_blocked_model_fails_by_name_where_blocks_have_another_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    net = Net(64)
    blocked = cut_blocked(net.finish(net.graph.op("Mul", net.start(), 2.0)), tmp_path)
    ours = block_size()
    monkeypatch.setattr(layout, "block_size", lambda: size)  # as if it were made on another machine
    pin(blocked.clean)
    if size == ours:
        run(blocked.clean, image())
        return
    with pytest.raises(Exception, match=f"made for .* blocks of {size} channels; fuse it again"):
        run(blocked.clean, image())


def test_no_operator_is_left_to_a_convolution_that_has_been_optimised(tmp_path: Path, cache: Path) -> None:
    net = Net(block_size())
    x = net.graph.op("Relu", net.graph.op("Sub", net.weight(1), net.start()))
    onnx.save(net.finish(x), tmp_path / "model.onnx")
    report = apollo_fuse.fuse(
        tmp_path / "model.onnx", options=Options(layout="ort", measure=False, cache_dir=cache)
    )
    assert not any(refusal.rule == "leave_to_convolution" for refusal in report.refused)
    assert [kernel.ops for kernel in report.accepted] == [("Sub", "Relu")]


def test_a_model_is_rewritten_before_it_is_laid_out(tmp_path: Path) -> None:
    """Scales behind convolutions are in their weights; they would be operators on blocks."""
    net = Net(block_size())
    x = net.graph.op("Add", net.graph.op("Mul", net.start(), net.weight(1)), net.weight(1))
    model = net.finish(x)
    blocked = cut_blocked(model, tmp_path)
    assert not {"Mul", "Add"} & set(op_types(blocked.clean)) and "Conv" in op_types(blocked.clean)
    assert_same(run(model, image()), run(blocked.clean, image()))


def test_auto_measures_both_layouts_and_takes_one_of_them(tmp_path: Path, cache: Path) -> None:
    onnx.save(networks.hardswish_se_net(size=28, blocks=1), tmp_path / "model.onnx")
    output = tmp_path / "fused.onnx"
    report = apollo_fuse.fuse(tmp_path / "model.onnx", output, Options(layout="auto", cache_dir=cache))
    assert [tried.layout for tried in report.layouts] in ([], ["portable", "ort"])
    blocked = any(node.domain == DOMAIN for node in onnx.load(output).graph.node)
    assert blocked == (report.layout == "ort") == (report.made_for is not None)


def test_the_default_runs_anywhere() -> None:
    assert Options().layout == "portable"


def test_auto_cannot_be_decided_without_measuring() -> None:
    with pytest.raises(UsageError, match="decided by measuring"):
        Options(layout="auto", measure=False)
    with pytest.raises(UsageError, match="expected one of portable, ort, auto"):
        Options(layout="nchw")


def test_blocks_are_for_this_machine_alone() -> None:
    with pytest.raises(UsageError, match="is for this machine, and the processors are aarch64"):
        Options(layout="ort", cpu=CpuTargets.parse("aarch64"))
