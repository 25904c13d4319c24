"""Kernels in Triton compute what onnxruntime computes, as far as Triton's interpreter tells."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, note, settings

from apollo_fuse.acceptance import needed_values
from apollo_fuse.capture import capture
from apollo_fuse.codegen.triton import blocks
from apollo_fuse.codegen.triton.emit import Program, emit
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Block, Constant, Load, Op
from apollo_fuse.graph import Refused, Value
from apollo_fuse.index import Index
from apollo_fuse.index import Iterator as Axis
from apollo_fuse.kernel import Buffer, Compute, Copy, Kernel, KernelGroup, Loop, LoopKind, Scope, Target
from apollo_fuse.tolerance import compare
from apollo_fuse.verify import coarsest
from models import BUILDERS, chains, memory_bound
from tests.interpreted import candidates_of, emitted, interpreted, spread
from tests.interpreter import Interpreter
from tests.properties.graphs import RandomModel, models
from tests.test_memory_stitching import pooled_and_normalised
from tests.test_models import small, small_feeds

Array = np.ndarray
ROOT = Path(__file__).parent.parent


def text_model(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')


def normal(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def check_kernels(
    interpreter: Interpreter,
    model: onnx.ModelProto,
    feeds: Mapping[str, Array],
    folder: Path,
    block: int | None = None,
) -> int:
    """Each distinct kernel of the model, and with loops in the grid, on the values that it meets in a run.

    Gives the number of distinct kernels.
    """
    clean, candidates = candidates_of(model, folder)
    distinct = list({x.variant: x for x in candidates}.values())
    made = [value.name or "" for x in distinct for value in x.part.outputs]
    arrays = capture(clean, [*needed_values(distinct), *made], feeds, 2).arrays
    for candidate in distinct:
        inputs = [
            value.const_value.numpy() if value.const_value is not None else arrays[value.name or ""]
            for value in candidate.part.inputs
        ]
        for same in (candidate, *spread(candidate)):
            found = interpreter.run(emitted(same), same.group, inputs, block)
            for value, array in zip(candidate.part.outputs, found, strict=True):
                precision = coarsest([candidate.micro_graph])
                name = f"{candidate.name} {value.name}"
                assert not compare(name, arrays[value.name or ""], array, precision).problem
    return len(distinct)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("programs", [1, 512])
def test_the_kernels_of_a_builder_agree(
    programs: int, name: str, interpreter: Interpreter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_PROGRAMS", programs)  # for 1, items lie side by side in all of them
    model = small(name)
    assert check_kernels(interpreter, model, small_feeds(name, model), tmp_path, block=4)


@pytest.mark.parametrize("columns", [16_384, 20_000])
def test_rows_up_to_the_longest_block_and_beyond(
    columns: int, interpreter: Interpreter, tmp_path: Path
) -> None:
    model = memory_bound.layernorm(3, columns)
    assert check_kernels(interpreter, model, {"x": normal(3, columns)}, tmp_path)


def test_a_row_in_parts_is_combined_from_partial_accumulators(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    model = memory_bound.softmax(1, 500_000)
    _, (candidate,) = candidates_of(model, tmp_path)
    assert any("_parts" in name for launch in emitted(candidate).launches for name in launch.tensors)
    assert check_kernels(interpreter, model, {"x": 4 * normal(1, 500_000)}, tmp_path, block=16_384)


@pytest.mark.parametrize("rows", [3, 200])
def test_the_length_of_a_run_picks_the_form(rows: int, interpreter: Interpreter, tmp_path: Path) -> None:
    model = chains.cross_entropy("rows", 1000)
    feeds = {
        value.name: normal(rows, 1000) if value.type.tensor_type.elem_type == 1 else np.arange(rows) * 3
        for value in model.graph.input
    }
    assert check_kernels(interpreter, model, feeds, tmp_path)


def test_a_reduction_inside_the_loop_of_another_agrees(interpreter: Interpreter, tmp_path: Path) -> None:
    model = pooled_and_normalised(24, 50)
    assert check_kernels(interpreter, model, {"x": normal(3, 24, 50)}, tmp_path, block=16)


def test_rows_side_by_side_keep_to_their_own_part_of_an_output(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    """Five rows of a program's 64: what the others would keep lies behind the output."""
    text = "g (float[n, n, 8] x) => (float[n, n, 8] y) { y = Softmax <axis = 1> (x) }"
    _, (candidate,) = candidates_of(text_model(text), tmp_path)
    stores = [x for x in emitted(candidate).text.splitlines() if "tl.store(t1_own" in x]
    assert stores and all("mask=program_inside" in x for x in stores)
    assert check_kernels(interpreter, text_model(text), {"x": normal(5, 5, 8)}, tmp_path)


