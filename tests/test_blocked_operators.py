"""Operators on tensors in blocks of channels: reorders, what fuses with them, and factors written as convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from apollo_fuse import blocked
from apollo_fuse.blocked import DOMAIN, block_size, whole_blocks
from apollo_fuse.codegen.c import emit
from apollo_fuse.doubles import in_doubles
from apollo_fuse.operators import blocks
from apollo_fuse.passes.build_scop import BuildScop
from apollo_fuse.scop import Scop
from tests.fusing import Array, fuse_to_session, reference_session
from tests.interpreted import Kernels, candidates_of
from tests.interpreter import Interpreter
from tests.test_operators import Case, Dims, Table, check, check_reduced, fused, shapes, sized, values

pytestmark = pytest.mark.skipif(block_size() < 2, reason="this onnxruntime has no blocked layout")

ROWS = (4, 8, 12, 16, 20, 40, 48, 72, 136)
"""Channels that onnxruntime's ReorderInput takes: multiples of 4."""
CHANNELS = (1, 2, 3, 7, 17, 22, 30, *ROWS)


def reorders() -> Table:
    inputs: dict[str, tuple[str, Dims]] = {}
    cases: list[Case] = []
    for last in (0, 1):
        for count in ROWS:
            inputs[f"rows{count}_{last}"] = (
                "float32",
                ["n", "h", "w", count] if last else ["n", count, "h", "w"],
            )
            cases.append(Case("ReorderInput", f"rows{count}_{last}", {"channels_last": last}, DOMAIN))
        for count in CHANNELS:
            filled = whole_blocks(count, block_size())
            inputs[f"blocks{filled}"] = ("float32", ["n", filled, "h", "w"])
            attributes = {"channels": count, "channels_last": last}
            cases.append(Case("ReorderOutput", f"blocks{filled}", attributes, DOMAIN))
    return Table(inputs, cases)


def pools() -> Table:
    inputs: dict[str, tuple[str, Dims]] = {"x": ("float32", ["n", 2 * block_size(), "h", "w"])}
    return Table(inputs, [Case(op, "x", domain=DOMAIN) for op in ("GlobalAveragePool", "GlobalMaxPool")])


def scales() -> Table:
    random = np.random.default_rng(0)
    channels = 2 * block_size()
    constants = {
        "w": random.standard_normal((channels, 1, 1, 1)).astype(np.float32),
        "b": random.standard_normal(channels).astype(np.float32),
    }
    once = {"group": channels, "kernel_shape": [1, 1]}
    cases = [
        Case("Conv", "x w", once, DOMAIN),
        Case("Conv", "x w b", {**once, "strides": [1, 1], "pads": [0, 0, 0, 0]}, DOMAIN),
        Case("Conv", "x w b y", {**once, "activation": "Relu"}, DOMAIN),
        Case("Conv", "x w - y", once, DOMAIN),
    ]
    shape: Dims = ["n", channels, "h", "w"]
    return Table({"x": ("float32", shape), "y": ("float32", shape)}, cases, constants)


EXTENTS = (
    {"n": 1, "h": 28, "w": 28},
    {"n": 2, "h": 5, "w": 7},
    {"n": 3, "h": 1, "w": 1},
    {"n": 1, "h": 9, "w": 40},
)


def test_reorders(tmp_path: Path, cache: Path) -> None:
    table = reorders()
    model = fused(table, tmp_path, cache, shapes(sized(table, EXTENTS[1])))
    for extents in EXTENTS:
        check(model, sized(table, extents), exact=True)
        check(model, sized(table, extents, special=True), exact=True)


def test_pools(tmp_path: Path, cache: Path) -> None:
    table = pools()
    model = fused(table, tmp_path, cache, shapes(sized(table, EXTENTS[1])))
    for extents in EXTENTS:
        check_reduced(model, sized(table, extents))


