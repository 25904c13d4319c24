"""The processors that a library is made for: their names, what is tried here, and what the library holds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import parser

import apollo_fuse
from apollo_fuse import driver
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.cpu import KNOWN, Cpu, CpuTargets
from apollo_fuse.errors import NoCompilerError, UsageError
from apollo_fuse.feeds import make_feeds
from apollo_fuse.options import Options
from apollo_fuse.report import Report
from models import memory_bound, networks
from tests import elf

V1, V2, V3, V4, AARCH64 = KNOWN
NATIVE = Cpu.native()
FOREIGN = V3 if NATIVE.architecture == AARCH64.architecture else AARCH64
RUNNABLE = [cpu for cpu in KNOWN if NATIVE.runs(cpu)]
HALF = """
<ir_version: 10, opset_import: ["": 18]>
half (float16[8, 48] x) => (float16[8, 48] y, int32[8, 48] z) {
  a = Cast<to = 1>(x)
  b = Sigmoid(a)
  c = Mul(a, b)
  y = Cast<to = 10>(c)
  z = Cast<to = 6>(c)
}
"""
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "layernorm": lambda: memory_bound.layernorm(8, 48),
    "gelu_erf": lambda: memory_bound.gelu_erf(8, 48),
    "gelu_tanh": lambda: memory_bound.gelu_tanh(8, 48),
    "mish": lambda: memory_bound.mish(8, 48),
    "softmax": lambda: memory_bound.softmax(8, 48),
    "adam": lambda: memory_bound.adam(3, 8),
    "image": lambda: memory_bound.image_preprocessing(12, 20),
    "half": lambda: parser.parse_model(HALF),
}
REPRODUCED = {
    "bert": lambda: networks.bert_layer(hidden=48, heads=4),
    "wide_deep": lambda: memory_bound.wide_deep(40, 4),
}
FUSE_EACH = f"""
import sys
from apollo_fuse.cli import main
models, options = sys.argv[1:{len(REPRODUCED) + 1}], sys.argv[{len(REPRODUCED) + 1}:]
for model in models:
    main([model, *options], standalone_mode=False)
