"""Libraries launch their kernels on GPUs: against a driver that keeps books, in onnxruntime as it is."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from elftools.elf.elffile import ELFFile

from apollo_fuse import Options, fuse
from apollo_fuse.codegen.launches import GpuCode, GpuForm, gpu_table
from apollo_fuse.codegen.table import Node
from apollo_fuse.codegen.triton.compile import compile_kernels
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.report import Report
from apollo_fuse.runtime import session
from models import BUILDERS, chains, memory_bound
from tests.fusing import reference_session
from tests.stub import Launched, Pretended, Process, Ran, Stub, fused, run, run_on_hip
from tests.test_models import small, small_feeds
from tests.test_triton_compile import jobs

Array = np.ndarray


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    started = Process(tmp_path_factory.mktemp("stub"))
    yield started
    started.close()


def check(process: Process, model: onnx.ModelProto, feeds: Mapping[str, Array], folder: Path) -> Ran:
    """What is launched is what emit says, it computes what onnxruntime does, and nothing is left behind."""
    return checked(process(run, model, feeds, folder))


def checked(ran: Ran) -> Ran:
    assert ran.launched == ran.expected and ran.launched
    for right, found in ran.outputs:
        assert right.dtype == found.dtype
        np.testing.assert_allclose(found, right, rtol=2e-4, atol=1e-4)
    counts = ran.counts
    assert counts["gpu_ops"] == counts["cpu_ops"] == len(ran.memory_types)
    assert counts["loads"] == counts["unloads"] > 0 and counts["retained"] == counts["released"]
    assert counts["blocks_given"] == counts["blocks_back"] and not counts["blocks_spoilt"]
    return ran


@pytest.mark.parametrize("name", BUILDERS)
def test_the_kernels_of_a_builder_are_launched_as_emitted(
    name: str, process: Process, tmp_path: Path
) -> None:
    model = small(name)
    check(process, model, small_feeds(name, model), tmp_path)


@pytest.mark.parametrize("provider", ["ROCMExecutionProvider", "MIGraphXExecutionProvider"])
@pytest.mark.parametrize("name", ["adam", "bert_layer"])
def test_the_kernels_of_a_builder_are_launched_through_hip(
    name: str, provider: str, process: Process, tmp_path: Path
) -> None:
    model = small(name)
    ran = checked(process(run_on_hip, model, small_feeds(name, model), tmp_path, provider))
    assert ran.counts["retained"] == 0 and ran.counts["other_ops"] == ran.counts["gpu_ops"]


@pytest.mark.parametrize("rows", [3, 3000])
def test_forms_with_temporaries_are_launched_where_they_are_taken(
    rows: int, process: Process, tmp_path: Path
) -> None:
    model = chains.cross_entropy("rows", 10)
    random = np.random.default_rng(rows)
    feeds = {
        value.name: random.standard_normal((rows, 10)).astype(np.float32)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        else random.integers(0, 10, rows)
        for value in model.graph.input
    }
    assert check(process, model, feeds, tmp_path).counts["blocks_given"] == 1


def test_rows_too_long_for_a_block_have_scratch(process: Process, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((2, 40_000)).astype(np.float32)
    check(process, memory_bound.layernorm(2, 40_000), {"x": x}, tmp_path)


def test_an_input_whose_elements_are_extents_lies_on_the_host(process: Process, tmp_path: Path) -> None:
    model = small("gpt2_decode")
    ran = check(process, model, small_feeds("gpt2_decode", model), tmp_path)
    assert "dh" in ran.memory_types


def threads_of_blocks(
    stub: Stub, model: onnx.ModelProto, feeds: Mapping[str, Array], others: Mapping[str, Array], folder: Path
) -> list[dict[int, int]]:
    """The threads of each launch's blocks, by its programs: in a run as it was fused for, and in another."""
    seen: dict[int, int] = {}

    def note(launched: Launched) -> int:
        seen[launched.grid[0]] = launched.block[0]
        return 0

    path, library, _ = fused(model, folder, feeds, Pretended(shared=0))
    stub.have(80)
    stub.call(note)
    running = stub.session(path, library)
    found: list[dict[int, int]] = []
    for given in (feeds, others):
        seen.clear()
        running.run(None, dict(given))
        found.append(dict(seen))
    return found


