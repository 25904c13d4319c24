"""The plugin inside onnxruntime, with hand-written kernels in the place of generated ones."""

import gc
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from apollo_fuse.codegen import link, table
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cpu import Cpu
from apollo_fuse.errors import UsageError
from apollo_fuse.runtime import session

# y = relu(x + b), through a temporary; s = the sum of each row of y, through scratch, plus 1000: the function
# of the model adds nothing, so the 1000 tells that the kernel ran.
KERNELS = r"""
#include "kernel.h"
#include "vmath.h"
#include <stdio.h>

static int64_t rows(const int64_t *n) { return n[0]; }
static int64_t much(const int64_t *n) { return (void)n, 1 << 18; }
static int64_t none(const int64_t *n) { return (void)n, 0; }
static int64_t row_bytes(const int64_t *n) { return n[1] * 4; }

static void add(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end) {
  const float *x = buffers[0], *b = buffers[1];
  float *t = buffers[4];
  (void)scratch;
  for (int64_t i = begin; i < end; i++)
    for (int64_t j = 0; j < n[1]; j++) t[i * n[1] + j] = x[i * n[1] + j] + b[j];
}

static void relu_and_sum(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end) {
  float *y = buffers[2], *s = buffers[3], *row = scratch;
  const float *t = buffers[4];
  if ((uintptr_t)row % 64 || (uintptr_t)t % 64) __builtin_trap();
  for (int64_t i = begin; i < end; i++) {
    float sum = 1000.0f;
    for (int64_t j = 0; j < n[1]; j++) row[j] = t[i * n[1] + j] > 0 ? t[i * n[1] + j] : 0;
    for (int64_t j = 0; j < n[1]; j++) sum += y[i * n[1] + j] = row[j];
    s[i] = sum;
  }
}

static int check(void *const *buffers, const int64_t *n, char *message, size_t size) {
  (void)buffers, (void)n, (void)message, (void)size;
  return 0;
}

static int bind(const int64_t *const *shapes, void *const *buffers, int64_t *n, char *message, size_t size) {
  (void)buffers;
  n[0] = shapes[0][0];
  n[1] = shapes[0][1];
  if (shapes[1][0] == n[1]) return 0;
  snprintf(message, size, "input b has extent %d, expected %d.", (int)shapes[1][0], (int)n[1]);
  return 1;
}

static void output_shapes(const int64_t *n, int64_t *const *shapes) {
  shapes[0][0] = shapes[1][0] = n[0];
  shapes[0][1] = n[1];
}

static void temporary_bytes(const int64_t *n, int64_t *bytes) { bytes[0] = n[0] * n[1] * 4; }

static const af_kernel first = {rows, much, none, add}, second = {rows, much, row_bytes, relu_and_sum};
static const af_kernel *const kernels[] = {&first, &second};
static const int32_t types[] = {1, 1}, input_ranks[] = {2, 1}, output_ranks[] = {2, 1};

const af_op AF_OP(fused_op) = {
    .name = "Fused", .input_count = 2, .output_count = 2, .temporary_count = 1, .symbol_count = 2,
    .kernel_count = 2, .input_types = types, .output_types = types, .input_ranks = input_ranks,
    .output_ranks = output_ranks, .bind = bind, .check = check, .output_shapes = output_shapes,
    .temporary_bytes = temporary_bytes, .kernels = kernels};
"""


NODE = table.Node("Fused", ("fused_op",), (0, 1), 2)
REPORTING = KERNELS.replace("sum = 1000.0f;", "sum = 1000.0f + AF_LEVEL;")