def test_a_pool_is_one_kernel_with_what_it_pools(tmp_path: Path, cache: Path) -> None:
    """Between views of open extents, and with the tensor itself, which a gate needs later."""
    block = block_size()
    net = Net(["n", 2 * block, "h", "w"])
    true = net.op("Reshape", "x", net.weight(np.array([0, 2, 0, 0, block])))
    moved = net.op("Tanh", net.op("Add", true, net.weight(values("float32", (2, 1, 1, block)))))
    flat = net.op("Reshape", moved, net.weight(np.array([0, 2 * block, 0, 0])))
    pooled = net.op("GlobalAveragePool", flat, domain=DOMAIN)
    shape = (2, 2 * block, *IMAGE)
    model = fuse_to_session(net.model(flat, pooled), tmp_path, cache, shapes={"x": shape})
    assert not model.unfused_nodes
    assert len(model.report.kernels) == 1
    check_reduced(model, {"x": values("float32", shape)})


def test_factors_that_are_written_as_convolutions(tmp_path: Path, cache: Path) -> None:
    table = scales()
    model = fused(table, tmp_path, cache, shapes(sized(table, EXTENTS[1])))
    for extents in EXTENTS:
        check(model, sized(table, extents))


@pytest.mark.parametrize(
    ("weights", "attributes", "reason"),
    [
        ((0, 1, 3, 3), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, "a convolution"),
        ((0, 1, 1, 1), {"kernel_shape": [1, 1], "strides": [2, 2]}, "a convolution with pads or strides"),
        ((0, 1, 1, 1), {"kernel_shape": [1, 1], "activation": "Tanh"}, "Tanh behind it"),
    ],
)
def test_what_is_more_than_a_factor_stays_with_onnxruntime(
    weights: tuple[int, ...], attributes: dict[str, object], reason: str, tmp_path: Path, cache: Path
) -> None:
    channels = block_size()
    array = np.ones((channels, *weights[1:]), np.float32)
    case = Case("Conv", "x w", {"group": channels, **attributes}, DOMAIN)
    model = Table({"x": ("float32", [1, channels, 4, 4])}, [case], {"w": array}).model()
    result = fuse_to_session(model, tmp_path, cache)
    assert "Conv" in result.unfused_nodes
    assert [refused.evidence for refused in result.report.refused if refused.nodes == ("case0",)] == [reason]