def test_what_a_row_keeps_in_memory_is_read_behind_a_barrier(
    interpreter: Interpreter, tmp_path: Path
) -> None:
    model = chains.masked_softmax("batch", 2, "queries", "keys")
    _, (candidate,) = candidates_of(model, tmp_path)
    stores, loads = (emitted(candidate).text.index(f"tl.{call}(t1_own") for call in ("store", "load"))
    assert stores < emitted(candidate).text.index("tl.debug_barrier()") < loads
    shapes = {"mask": (2, 1, 1, 11), "scores": (2, 2, 5, 11)}
    feeds = {value.name: normal(*shapes.get(value.name, ())) for value in model.graph.input}
    assert check_kernels(interpreter, model, feeds, tmp_path, block=4)


@settings(max_examples=15)
@given(models())
def test_a_random_graph_computes_what_it_did(interpreter: Interpreter, model: RandomModel) -> None:
    check_random(interpreter, model)


@pytest.mark.slow
@settings(max_examples=300)
@given(models(most_nodes=25))
def test_many_larger_random_graphs_compute_what_they_did(
    interpreter: Interpreter, model: RandomModel
) -> None:
    check_random(interpreter, model)


def check_random(interpreter: Interpreter, model: RandomModel) -> None:
    note(str(model))
    feeds = {name: normal(*shape) for name, shape in model.shapes.items()}
    for programs in (1, 512):  # items side by side wherever that can be, and where it is worth it
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(blocks, "_PROGRAMS", programs):
            check_kernels(interpreter, model.proto, feeds, Path(folder), block=4)


@pytest.mark.parametrize("count", ["n", "4"])
def test_an_index_outside_of_its_axis_is_taken_to_the_nearest_element(
    count: str, interpreter: Interpreter, tmp_path: Path
) -> None:
    text = f"g (float[5, 3] x, int64[{count}] i) => (float[{count}, 3] z) {{ y = Gather(x, i) z = Relu(y) }}"
    kernels = interpreted(text_model(text), tmp_path, interpreter)
    x = normal(5, 3)
    expected, found = kernels.run({"x": x, "i": np.array([0, -5, 4, -1])})["z"]
    np.testing.assert_array_equal(found, expected)
    (found,) = kernels.fused.run(None, {"x": x, "i": np.array([5, -6, 1 << 40, -(1 << 40)])})
    np.testing.assert_array_equal(found, np.maximum(x[[4, 0, 4, 0]], 0))


def elementwise(size: Index, dtype: DType, op: Op, tile: int = 64) -> KernelGroup:
    """``out0[i] = in0[i] op 3``, over tiles."""
    block, lane = Axis("g0_block", (size + (tile - 1)) // tile), Axis("g0", Index.of(tile))
    offset = Index.of(block) * tile + Index.of(lane)
    expression = Block((Load("in0", (offset,), dtype), Constant(3, dtype), Apply(op, (0, 1), dtype)))
    body = Compute("S0", expression, (Target("out0", offset),))
    limit = size - Index.of(block) * tile
    buffers = tuple(Buffer(name, dtype, size, Scope.GLOBAL) for name in ("in0", "out0"))
    kernel = Kernel("k0", buffers, (block,), (Loop(lane, LoopKind.LANE, (body,), limit),))
    return KernelGroup((Value("in0", dtype, (size,)),), (Value("out0", dtype, (size,)),), (), (), (kernel,))


def program_of(group: KernelGroup) -> Program:
    program = emit(group, "op", "a kernel by hand")
    assert isinstance(program, Program)
    return program


def test_bfloat16_is_computed_in_single_precision(interpreter: Interpreter) -> None:
    group = elementwise(Index.of(100), DType.BFLOAT16, Op.DIV)
    x = (normal(100) * 100).astype(ml_dtypes.bfloat16)
    (found,) = interpreter.run(program_of(group), group, [x])
    expected = (x.astype(np.float32) / 3).astype(ml_dtypes.bfloat16)
    assert not compare("y", expected, found).problem
    assert "tl.div_rn" in program_of(group).text and ".to(tl.float32)" in program_of(group).text


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_zeros_keep_their_signs_and_nan_passes_as_in_c(
    op: str, interpreter: Interpreter, tmp_path: Path
) -> None:
    model = text_model(f"g (float[n] x, float[n] y) => (float[n] z) {{ m = {op}(x, y) z = Neg(m) }}")
    every = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan], np.float32)
    x, y = (part.reshape(-1) for part in np.meshgrid(every, every))
    (found,) = interpreted(model, tmp_path, interpreter).fused.run(None, {"x": x, "y": y})
    second = y > x if op == "Max" else y < x
    expected = -np.where(np.isnan(y) | second, y, x)  # as scalar.h has it
    np.testing.assert_array_equal(found, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found)[number], np.signbit(expected)[number])