def test_a_run_takes_the_warps_of_the_variant_that_is_nearest(process: Process, tmp_path: Path) -> None:
    text = (
        "g (float[n, k] x, float[m, l] y) => (float[n, k] z, float[m, l] w) { z = Softmax(x) w = Softmax(y) }"
    )
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    many, few = np.ones((5000, 2000), np.float32), np.ones((7, 2000), np.float32)
    as_fused, other = process(
        threads_of_blocks, model, {"x": many, "y": few}, {"x": few[:5], "y": many[:4000]}, tmp_path
    )
    assert as_fused.keys() == {5000, 7} and other.keys() == {4000, 5}
    assert as_fused[7] > as_fused[5000]  # with few programs, each one has to keep more of the device busy
    assert (other[5], other[4000]) == (as_fused[7], as_fused[5000])


def into_no_elements(stub: Stub, folder: Path) -> str:
    text = "g (float[n, 3] x, int64[m] i) => (float[m, 3] z) { y = Gather(x, i) z = Relu(y) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    path, library, _ = fused(model, folder, {"x": np.ones((2, 3), np.float32), "i": np.zeros(4, np.int64)})
    stub.have(80)
    running = stub.session(path, library)
    running.run(None, {"x": np.ones((0, 3), np.float32), "i": np.zeros(0, np.int64)})
    try:
        running.run(None, {"x": np.ones((0, 3), np.float32), "i": np.zeros(4, np.int64)})
    except Exception as error:  # onnxruntime raises classes of its own for each status
        return str(error)
    return ""


def test_an_index_into_an_axis_of_no_elements_is_an_error(process: Process, tmp_path: Path) -> None:
    said = process(into_no_elements, tmp_path)
    assert re.search(r"input \d holds 4 indices into an axis of no elements, expected none", said)


def test_a_node_with_an_input_on_host_and_device_has_no_form() -> None:
    forms = {
        "a": GpuForm("", 2, on_host=frozenset({1}), on_device=frozenset({0})),
        "b": GpuForm("", 1, on_host=frozenset(), on_device=frozenset({0})),
    }
    apart = Node("Apart", ("a", "b"), (0, 1, 2), 3)
    clash = Node("Clash", ("a", "b"), (0, 1, 1), 2)
    unknown = Node("Unknown", ("a", "c"), (0, 1, 2), 3)
    table = gpu_table([apart, clash, unknown], GpuCode(forms))
    assert "on_host_0[] = {0, 1, 0}" in table
    assert (
        "af_gpu_nodes[] = {{ops_0, on_host_0, 0, runs_0}, {NULL, NULL, 0, NULL}, {NULL, NULL, 0, NULL}}"
        in table
    )


# ----------------------------------------------------------------------------------- real binaries


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("compiled")
    onnx.save(memory_bound.softmax("rows", 64), folder / "net.onnx")
    options = Options(
        target="cpu,cuda:90,hip:gfx942,cuda:80", measure=False, fuse_all=True, cache_dir=folder / "cache"
    )
    report = fuse(folder / "net.onnx", options=options)
    assert report.library is not None
    return report


def copied(report: Report, folder: Path) -> tuple[Path, Path]:
    """The model and its library, which is not loaded yet under its new name."""
    assert report.library is not None
    library = folder / "net.so"
    shutil.copy(report.library, library)
    return report.output, library


def feeds() -> dict[str, Array]:
    return {"x": np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)}


def what_is_loaded(
    stub: Stub, model: Path, library: Path, architecture: int, provider: str = "CUDAExecutionProvider"
) -> list[bytes]:
    """How the modules begin that are launched on a device of that architecture."""
    found: list[bytes] = []

    def note(launched: Launched) -> int:
        start = ctypes.string_at(launched.image, 4096)
        found.append(start[:4] if start[:4] == b"\x7fELF" else start[: start.index(b".address_size")])
        return 0

    stub.use(provider)
    stub.have(architecture)
    stub.call(note)
    stub.session(model, library).run(None, feeds())
    return found


@pytest.mark.parametrize(
    ("capability", "word"),
    [(75, None), (80, b"ELF"), (89, b"ELF"), (90, b"ELF"), (100, b"sm_90\n"), (120, b"sm_90\n")],
)
def test_the_device_decides_which_module_is_loaded(
    capability: int, word: bytes | None, compiled: Report, process: Process, tmp_path: Path
) -> None:
    found = process(what_is_loaded, *copied(compiled, tmp_path), capability)
    assert [word is not None and word in start for start in found] == [True] * (word is not None)


@pytest.mark.parametrize(("architecture", "launches"), [(0x942, 1), (0x90A, 0), (0x950, 0)])
def test_an_amd_device_runs_code_for_its_own_architecture(
    architecture: int, launches: int, compiled: Report, process: Process, tmp_path: Path
) -> None:
    paths = copied(compiled, tmp_path)
    found = process(what_is_loaded, *paths, architecture, "ROCMExecutionProvider")
    assert [start[:4] for start in found] == [b"\x7fELF"] * launches