class Net:
    """Operators one after the other, of the standard domain or on blocks."""

    def __init__(self, shape: Dims) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)

    def weight(self, array: Array) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op_type: str, *operands: str, domain: str = "", **attributes: object) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, operands, [name], name, domain=domain, **attributes))
        return name

    def model(self, *results: str) -> onnx.ModelProto:
        outputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b", "c", "d"]) for name in results
        ]
        graph = helper.make_graph(self.nodes, "net", [self.x], outputs, self.weights)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def shuffled(net: Net, x: str, channels: int, groups: int) -> str:
    """The channels changed over between groups."""
    extents = (0, groups, channels // groups, *IMAGE)
    split = net.op("Reshape", x, net.weight(np.array(extents)))
    mixed = net.op("Transpose", split, perm=[0, 2, 1, 3, 4])
    return net.op("Reshape", mixed, net.weight(np.array([0, channels, *IMAGE])))


IMAGE = (6, 11)


@pytest.mark.parametrize("channels", [12, 16, 20, 48, 88, 136])
def test_a_channel_shuffle_with_its_reorders_is_one_kernel(
    channels: int, tmp_path: Path, cache: Path
) -> None:
    filled = whole_blocks(channels, block_size())
    net = Net([2, filled, *IMAGE])
    rows = net.op("ReorderOutput", "x", domain=DOMAIN, channels=channels, channels_last=0)
    out = net.op("ReorderInput", shuffled(net, rows, channels, 4), domain=DOMAIN)
    model = fuse_to_session(net.model(out), tmp_path, cache)
    assert not model.unfused_nodes
    assert len(model.report.kernels) == 1
    check(model, {"x": values("float32", (2, filled, *IMAGE))}, exact=True)


def test_a_shuffle_into_blocks_goes_from_memory_to_memory(tmp_path: Path, cache: Path) -> None:
    net = Net([1, 2 * block_size(), *IMAGE])
    out = net.op("ReorderInput", shuffled(net, "x", 2 * block_size(), 4), domain=DOMAIN)
    (candidate,) = candidates_of(net.model(out), tmp_path)[1]
    text = emit(candidate.group, candidate.name, "")
    assert "_tile" not in text
    if block_size() > 8:  # fewer channels are written side by side in one turn
        assert "af_transpose_at_32(out0" in text


def test_what_may_be_one_row_is_broadcast_into_blocks(tmp_path: Path, cache: Path) -> None:
    """A level of a feature pyramid, which others need as it is too: both are written in the same loops."""
    channels = 3 * block_size()
    net = Net(["n", channels, "h", "w"])
    wide = net.op("Resize", "x", "", net.weight(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    level = net.op("MaxPool", "x", kernel_shape=[3, 3], strides=[2, 2])
    added = net.op("Add", wide, level)
    model = net.model(added, net.op("ReorderInput", added, domain=DOMAIN))
    (both,) = (c for c in candidates_of(model, tmp_path)[1] if len(c.part.nodes) > 1)
    scop = BuildScop()(both.micro_graph)
    assert isinstance(scop, Scop)
    assert len({frozenset(i.extent for i in s.domain if not i.extent.is_one) for s in scop.statements}) == 1
    fused_model = fuse_to_session(model, tmp_path, cache, shapes={"x": (1, channels, 3, 3)})
    assert not fused_model.unfused_nodes
    check(fused_model, {"x": values("float32", (1, channels, 3, 3))})


@pytest.mark.parametrize("times", [1, 3, 7])
def test_a_mean_over_blocks_runs_along_them(times: int, tmp_path: Path, cache: Path) -> None:
    """Also where the image, in which what is added up is needed too, could be parted into blocks everywhere."""
    block = block_size()
    image = (block * times, block * times)
    net = Net([1, 2 * block, *image])
    true = net.op("Reshape", "x", net.weight(np.array([0, 2, *image, block])))
    moved = net.op("Tanh", true)
    flat = net.op("Reshape", moved, net.weight(np.array([0, 2 * block, *image])))
    model = net.model(flat, net.op("GlobalAveragePool", flat, domain=DOMAIN))
    (candidate,) = candidates_of(model, tmp_path)[1]
    scop = BuildScop()(candidate.micro_graph)
    assert isinstance(scop, Scop)
    assert all(len(s.domain) <= 4 for s in scop.statements)
    x = values("float32", (1, 2 * block, *image))
    check_reduced(fuse_to_session(model, tmp_path, cache), {"x": x})


@pytest.mark.parametrize("seed", range(12))
def test_what_lies_between_reorders(seed: int, tmp_path: Path, cache: Path) -> None:
    """Random operators on rows, some of whose results others need too, then blocks again, and operators on them."""
    random = np.random.default_rng(seed)
    channels = int(random.choice(ROWS[:-1]))
    batch: str | int = random.choice(["n", 2])
    filled = whole_blocks(channels, block_size())
    net = Net([batch, filled, *IMAGE])
    x = net.op("Relu", "x") if random.random() < 0.5 else "x"
    x = net.op("ReorderOutput", x, domain=DOMAIN, channels=channels, channels_last=0)
    needed: list[str] = []
    for step in random.choice(["Sigmoid", "scale", "concat", "split", "shuffle", "twice", "needed"], 4):
        match step:
            case "scale":
                x = net.op("Mul", x, net.weight(values("float32", (channels, 1, 1), seed)))
            case "concat" if channels < 100:
                x = net.op("Concat", x, net.op("Neg", x), axis=1)
                channels *= 2
            case "split" if channels % 8 == 0:
                half = net.weight(np.array([channels // 2]))
                x = net.op("Slice", x, net.weight(np.array([0])), half, net.weight(np.array([1])))
                channels //= 2
            case "shuffle":
                x = shuffled(net, x, channels, 2)
            case "twice":
                x = net.op("Add", x, x)
            case "needed":
                x = net.op("Tanh", x)
                needed.append(x)
            case _:
                x = net.op("Sigmoid", x)
    x = net.op("ReorderInput", x, domain=DOMAIN)
    needed.append(x)
    if random.random() < 0.5:
        needed.append(net.op("Exp", x))
    model = fuse_to_session(
        net.model(*dict.fromkeys(needed)), tmp_path, cache, shapes={"x": (2, filled, *IMAGE)}
    )
    assert not model.unfused_nodes
    check(model, {"x": values("float32", (2, filled, *IMAGE), seed)})


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("channels", [16, 20, 28])
def test_blocks_of_any_size(
    channels: int, size: int, tmp_path: Path, interpreter: Interpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that onnxruntime has on other machines too: here nothing but kernels can compute with them."""
    for module in (blocked, blocks):
        monkeypatch.setattr(module, "block_size", lambda: size)
    filled = whole_blocks(channels, size)
    net = Net([2, filled, *IMAGE])
    rows = net.op("ReorderOutput", "x", domain=DOMAIN, channels=channels, channels_last=0)
    out = net.op("ReorderInput", shuffled(net, rows, channels, 4), domain=DOMAIN)
    clean, candidates = candidates_of(net.model(rows, out), tmp_path)
    x = values("float32", (2, filled // size, *IMAGE, size))
    found = Kernels(clean, candidates, interpreter).run(None, {"x": x.reshape(2, filled, *IMAGE)})
    expected = x.transpose(0, 1, 4, 2, 3).reshape(2, filled, *IMAGE)[:, :channels]
    np.testing.assert_array_equal(found[0], expected)
    mixed = expected.reshape(2, 4, channels // 4, *IMAGE).swapaxes(1, 2).reshape(2, channels, *IMAGE)
    mixed = np.pad(mixed, [(0, 0), (0, filled - channels), (0, 0), (0, 0)])
    in_blocks = mixed.reshape(2, filled // size, size, *IMAGE).transpose(0, 1, 3, 4, 2)
    np.testing.assert_array_equal(found[1], in_blocks.reshape(2, filled, *IMAGE))


@pytest.mark.parametrize("last", [0, 1])
def test_blocks_are_pooled_and_put_into_rows_in_doubles(last: int) -> None:
    """What judges between a kernel and onnxruntime, which adds up all of an image in single precision."""
    filled, channels = whole_blocks(11, block_size()), 11
    rows = np.random.default_rng(0).uniform(0.5, 1, (2, filled, *IMAGE)).astype(np.float32)
    blocks = np.moveaxis(rows.reshape(2, -1, block_size(), *IMAGE), 2, 4).reshape(rows.shape)
    net = Net([2, filled, *IMAGE])
    pooled = net.op("GlobalAveragePool", "x", domain=DOMAIN)
    attributes = {"channels": channels, "channels_last": last}
    model = net.model(
        net.op("ReorderOutput", pooled, domain=DOMAIN, **attributes),
        net.op("ReorderOutput", "x", domain=DOMAIN, **attributes),
    )
    found = in_doubles(ir.from_proto(model), {"x": np.ascontiguousarray(blocks)})
    image = rows[:, :channels].astype(np.float64)
    for result, expected in zip(found, (image.mean((2, 3), keepdims=True), image), strict=True):
        np.testing.assert_allclose(result, np.moveaxis(expected, 1, 3) if last else expected, rtol=1e-14)
    for result, own in zip(reference_session(model).run(None, {"x": blocks}), found, strict=True):
        np.testing.assert_allclose(result, own, rtol=1e-5)
