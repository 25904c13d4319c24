"""The lane loops of the builders' kernels are vectors: one that is not costs up to ten times as much."""

from __future__ import annotations

import re
import subprocess
from functools import partial
from pathlib import Path

import onnx
import pytest

import apollo_fuse.runtime
from apollo_fuse import onnx_io
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.symbolic import infer_shapes
from models import chains, memory_bound, networks
from tests.test_end_to_end import text_model

TOOLCHAIN = Toolchain.find({"PATH": "/usr/bin:/bin"})
HEADERS = Path(apollo_fuse.runtime.__file__).parent
PRAGMA = "#pragma omp simd"
MASKED_CELL = """g (float[N, 1600] gates, float[N, 400] cell, bool[N, 1] seen)
=> (float[N, 400] next, float[N, 400] hidden, float[N, 1] kept, float[N, 1] lost) {
    kept = Cast <to = 1> (seen)
    unseen = Not(seen)
    lost = Cast <to = 1> (unseen)
    i, f, g, o = Split <axis = 1, num_outputs = 4> (gates)
    si = Sigmoid(i)  sf = Sigmoid(f)  so = Sigmoid(o)  tg = Tanh(g)
    written = Mul(si, tg)
    held = Mul(sf, cell)
    made = Add(held, written)
    new = Mul(kept, made)
    old = Mul(lost, cell)
    next = Add(new, old)
    bent = Tanh(made)
    hidden = Mul(so, bent)
}"""
MODELS = {
    "chain": partial(memory_bound.chain20, 256, 256),
    "softmax": memory_bound.softmax,
    "layernorm": partial(memory_bound.layernorm, "rows", 512),
    "rmsnorm": memory_bound.rmsnorm,
    "gelu_erf": memory_bound.gelu_erf,
    "gelu_tanh": memory_bound.gelu_tanh,
    "mish": memory_bound.mish,
    "image_preprocessing": memory_bound.image_preprocessing,
    "wide_deep": partial(memory_bound.wide_deep, columns=3),
    "wide_deep, many columns": memory_bound.wide_deep,
    "adam": partial(memory_bound.adam, 4),
    "bert_layer": networks.bert_layer,
    "a masked cell": partial(text_model, MASKED_CELL),
    "softmax of any extents": partial(memory_bound.softmax, "rows", "columns"),
    "softmax, few long rows": partial(memory_bound.softmax, 4, 1_000_000),
    "group_norm": chains.group_norm,
    "masked_softmax": chains.masked_softmax,
    "log_softmax": chains.log_softmax,
    "batch_norm_training": chains.batch_norm_training,
    "cross_entropy": chains.cross_entropy,
}


def lane_loops(source: str) -> list[range]:
    """The lines of each lane loop of the kernels, counted from 1, its directive included."""
    lines = source[: source.index("static const int32_t input_types")].splitlines()
    found: list[range] = []
    for place, line in enumerate(lines):
        if line.strip().startswith(PRAGMA):
            depth = line.index("#")
            end = next(n for n in range(place + 2, len(lines)) if lines[n].startswith(" " * depth + "}"))
            found.append(range(place + 1, end + 2))
    return found


def clears(lines: list[str], loop: range) -> bool:
    """Whether all that a lane does is to set a sum to 0, which gcc knows a better way for than a loop."""
    return len(loop) == 4 and lines[loop[2] - 1].endswith(" = 0.0f;")


def vectorised_lines(source: str, folder: Path) -> set[int]:
    (folder / "source.c").write_text(source)
    command = [*TOOLCHAIN.command, *TOOLCHAIN.flags, f"-I{HEADERS}", "-c", "source.c", "-o", "source.o"]
    command.append("-fopt-info-vec-optimized")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    reports = (line.split(":") for line in done.stderr.splitlines() if line.startswith("source.c:"))
    return {int(report[1]) for report in reports if "loop vectorized" in report[-1]}


def test_what_a_kernel_writes_for_all_lanes_is_read_before_their_loop(tmp_path: Path) -> None:
    onnx.save(text_model(MASKED_CELL), tmp_path / "model.onnx")
    model = onnx_io.load_clean(tmp_path / "model.onnx", tmp_path)
    infer_shapes(model)
    (candidate,) = plan(model, Options()).candidates
    lines = candidate.source.splitlines()
    inside = "\n".join(lines[n - 1] for loop in lane_loops(candidate.source) for n in loop)
    alike = re.findall(r"out\d\[g0\]", candidate.source)
    assert len(alike) == 4  # each written once, and read once
    assert "tanhf" in inside
    assert not re.search(r"out\d\[g0\]", inside)


@pytest.mark.skipif("Free Software Foundation" not in TOOLCHAIN.identification, reason="reads gcc's report")
@pytest.mark.skipif(TOOLCHAIN.cpu.level not in (3, 4), reason="conversions of integers need AVX2")
@pytest.mark.parametrize("name", MODELS)
def test_every_lane_loop_is_vectorised(name: str, tmp_path: Path) -> None:
    onnx.save(MODELS[name](), tmp_path / "model.onnx")
    model = onnx_io.load_clean(tmp_path / "model.onnx", tmp_path)
    infer_shapes(model)
    sources = {x.name: x.source for x in plan(model, Options()).candidates}
    assert sources
    for kernel, source in sources.items():
        vectorised = vectorised_lines(source, tmp_path)
        loops = lane_loops(source)
        assert loops
        lines = source.splitlines()
        scalar = [loop for loop in loops if not vectorised & set(loop) and not clears(lines, loop)]
        assert not scalar, f"{kernel}:\n" + "\n".join(lines[n - 1] for n in scalar[0])
