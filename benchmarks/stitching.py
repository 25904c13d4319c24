"""Holds stitched reductions against kernels written by hand: ``python -m benchmarks.stitching``.

The generated kernel runs in turn with the one in `benchmarks/handwritten`, and then with onnxruntime with
all of its optimisations, on the same inputs. Both kernels go through one plugin and thread pool, are compiled
with the same flags, and find inputs, weights and outputs at the same addresses. Where others use the caches,
too, a least time is chance: a row is over the bar where the median of the quotients is as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper
from rich.table import Table

from apollo_fuse import onnx_io
from apollo_fuse.codegen.link import compile_objects, link_library
from apollo_fuse.codegen.table import alone, tables
from apollo_fuse.codegen.toolchain import Toolchain
from apollo_fuse.driver import fuse
from apollo_fuse.measure import Timing, interleaved, session_options
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.running import ort_value
from apollo_fuse.symbolic import infer_shapes
from benchmarks.bench import machine, show
from benchmarks.row import largest_difference
from benchmarks.traffic import compulsory_bytes, moved_bytes
from models import chains, memory_bound

_SOURCES = Path(__file__).parent / "handwritten"
_AGREEMENT = 1e-4
"""Largest difference between two of the three, over the largest value of the output."""
MOST_BYTES = 1.05
MOST_TIME = 1.1
_ROWS = ((65536, 64), (32768, 128), (64, 768), (4096, 768), (512, 1024), (8, 16384), (256, 16384))
_IMAGES = ((4, 64, 16, 16), (1, 320, 64, 64), (8, 128, 32, 32))
_STREAMED = ((4, 1_000_000),)
"""Rows that no on-chip memory holds."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain in primitives, and the inputs that its kernel written by hand takes: x, then the weights."""

    name: str
    build: Callable[..., onnx.ModelProto]
    weights: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


CHAINS = (
    Chain("softmax", memory_bound.softmax, (), (*_ROWS, *_STREAMED)),
    Chain("layernorm", memory_bound.layernorm, ("scale", "bias"), (*_ROWS, *_STREAMED)),
    Chain("rmsnorm", memory_bound.rmsnorm, ("scale",), (*_ROWS, *_STREAMED)),
    Chain("groupnorm", chains.group_norm, ("scale", "bias", "groups"), _IMAGES),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Times are in seconds. `kernels` are custom ops, `launches` what they run one after another.

    ours: read in turn with the kernel written by hand. beside_unfused: in turn with onnxruntime.
    """

    chain: str
    shape: tuple[int, ...]
    kernels: int
    launches: int
    moved: int
    compulsory: int
    handwritten: Timing
    ours: Timing
    unfused: Timing
    beside_unfused: Timing

    @property
    def bytes_ratio(self) -> float:
        return self.moved / self.compulsory

    @property
    def time_ratio(self) -> float:
        """Our least time over that of the kernel written by hand."""
        return self.ours.minimum / self.handwritten.minimum

    @property
    def median_ratio(self) -> float:
        """The median of readings of ours over those of the kernel written by hand, taken in turn."""
        return self.ours.share

    @property
    def speedup(self) -> float:
        return self.unfused.minimum / self.beside_unfused.minimum

    @property
    def streams(self) -> bool:
        """Whether a row is too long to stay on chip, and is read more than once by any kernel."""
        return self.shape in _STREAMED

    @property
    def holds(self) -> bool:
        near = self.streams or self.bytes_ratio <= MOST_BYTES
        return self.kernels == 1 and near and min(self.time_ratio, self.median_ratio) <= MOST_TIME


def measured(chain: Chain, shape: tuple[int, ...], folder: Path, seconds: float, threads: int) -> Result:
    """Raises ValueError where the three do not compute the same."""
    model = chain.build(*shape)
    path, fused = folder / "model.onnx", folder / "fused.onnx"
    onnx.save(model, path)
    options = Options(measure=False, strict=True, fuse_all=True, threads=threads)
    report = fuse(path, fused, options)
    clean = onnx_io.load_clean(path, folder)
    infer_shapes(clean)
    groups = [candidate.group for candidate in plan(clean, options).candidates]
    weights = [tensor for tensor in model.graph.initializer if tensor.name in chain.weights]
    shared = {tensor.name: ort_value(numpy_helper.to_array(tensor)) for tensor in weights}
    ours = _session(fused, report.library, threads, shared)
    by_hand = _session(*_handwritten(chain, model, weights, folder), threads, shared)
    unfused = ort.InferenceSession(str(path), session_options(threads))
    feeds = {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}
    expected = unfused.run(None, feeds)
    for name, session in (("ours", ours), ("the one written by hand", by_hand)):
        difference = largest_difference(expected, session.run(None, feeds))
        if not difference <= _AGREEMENT:
            raise ValueError(f"{chain.name} {list(shape)}: {name} differs by {difference:.3g}")
    # By twos: of three in turn, one of the kernels alone would find what onnxruntime leaves in the caches.
    beside_hand = interleaved([by_hand, ours], feeds, seconds=seconds / 2)
    beside_onnxruntime = interleaved([unfused, ours], feeds, seconds=seconds / 2)
    return Result(
        chain.name,
        shape,
        len(groups),
        sum(len(group.kernels) for group in groups),
        sum(map(moved_bytes, groups)),
        sum(map(compulsory_bytes, groups)),
        *beside_hand,
        *beside_onnxruntime,
    )


def _session(
    path: Path, library: Path | None, threads: int, weights: Mapping[str, ort.OrtValue]
) -> ort.InferenceSession:
    """weights: those of the model's that sessions share; they have to live as long as the session."""
    options = session_options(threads)
    for name, weight in weights.items():
        options.add_initializer(name, weight)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(path), options)