@pytest.mark.parametrize(("elements", "wide"), [(2**31 - 1, False), (2**31, True)])
def test_offsets_take_64_bits_where_a_tensor_needs_them(elements: int, wide: bool) -> None:
    text = program_of(elementwise(Index.of(elements), DType.FLOAT32, Op.ADD)).text
    assert ("tl.program_id(0).to(tl.int64)" in text) == wide


def test_more_programs_than_a_grid_has_are_refused() -> None:
    refused = emit(elementwise(Index.of(2**38), DType.UINT8, Op.ADD), "op", "a kernel by hand")
    assert isinstance(refused, Refused)
    assert refused.reason == "more programs than a grid has" and str(2**32) in refused.evidence


def test_more_tensors_than_a_launch_takes_are_refused() -> None:
    """Each is an address, and a launch has 4 KiB for its arguments; of so many parts one is written each."""
    item = Axis("g0", Index.of(64))

    def kernel_of(parts: int) -> Program | Refused:
        names = [f"in{n}" for n in range(parts)]
        buffers = tuple(Buffer(n, DType.FLOAT32, Index.of(64), Scope.GLOBAL) for n in names)
        out = Buffer("out0", DType.FLOAT32, Index.of(64 * parts), Scope.GLOBAL)
        copies = tuple(
            Copy(Target(name, Index.of(item)), Target("out0", Index.of(item) * parts + place))
            for place, name in enumerate(names)
        )
        inputs = tuple(Value(n, DType.FLOAT32, (Index.of(64),)) for n in names)
        outputs = (Value("out0", DType.FLOAT32, (Index.of(64), Index.of(parts))),)
        kernel = Kernel("k0", (*buffers, out), (item,), copies)
        return emit(KernelGroup(inputs, outputs, (), (), (kernel,)), "op", "a kernel by hand")

    assert isinstance(kernel_of(511), Program)
    refused = kernel_of(512)
    assert isinstance(refused, Refused)
    assert refused.reason == "more arguments than a launch has room for" and "513" in refused.evidence


def test_no_name_of_the_model_reaches_the_text(tmp_path: Path) -> None:
    model = text_model("g (float[n, 3] x) => (float[n, 3] z) { y = Relu(x) z = Neg(y) }")
    name = '"""\nimport os\n'
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [name + given for given in names]
        node.name = name + node.op_type
    for value in (*model.graph.input, *model.graph.output):
        value.name = name + value.name
    _, (candidate,) = candidates_of(model, tmp_path)
    assert "import os" not in emitted(candidate).text


def test_kernels_are_dumped_where_triton_is_not_installed(tmp_path: Path, cache: Path) -> None:
    onnx.save(memory_bound.mish(8, 48), tmp_path / "net.onnx")
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from pathlib import Path\n"
        "from apollo_fuse import Options, fuse\n"
        "options = Options(dump=Path('dump'), fuse_all=True, measure=False, cache_dir=Path(sys.argv[1]))\n"
        "fuse('net.onnx', options=options)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(cache)], cwd=tmp_path, env=environment, check=True)
    (written,) = (tmp_path / "dump").glob("*.triton.py")
    assert "@triton.jit" in written.read_text()