def write_model(path: Path, rows: int | str = "N", columns: int | str = "M", rank: int = 2) -> Path:
    body = [
        helper.make_node("Add", ["x", "b"], ["t"]),
        helper.make_node("Relu", ["t"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["s"], keepdims=0),
    ]
    axes = helper.make_node(
        "Constant", [], ["axes"], value=helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    )
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("apollo_fuse", 1)]
    function = helper.make_function("apollo_fuse", "Fused", ["x", "b"], ["y", "s"], [axes, *body], opset)
    shape = [rows, columns, 1, 1][:rank]
    graph = helper.make_graph(
        [helper.make_node("Fused", ["x", "b"], ["y", "s"], "fused", domain="apollo_fuse")],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, ["B"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=opset, functions=[function], ir_version=10)
    onnx.save(model, path)
    return path


def build(path: Path, source: str = KERNELS, cpus: Sequence[Cpu] = (Cpu.native(),)) -> Path:
    cache = path.parent / "cache"
    toolchains = [Toolchain.find({"PATH": "/usr/bin:/bin"}, cpu) for cpu in cpus]
    objects = [link.compile_objects([source], toolchain, cache, jobs=1)[0] for toolchain in toolchains]
    tables = table.tables([NODE], [cpu.level for cpu in cpus])
    link.link_library(objects, tables, path, toolchains[0], cache)
    return path


def build_claiming(path: Path, levels: Sequence[int]) -> Path:
    """A library with the kernels once a level, which adds its number; each is code for this machine."""
    toolchain, cache = Toolchain.find({"PATH": "/usr/bin:/bin"}), path.parent / "cache"
    claims = [f"#undef AF_LEVEL\n#define AF_LEVEL {level}\n{REPORTING}" for level in levels]
    objects = link.compile_objects(claims, toolchain, cache, jobs=1)
    link.link_library(objects, table.tables([NODE], levels), path, toolchain, cache)
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library") / "kernels.so")


def feeds(rows: int, columns: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows * 1000 + columns)
    return {
        "x": random.standard_normal((rows, columns), dtype=np.float32),
        "b": random.standard_normal(columns, dtype=np.float32),
    }


def check(running: onnxruntime.InferenceSession, rows: int, columns: int, added: float) -> None:
    given = feeds(rows, columns)
    y, s = running.run(None, given)
    expected = np.maximum(given["x"] + given["b"], 0)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(s, expected.astype(np.float64).sum(axis=1) + added, rtol=1e-5, atol=1e-5)


def test_a_model_without_library_runs_through_its_function(tmp_path: Path) -> None:
    check(session(write_model(tmp_path / "m.onnx")), 9, 17, added=0)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 5), (129, 7), (1000, 33)])
def test_the_library_beside_a_model_runs_its_kernels(tmp_path: Path, rows: int, columns: int) -> None:
    build(tmp_path / "m.so")
    check(session(write_model(tmp_path / "m.onnx")), rows, columns, added=1000)


def test_an_explicit_library_is_taken(tmp_path: Path, library: Path) -> None:
    check(session(write_model(tmp_path / "m.onnx"), library=library), 4, 4, added=1000)


def test_a_library_in_the_place_of_one_that_is_in_use_is_taken(tmp_path: Path) -> None:
    model, library = write_model(tmp_path / "m.onnx"), tmp_path / "m.so"
    build(library)
    before = session(model)
    check(before, 4, 5, added=1000)
    build(library, KERNELS.replace("sum = 1000.0f;", "sum = 2000.0f;"))
    check(session(model), 4, 5, added=2000)
    check(before, 4, 5, added=1000)


def test_a_missing_explicit_library_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no library at"):
        session(write_model(tmp_path / "m.onnx"), library=tmp_path / "absent.so")


def test_the_users_session_options_are_kept(tmp_path: Path, library: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    model = write_model(tmp_path / "m.onnx")
    running = session(model, library=library, sess_options=options, providers=["CPUExecutionProvider"])
    assert running.get_session_options().intra_op_num_threads == 1
    check(running, 70, 3, added=1000)


def test_session_options_that_hold_a_library_are_a_usage_error(tmp_path: Path, library: Path) -> None:
    options = onnxruntime.SessionOptions()
    model = write_model(tmp_path / "m.onnx")
    first = session(model, library=library, sess_options=options)
    with pytest.raises(UsageError, match="pass new session options"):
        session(model, library=library, sess_options=options)
    check(first, 3, 2, added=1000)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (5, 0), (0, 0)])
def test_empty_tensors_run(tmp_path: Path, library: Path, rows: int, columns: int) -> None:
    check(session(write_model(tmp_path / "m.onnx"), library=library), rows, columns, added=1000)


def test_known_extents_reach_the_outputs(tmp_path: Path, library: Path) -> None:
    model = write_model(tmp_path / "m.onnx", rows=6, columns=4)
    onnx_model = onnx.load(model)
    onnx_model.graph.input[1].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(onnx_model, model)
    running = session(model, library=library)
    assert [output.shape for output in running.get_outputs()] == [[6, 4], [6]]