"""
needs_ziglang = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None, reason="cross-compiles; pip install 'apollo-fuse[cc]'"
)
needs_x86 = pytest.mark.skipif(NATIVE.level == 0, reason="levels are x86-64's")


def fuse(
    model: onnx.ModelProto, folder: Path, cache: Path, cpus: CpuTargets, *, measure: bool = False
) -> Report:
    onnx.save(model, folder / "net.onnx")
    options = Options(cpu=cpus, measure=measure, strict=True, fuse_all=True, threads=2, cache_dir=cache)
    return driver.fuse(folder / "net.onnx", options=options)


def assert_kernels_run(report: Report) -> None:
    """The model with its functions taken out, so that nothing but kernels can compute it, still runs."""
    fused = onnx.load(report.output)
    del fused.functions[:]
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(report.library))
    session = onnxruntime.InferenceSession(fused.SerializeToString(), options)
    assert session.run(None, make_feeds(session))


# -- names


def test_names_are_read_in_any_order_and_once() -> None:
    targets = CpuTargets.parse("x86-64-v4, x86-64,x86-64-v2,x86-64-v4")
    assert targets.cpus == (V1, V2, V4)
    assert str(targets) == "x86-64, x86-64-v2, x86-64-v4"


@pytest.mark.parametrize("cpu", KNOWN, ids=str)
def test_a_name_stands_for_its_cpu(cpu: Cpu) -> None:
    assert CpuTargets.parse(str(cpu)) == CpuTargets((cpu,))


def test_native_is_this_machine_and_the_default() -> None:
    assert CpuTargets.parse("native") == CpuTargets.native() == Options().cpu == CpuTargets((NATIVE,))


@needs_x86
def test_native_stands_beside_levels() -> None:
    assert CpuTargets.parse(f"native,{NATIVE}").cpus == (NATIVE,)


@pytest.mark.parametrize(
    "text", ["", "x86-64-v5", "v3", "X86-64", "x86-64-v2,,x86-64-v3", "sse", "native,no"]
)
def test_an_unknown_name_is_refused_with_those_that_are_known(text: str) -> None:
    known = "native or a list of x86-64, x86-64-v2, x86-64-v3, x86-64-v4, aarch64"
    with pytest.raises(UsageError, match=known):
        CpuTargets.parse(text)


def test_architectures_are_not_mixed() -> None:
    with pytest.raises(UsageError, match="aarch64 and x86-64 are different architectures.*once for each"):
        CpuTargets.parse("x86-64-v3,aarch64")


@pytest.mark.parametrize("cpus", [(), (V2, V2), (V3, V2)], ids=str)
def test_targets_are_ascending_and_not_empty(cpus: tuple[Cpu, ...]) -> None:
    with pytest.raises(UsageError, match="one or more, each once, the lowest first"):
        CpuTargets(cpus)


@pytest.mark.parametrize(
    ("asked", "machine", "tried"),
    [
        ("x86-64-v2,x86-64-v4", V4, V4),
        ("x86-64-v2,x86-64-v4", V3, V2),
        ("x86-64-v2", V4, V2),
        ("x86-64-v4", V3, V3),
        ("aarch64", V3, V3),
        ("x86-64,x86-64-v3", AARCH64, AARCH64),
        ("aarch64", AARCH64, AARCH64),
    ],
)
def test_the_best_that_the_machine_runs_is_tried_and_else_its_own(
    asked: str, machine: Cpu, tried: Cpu
) -> None:
    assert CpuTargets.parse(asked).tried_on(machine) == tried


# -- libraries


@pytest.mark.parametrize("cpu", RUNNABLE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_code_of_each_level_verifies(name: str, cpu: Cpu, tmp_path: Path, cache: Path) -> None:
    report = fuse(MODELS[name](), tmp_path, cache, CpuTargets((cpu,)))
    assert report.accepted and report.verification.passed
    assert (report.cpu_targets, report.verified_cpu, report.warnings) == ((str(cpu),), str(cpu), ())
    assert_kernels_run(report)


def test_one_library_holds_every_level(tmp_path: Path, cache: Path) -> None:
    report = fuse(MODELS["layernorm"](), tmp_path, cache, CpuTargets(tuple(RUNNABLE)))
    assert report.cpu_targets == tuple(map(str, RUNNABLE))
    assert report.verified_cpu == str(NATIVE)
    assert report.library is not None
    assert elf.exported(report.library) == ["RegisterCustomOps"]
    assert set(elf.needed(report.library)) <= {"libc.so.6", "libm.so.6"}
    kernels = {kernel.name for kernel in report.accepted}
    compiled = {name for name in elf.symbols(report.library) if name.rpartition("_v")[0] in kernels}
    assert compiled == {f"{name}_v{cpu.level}" for name in kernels for cpu in RUNNABLE}
    assert_kernels_run(report)


@needs_x86
def test_what_the_machine_cannot_run_is_written_and_said(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cpu, "native", classmethod(lambda cls: V1))
    report = fuse(MODELS["gelu_tanh"](), tmp_path, cache, CpuTargets((V1, V3, V4)))
    assert (report.cpu_targets, report.verified_cpu) == (("x86-64", "x86-64-v3", "x86-64-v4"), "x86-64")
    (warning,) = report.warnings
    assert "cannot run code for x86-64-v3, x86-64-v4: the kernels were verified as code for x86-64" in warning


def test_a_model_left_unchanged_has_no_targets(tmp_path: Path, cache: Path) -> None:
    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 18]>g (float[4, 4] x) => (float[4, 4] y) { y = MatMul(x, x) }'
    )
    report = fuse(model, tmp_path, cache, CpuTargets((FOREIGN,)))
    assert (report.library, report.cpu_targets, report.warnings) == (None, (), ())


# -- cross builds


@needs_ziglang
@pytest.mark.parametrize("name", MODELS)
def test_a_foreign_library_is_cross_built_and_its_kernels_verified_here(
    name: str, tmp_path: Path, cache: Path
) -> None:
    report = fuse(MODELS[name](), tmp_path, cache, CpuTargets((FOREIGN,)))
    assert report.library is not None
    assert (
        elf.machine(report.library) == {"aarch64": "EM_AARCH64", "x86-64": "EM_X86_64"}[FOREIGN.architecture]
    )
    assert elf.exported(report.library) == ["RegisterCustomOps"]
    assert set(elf.needed(report.library)) <= {"libc.so.6", "libm.so.6"}
    assert report.verification.passed and report.verification.cases > 0
    assert (report.cpu_targets, report.verified_cpu) == ((str(FOREIGN),), str(NATIVE))
    (warning,) = report.warnings
    assert f"cannot run code for {FOREIGN}: the kernels were verified as code for {NATIVE} alone" in warning


@needs_ziglang
def test_decisions_on_a_foreign_library_rest_on_measurements_of_native_code(
    tmp_path: Path, cache: Path
) -> None:
    report = fuse(memory_bound.mish(256, 1024), tmp_path, cache, CpuTargets((FOREIGN,)), measure=True)
    assert all(kernel.fused_us is not None for kernel in report.kernels)
    assert report.latency.runs > 0


@needs_ziglang
def test_a_foreign_library_is_told_from_one_that_is_missing(tmp_path: Path, cache: Path) -> None:
    report = fuse(MODELS["softmax"](), tmp_path, cache, CpuTargets((FOREIGN,)))
    with pytest.raises(UsageError, match="does not load on this machine"):
        apollo_fuse.session(report.output)


def test_a_cross_build_without_ziglang_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoCompilerError, match=rf"{FOREIGN}.*pip install 'apollo-fuse\[cc\]'"):
        Toolchain.find({"PATH": "/usr/bin:/bin"}, FOREIGN)


# -- reproduction


@pytest.mark.parametrize(
    "targets",
    [",".join(map(str, RUNNABLE)), pytest.param(str(FOREIGN), marks=needs_ziglang)],
    ids=["native", "foreign"],
)
def test_the_same_input_and_options_give_the_same_bytes(targets: str, tmp_path: Path) -> None:
    written: list[list[bytes]] = []
    for seed in ("1", "2"):
        folder = tmp_path / f"place {seed}"
        folder.mkdir()
        paths = [folder / f"{name}.onnx" for name in REPRODUCED]
        for path, model in zip(paths, REPRODUCED.values(), strict=True):
            onnx.save(model(), path)
        options = ["--no-measure", "--quiet", "--cpu", targets, "--cache-dir", folder / "cache"]
        command = [sys.executable, "-c", FUSE_EACH, *paths, *options]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        files = [path.with_suffix(suffix) for path in paths for suffix in (".fused.onnx", ".fused.so")]
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