def _handwritten(
    chain: Chain, model: onnx.ModelProto, weights: Sequence[onnx.TensorProto], folder: Path
) -> tuple[Path, Path]:
    """A model of one node that the kernel written by hand computes, and the library with that."""
    name = f"handwritten_{chain.name}"
    graph = model.graph
    held = list(weights)
    if "groups" in chain.weights:
        held.append(helper.make_tensor("groups", onnx.TensorProto.FLOAT, [32], [1.0] * 32))
    node = helper.make_node(name, ["x", *chain.weights], [graph.output[0].name], domain="apollo_fuse")
    only = helper.make_graph([node], name, graph.input, graph.output, initializer=held)
    domains = [*model.opset_import, helper.make_opsetid("apollo_fuse", 1)]
    path, library = folder / "handwritten.onnx", folder / "handwritten.so"
    onnx.save(helper.make_model(only, opset_imports=domains, ir_version=model.ir_version), path)
    toolchain = Toolchain.find({"PATH": "/usr/bin:/bin"})
    source = (_SOURCES / f"{chain.name}.c").read_text()
    source = source.replace('#include "rows.h"', (_SOURCES / "rows.h").read_text())
    objects = compile_objects([source], toolchain, folder / "objects", 1)
    ops = tables([alone(name, len(node.input))], [toolchain.cpu.level])
    link_library(objects, ops, library, toolchain, folder / "objects")
    return path, library


_HEADER = (
    "chain",
    "shape",
    "ops",
    "launches",
    "bytes",
    "ours us",
    "by hand us",
    "time",
    "median",
    "onnxruntime us",
    "speed-up",
    "",
)


def _cells(result: Result) -> tuple[str, ...]:
    micro = [f"{1e6 * t.minimum:.1f}" for t in (result.ours, result.handwritten, result.unfused)]
    return (
        result.chain,
        "x".join(map(str, result.shape)),
        str(result.kernels),
        str(result.launches),
        f"{result.bytes_ratio:.2f}x",
        micro[0],
        micro[1],
        f"{result.time_ratio:.2f}x",
        f"{result.median_ratio:.2f}x",
        micro[2],
        f"{result.speedup:.2f}x",
        "" if result.holds else "over the bar",
    )


def to_markdown(results: Sequence[Result]) -> str:
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * len(_HEADER)]
    lines += ["| " + " | ".join(_cells(result)) + " |" for result in results]
    return "\n".join(lines) + "\n"


def to_json(results: Sequence[Result], facts: Mapping[str, str]) -> str:
    rows = [
        asdict(r)
        | {"bytes_ratio": r.bytes_ratio, "time_ratio": r.time_ratio, "median_ratio": r.median_ratio}
        | {"speedup": r.speedup, "holds": r.holds}
        for r in results
    ]
    return json.dumps({"machine": dict(facts), "rows": rows}, indent=2) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stitching", description=__doc__)
    names = [chain.name for chain in CHAINS]
    parser.add_argument("chains", nargs="*", metavar="CHAIN", help=f"of {', '.join(names)}; all without any")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row, all together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.chains if name not in names]
    if unknown:
        parser.error(f"{', '.join(unknown)} is no chain; give some of {', '.join(names)}")
    run = partial(measured, seconds=chosen.seconds, threads=chosen.threads)
    results: list[Result] = []
    for chain in CHAINS:
        for shape in chain.shapes if not chosen.chains or chain.name in chosen.chains else ():
            with tempfile.TemporaryDirectory() as folder:
                results.append(run(chain, shape, Path(folder)))
    table = Table(*_HEADER)
    for result in results:
        table.add_row(*_cells(result))
    markdown = to_markdown(results)
    show(table, markdown)
    if chosen.markdown is not None:
        chosen.markdown.write_text(markdown)
    if chosen.json is not None:
        chosen.json.write_text(to_json(results, machine()))
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