def test_a_wrong_extent_is_an_error_of_onnxruntime(tmp_path: Path, library: Path) -> None:
    running = session(write_model(tmp_path / "m.onnx"), library=library)
    wrong = {"x": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)}
    with pytest.raises(Exception, match=r"Fused: input b has extent 5, expected 4\."):
        running.run(None, wrong)
    check(running, 3, 4, added=1000)


def test_a_wrong_rank_is_an_error_of_onnxruntime(tmp_path: Path, library: Path) -> None:
    running = session(write_model(tmp_path / "m.onnx", rank=3), library=library)
    with pytest.raises(Exception, match="Fused: input 0 has 3 dimensions, expected 2"):
        running.run(None, {"x": np.zeros((3, 4, 1), np.float32), "b": np.zeros(4, np.float32)})


def test_more_memory_than_there_is_is_an_error_of_onnxruntime(tmp_path: Path) -> None:
    source = KERNELS.replace("bytes[0] = n[0] * n[1] * 4", "bytes[0] = n[1] << 50")
    build(tmp_path / "m.so", source)
    running = session(write_model(tmp_path / "m.onnx"))
    for _ in range(2):
        with pytest.raises(Exception, match="Failed to allocate memory"):
            running.run(None, feeds(2, 3))


def test_threads_share_a_session(tmp_path: Path, library: Path) -> None:
    running = session(write_model(tmp_path / "m.onnx"), library=library)

    def hammer(seed: int) -> None:
        for turn in range(40):
            check(running, 64 + 37 * ((seed + turn) % 9), 1 + 13 * (turn % 5), added=1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hammer, range(8)))


def test_sessions_come_and_go(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    build(tmp_path / "m.so")
    mapped = str(tmp_path / "m.so")
    for turn in range(50):
        check(session(model), 8 + turn, 8, added=1000)
        gc.collect()
    assert mapped not in Path("/proc/self/maps").read_text()


def test_sessions_open_in_many_threads(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    build(tmp_path / "m.so")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda turn: check(session(model), 8 + turn, 8, added=1000), range(32)))


@pytest.mark.parametrize("levels", [(98, 99), (0, 99), (1, 2, 3, 4), (1, 3), (2, 4), (4, 1, 3)])
def test_the_highest_level_that_the_processor_has_is_picked_and_else_the_functions_run(
    levels: Sequence[int], tmp_path: Path
) -> None:
    build_claiming(tmp_path / "m.so", levels)
    fitting = [level for level in levels if level <= Cpu.native().level]
    added = 1000 + max(fitting) if fitting else 0
    check(session(write_model(tmp_path / "m.onnx")), 5, 6, added)


def test_a_library_holds_code_of_several_levels_and_runs_the_best(tmp_path: Path) -> None:
    native = Cpu.native()
    every = [replace(native, level=level) for level in range(min(native.level, 1), native.level + 1)]
    build(tmp_path / "m.so", REPORTING, every)
    check(session(write_model(tmp_path / "m.onnx")), 5, 6, added=1000 + native.level)


# y = x + b as an op of one kernel, beside the other op of two: b is an input of both
ADDING = KERNELS[: KERNELS.index("static void relu_and_sum")] + r"""
static void add_alone(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end) {
  void *const moved[] = {buffers[0], buffers[1], NULL, NULL, buffers[2]};
  add(moved, n, scratch, begin, end);
}
""" + KERNELS[KERNELS.index("static int check") : KERNELS.index("static void output_shapes")] + r"""
static void output_shapes(const int64_t *n, int64_t *const *shapes) {
  shapes[0][0] = n[0];
  shapes[0][1] = n[1];
}

static void temporary_bytes(const int64_t *n, int64_t *bytes) { (void)n, (void)bytes; }

static const af_kernel only = {rows, much, none, add_alone};
static const af_kernel *const kernels[] = {&only};
static const int32_t types[] = {1, 1}, input_ranks[] = {2, 1}, output_ranks[] = {2};

const af_op AF_OP(adding_op) = {
    .name = "Adding", .input_count = 2, .output_count = 1, .symbol_count = 2, .kernel_count = 1,
    .input_types = types, .output_types = types, .input_ranks = input_ranks, .output_ranks = output_ranks,
    .bind = bind, .check = check, .output_shapes = output_shapes, .temporary_bytes = temporary_bytes,
    .kernels = kernels};
"""  # fmt: skip