def test_arguments_are_what_the_compiled_kernel_takes(tmp_path: Path) -> None:
    every = jobs(tmp_path)
    for job, binary in zip(every, compile_kernels(every, GpuTarget("cuda", "90"), tmp_path, 2), strict=True):
        text = binary.text.read_text()
        entry = re.search(rf"\.entry {job.launch.kernel}\((.*?)\)", text, re.DOTALL)
        assert entry is not None
        kinds = [line.split()[1:3] for line in entry[1].strip().splitlines()]
        pointers = len(job.launch.tensors) + len(job.launch.scratch)
        numbers = len(job.launch.extents)
        assert [kind for kind, _ in kinds] == [".u64"] * (pointers + numbers + 2)
        assert [more == ".ptr" for _, more in kinds] == [True] * pointers + [False] * numbers + [True] * 2
        assert f".reqntid {binary.threads}" in text and "\n.target sm_90\n" in text


def test_code_for_amd_takes_the_same_arguments(tmp_path: Path) -> None:
    every = jobs(tmp_path)
    for job, binary in zip(
        every, compile_kernels(every, GpuTarget("hip", "gfx942"), tmp_path, 2), strict=True
    ):
        count = len(job.launch.tensors) + len(job.launch.scratch) + len(job.launch.extents) + 2
        assert argument_bytes(binary.path, job.launch.kernel) == 8 * count


def argument_bytes(code: Path, kernel: str) -> int:
    """What the descriptor of a kernel for AMD's GPUs says: its third word (LLVM's guide to AMDGPU)."""
    with code.open("rb") as file:
        elf = ELFFile(file)
        (symbol,) = elf.get_section_by_name(".symtab").get_symbol_by_name(f"{kernel}.kd")
        section = elf.get_section(symbol["st_shndx"])
        start = symbol["st_value"] - section["sh_addr"]
        return int.from_bytes(section.data()[start + 8 : start + 12], "little")


def test_without_a_driver_the_library_runs_on_the_cpu(compiled: Report, tmp_path: Path) -> None:
    model, library = copied(compiled, tmp_path)
    (found,) = session(model, library=library).run(None, feeds())
    (right,) = reference_session(onnx.load(compiled.model)).run(None, feeds())
    np.testing.assert_allclose(found, right, rtol=1e-5)


def test_a_library_without_gpus_holds_nothing_of_them(compiled: Report, tmp_path: Path) -> None:
    options = Options(measure=False, fuse_all=True, cache_dir=tmp_path / "cache")
    library = fuse(compiled.model, tmp_path / "cpu.onnx", options).library
    assert library is not None and compiled.library is not None
    assert b"libcuda" in compiled.library.read_bytes() and b"libcuda" not in library.read_bytes()


def with_both(stub: Stub, model: Path, library: Path) -> tuple[Array, dict[str, int]]:
    stub.have(80)
    (found,) = stub.session(model, library, with_cpu=True).run(None, feeds())
    return found, stub.counts()


def test_an_op_for_both_providers_runs_where_onnxruntime_has_one(
    compiled: Report, process: Process, tmp_path: Path
) -> None:
    found, counts = process(with_both, *copied(compiled, tmp_path))
    (right,) = reference_session(onnx.load(compiled.model)).run(None, feeds())
    np.testing.assert_allclose(found, right, rtol=1e-5)
    assert (counts["gpu_ops"], counts["cpu_ops"], counts["launches"], counts["loads"]) == (1, 1, 0, 0)
    assert counts["starts"] == 1


def without_providers(stub: Stub, model: Path, library: Path) -> tuple[Array, dict[str, int]]:
    stub.have(80)
    (found,) = stub.session(model, library, with_cpu=True, has_providers=False).run(None, feeds())
    return found, stub.counts()


def test_no_driver_is_started_for_an_onnxruntime_without_its_provider(
    compiled: Report, process: Process, tmp_path: Path
) -> None:
    found, counts = process(without_providers, *copied(compiled, tmp_path))
    (right,) = reference_session(onnx.load(compiled.model)).run(None, feeds())
    np.testing.assert_allclose(found, right, rtol=1e-5)
    assert (counts["starts"], counts["gpu_ops"], counts["cpu_ops"]) == (0, 0, 1)