def write_stitched(folder: Path, pairs: int) -> Path:
    """A node that runs both ops `pairs` times on inputs of their own and one b, and its library."""
    cache, toolchain = folder / "cache", Toolchain.find({"PATH": "/usr/bin:/bin"})
    objects = link.compile_objects([KERNELS, ADDING], toolchain, cache, jobs=2)
    places = tuple(place for n in range(pairs) for place in (1 + 2 * n, 0, 2 + 2 * n, 0))
    node = table.Node("Stitched", ("fused_op", "adding_op") * pairs, places, 1 + 2 * pairs)
    link.link_library(objects, table.tables([node], [toolchain.cpu.level]), folder / "m.so", toolchain, cache)
    inputs = ["b", *(f"{kind}{n}" for n in range(pairs) for kind in "xz")]
    outputs = [f"{kind}{n}" for n in range(pairs) for kind in "ysa"]
    graph = helper.make_graph(
        [helper.make_node("Stitched", inputs, outputs, "stitched", domain="apollo_fuse")],
        "g",
        [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, ["M"] if name == "b" else [f"N{name}", "M"]
            )
            for name in inputs
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    opset = [helper.make_opsetid("", 18), helper.make_opsetid("apollo_fuse", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), folder / "m.onnx")
    return folder / "m.onnx"


def check_stitched(running: onnxruntime.InferenceSession, rows: Sequence[int], columns: int) -> None:
    random = np.random.default_rng(columns)
    given = {"b": random.standard_normal(columns, dtype=np.float32)}
    for n, count in enumerate(rows):
        given[f"x{n}"] = random.standard_normal((count, columns), dtype=np.float32)
        given[f"z{n}"] = random.standard_normal((count // 2, columns), dtype=np.float32)
    outputs = iter(running.run(None, given))
    for n in range(len(rows)):
        y, s, a = next(outputs), next(outputs), next(outputs)
        expected = np.maximum(given[f"x{n}"] + given["b"], 0)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_allclose(s, expected.astype(np.float64).sum(axis=1) + 1000, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(a, given[f"z{n}"] + given["b"])


@pytest.mark.parametrize(
    ("rows", "columns"), [((3,), 5), ((1, 64, 2, 0), 7), (range(40), 33), ((129, 1) * 9, 16)]
)
def test_ops_that_share_a_node_share_its_launches(rows: Sequence[int], columns: int, tmp_path: Path) -> None:
    check_stitched(session(write_stitched(tmp_path, len(rows))), rows, columns)


def test_a_node_of_thousands_of_tensors_runs(tmp_path: Path) -> None:
    check_stitched(session(write_stitched(tmp_path, 1000)), [n % 5 for n in range(1000)], 9)


def test_shapes_are_inferred_for_each_op_that_shares_a_node(tmp_path: Path) -> None:
    path = write_stitched(tmp_path, 2)
    model = onnx.load(path)
    for value, extents in zip(model.graph.input, ([4], [3, 4], [5, 4], ["N", 4], [6, 4]), strict=True):
        for dim, extent in zip(value.type.tensor_type.shape.dim, extents, strict=True):
            if isinstance(extent, int):
                dim.dim_value = extent
    onnx.save(model, path)
    shapes = [output.shape for output in session(path).get_outputs()]
    assert shapes[:3] == [[3, 4], [3], [5, 4]] and shapes[5] == [6, 4]
    assert not any(isinstance(extent, int) for extent in shapes[4])


def test_an_error_in_one_op_names_it(tmp_path: Path) -> None:
    running = session(write_stitched(tmp_path, 2))
    given = {"b": np.zeros(4, np.float32)} | {
        name: np.zeros((2, 4), np.float32) for name in ("x0", "z0", "x1", "z1")
    }
    with pytest.raises(Exception, match=r"Adding: input b has extent 4, expected 5\."):
        running.run(None, given | {"z1": np.zeros((2, 5), np.float32)})


def test_shapes_are_read_from_an_onnxruntime_without_references_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = tmp_path / "runtime"
    shutil.copytree(link._runtime(), older)
    header = older / "ort_api.h"
    version = "#define ORT_API_VERSION_OF_REFERENCES 24"
    assert version in header.read_text()
    header.write_text(header.read_text().replace(version, version.replace("24", "1000")))
    monkeypatch.setattr(link, "_runtime", lambda: older)
    monkeypatch.setattr(link, "_headers", lambda: header.read_text())
    check_stitched(session(write_stitched(tmp_path, 3)), (9, 1, 4), 6)