def failing(stub: Stub, model: Path, library: Path, function: str, failure: int) -> str:
    """What is said where that function fails, if anything; all is well again afterwards."""
    if function.startswith("hip"):
        stub.use("ROCMExecutionProvider")
    stub.have(0x942 if function.startswith("hip") else 80)
    stub.fail(function, failure)
    said = ""
    try:
        stub.session(model, library).run(None, feeds())
    except Exception as error:  # onnxruntime raises classes of its own for each status
        said = str(error)
    stub.fail(None)
    stub.session(model, library).run(None, feeds())
    gc.collect()
    counts = stub.counts()
    assert counts["loads"] == counts["unloads"] and counts["retained"] == counts["released"]
    assert counts["launches"] == (1 if said else 0)
    return said


@pytest.mark.parametrize(
    ("function", "failure", "name"),
    [
        ("cuModuleLoadData", 209, "CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuModuleGetFunction", 500, "CUDA_ERROR_NOT_FOUND"),
        ("cuDevicePrimaryCtxRetain", 2, "CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuCtxPushCurrent_v2", 201, "CUDA_ERROR_INVALID_CONTEXT"),
        ("cuLaunchKernel", 700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuLaunchKernel", 12345, "an unknown error"),
        ("hipModuleLoadData", 209, "hipErrorNoBinaryForGpu"),
        ("hipModuleGetFunction", 500, "hipErrorNotFound"),
        ("hipSetDevice", 101, "hipErrorInvalidDevice"),
        ("hipModuleLaunchKernel", 700, "hipErrorIllegalAddress"),
    ],
)
def test_an_error_of_the_driver_is_one_of_onnxruntime(
    function: str, failure: int, name: str, compiled: Report, process: Process, tmp_path: Path
) -> None:
    said = process(failing, *copied(compiled, tmp_path), function, failure)
    assert re.search(rf"_\w{{12}}: {function} ended with {name}, expected success", said)


@pytest.mark.parametrize("function", ["cuInit", "hipInit"])
def test_a_driver_that_does_not_start_leaves_the_functions(
    function: str, compiled: Report, process: Process, tmp_path: Path
) -> None:
    assert process(failing, *copied(compiled, tmp_path), function, 100) == ""


def on_two_devices(
    stub: Stub, model: Path, library: Path, provider: str, first: int, second: int
) -> tuple[set[int], dict[str, int]]:
    devices: set[int] = set()

    def note(launched: Launched) -> int:
        devices.add(launched.device)
        return 0

    stub.use(provider)
    stub.have(first, second)
    stub.call(note)

    def work(number: int) -> None:
        stub.use_device(number % 2)
        for _ in range(3):
            running = stub.session(model, library)
            for _ in range(10):
                running.run(None, feeds())

    stub.session(model, library)  # the library's path is the provider's, and the same for all
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    gc.collect()
    return devices, stub.counts()


@pytest.mark.parametrize(
    ("provider", "first", "second"),
    [("CUDAExecutionProvider", 80, 90), ("ROCMExecutionProvider", 0x942, 0x942)],
)
def test_sessions_threads_and_devices_share_modules(
    provider: str, first: int, second: int, compiled: Report, process: Process, tmp_path: Path
) -> None:
    devices, counts = process(on_two_devices, *copied(compiled, tmp_path), provider, first, second)
    assert devices == {0, 1} and counts["launches"] == 8 * 3 * 10
    assert 2 <= counts["loads"] == counts["unloads"] and counts["retained"] == counts["released"]


def held_by_two_sessions(stub: Stub, model: Path, library: Path) -> dict[str, int]:
    stub.have(80)
    first, second = stub.session(model, library), stub.session(model, library)
    for running in (first, second):
        running.run(None, feeds())
    return stub.counts()


def test_two_sessions_on_a_device_load_a_module_once(
    compiled: Report, process: Process, tmp_path: Path
) -> None:
    counts = process(held_by_two_sessions, *copied(compiled, tmp_path))
    assert (counts["loads"], counts["launches"], counts["unloads"]) == (1, 2, 0)


def on_a_device_that_fits_nothing(
    stub: Stub, model: Path, library: Path, provider: str, *devices: int
) -> str:
    stub.use(provider)
    stub.have(*devices)
    try:
        stub.session(model, library)
    except Exception as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("provider", "devices", "what"),
    [
        ("CUDAExecutionProvider", (75, 80), "compute capability 7.5"),
        ("MIGraphXExecutionProvider", (0x90A, 0x942), "architecture gfx90a"),
    ],
)
def test_a_session_on_a_device_that_fits_nothing_says_so(
    provider: str, devices: tuple[int, ...], what: str, compiled: Report, process: Process, tmp_path: Path
) -> None:
    said = process(on_a_device_that_fits_nothing, *copied(compiled, tmp_path), provider, *devices)
    assert f"its kernels fit no device of {what}; name one like it in --target" in said
