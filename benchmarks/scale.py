"""How the compiler's time and memory grow with the model: ``python -m benchmarks.scale``.

Compiles generated graphs of 1,000 to 30,000 nodes in four forms, each in a process of its own with an empty
cache and then a warm one, and fits the exponent with which the time grows with the number of nodes.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from apollo_fuse import Options, fuse
from benchmarks.bench import machine
from models.memory_bound import gelu
from models.networks import bert_layer
from models.writing import Graph

_ROOT = Path(__file__).resolve().parent.parent
_ROWS, _WIDTH = 64, 256
_BATCH, _SEQUENCE = 1, 128
_SIZES = (1_000, 3_000, 10_000, 30_000)
_BERT_SIZES = (648,)
_LIMIT_SECONDS = 1800.0
"""A compilation that takes longer hangs."""


def chain(nodes: int) -> onnx.ModelProto:
    """One long chain of elementwise operators."""
    graph = Graph("chain")
    value = graph.input("x", [_ROWS, _WIDTH])
    steps: tuple[Callable[[str], str], ...] = (
        lambda v: graph.op("Mul", v, 0.5),
        lambda v: graph.op("Add", v, 0.25),
        lambda v: graph.op("Abs", v),
        lambda v: graph.op("Sub", v, 0.125),
        lambda v: graph.op("Relu", v),
        lambda v: graph.op("Tanh", v),
    )
    for place in range(nodes):
        value = steps[place % len(steps)](value)
    graph.output(value, "out", [_ROWS, _WIDTH])
    return graph.model()


def layers(nodes: int) -> onnx.ModelProto:
    """Equal layers: a normalisation, two matrix products with a Gelu between them, a residual sum."""
    graph = Graph("layers")
    value = graph.input("x", [_ROWS, _WIDTH])
    generator = np.random.default_rng(0)
    up = graph.weight("up", generator.standard_normal((_WIDTH, _WIDTH), np.float32) * _WIDTH**-0.5)
    scale = graph.weight("scale", 1 + generator.standard_normal(_WIDTH, np.float32) / 10)
    bias = graph.weight("bias", generator.standard_normal(_WIDTH, np.float32) / 10)
    for _ in range(nodes // 10):
        normal = graph.op("LayerNormalization", value, scale, bias, axis=-1)
        inner = gelu(graph, graph.op("Add", graph.op("MatMul", normal, up), bias))
        value = graph.op("Add", graph.op("MatMul", inner, up), value)
    graph.output(value, "out", [_ROWS, _WIDTH])
    return graph.model()


def branches(nodes: int) -> onnx.ModelProto:
    """Many short branches of one input, each with weights and an output of its own, not all alike."""
    graph = Graph("branches")
    x = graph.input("x", [_ROWS, _WIDTH])
    generator = np.random.default_rng(0)
    for place in range(nodes // 10):
        value = x
        for step in range(4):
            weight = graph.weight(f"w{place}_{step}", generator.standard_normal(_WIDTH, np.float32))
            value = graph.op(("Tanh", "Sigmoid", "Abs")[place % 3], graph.op("Mul", value, weight))
        value = graph.op("ReduceMean", value, np.array([1], np.int64), keepdims=0)
        graph.output(graph.op("Mul", value, 0.5), f"out{place}", [_ROWS])
    return graph.model()


def mixed(nodes: int) -> onnx.ModelProto:
    """A random graph of elementwise operators, reductions, transpositions, softmaxes and matrix products."""
    graph = Graph("mixed")
    generator = np.random.default_rng(0)
    side = _ROWS
    values = [graph.input("x", [side, side]), graph.input("y", [side, side])]
    weight = graph.weight("w", generator.standard_normal((side, side), np.float32) * side**-0.5)
    unused = dict.fromkeys(values)

    def operand() -> str:
        """Mostly a recent value, as in real networks, now and then one from far back."""
        value = values[-min(len(values), 1 + int(generator.pareto(1.0)))]
        unused.pop(value, None)
        return value

    kinds = ("Tanh", "Sigmoid", "Abs", "Neg", "Relu", "Softmax", "Transpose", "MatMul", "mean")
    binary = ("Add", "Sub", "Mul", "Max")
    count = 0
    while count + len(unused) < nodes:
        kind = str(generator.choice(binary if generator.random() < 0.4 else kinds))
        if kind in binary:
            value = graph.op("Tanh", graph.op(kind, operand(), operand()))
        elif kind == "mean":
            mean = graph.op("ReduceMean", operand(), np.array([1], np.int64), keepdims=1)
            value = graph.op("Sub", operand(), mean)
        elif kind == "Transpose":
            value = graph.op("Transpose", operand(), perm=[1, 0])
        else:
            value = graph.op(kind, operand(), *([weight] if kind == "MatMul" else []))
        count += 2 if kind in binary or kind == "mean" else 1
        values.append(value)
        unused[value] = None
    total, *others = unused
    for value in others:
        total = graph.op("Add", total, value)
    graph.output(graph.op("Tanh", total), "out", [side, side])
    return graph.model()


def bert(nodes: int) -> onnx.ModelProto:
    """The encoder of BERT-base, embeddings and `nodes // 54` layers with weights of their own: 12 for 648."""
    graph = Graph("bert")
    ids = graph.input("input_ids", [_BATCH, _SEQUENCE], onnx.TensorProto.INT64)
    graph.input("attention_mask", [_BATCH, _SEQUENCE], onnx.TensorProto.INT64)
    generator = np.random.default_rng(0)
    words = graph.weight("words", generator.standard_normal((30522, 768), np.float32))
    states = graph.op("Gather", words, ids)
    model = graph.model()
    layer = bert_layer(_BATCH, _SEQUENCE).graph
    for place in range(nodes // len(layer.node)):
        names = {"hidden_states": states, "attention_mask": "attention_mask", "": ""}
        for tensor in layer.initializer:
            names[tensor.name] = f"{place}.{tensor.name}"
            weight = numpy_helper.to_array(tensor)
            own = np.roll(weight, place) if weight.dtype == np.float32 else weight
            model.graph.initializer.append(numpy_helper.from_array(own, names[tensor.name]))
        for node in layer.node:
            names |= {value: f"{place}.{value}" for value in node.output}
            copy = model.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"{place}.{node.name}"
            copy.input[:] = [names[value] for value in node.input]
            copy.output[:] = [names[value] for value in node.output]
        states = names["out"]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(states, onnx.TensorProto.FLOAT, [_BATCH, _SEQUENCE, 768])
    )
    return model


FORMS: Mapping[str, Callable[[int], onnx.ModelProto]] = {
    "chain": chain,
    "layers": layers,
    "branches": branches,
    "mixed": mixed,
    "bert": bert,
}


@dataclass(frozen=True, slots=True)
class Run:
    """One compilation; `peak` is the memory of its process at most, in bytes, mapped weights included."""

    form: str
    nodes: int
    warm: bool
    model_bytes: int
    peak: int
    fused_nodes: int
    distinct_kernels: int
    seconds: Mapping[str, float]


def compiled(model: Path, cache: Path, form: str, nodes: int, warm: bool) -> Run:
    """Compiles the model in this process."""
    report = fuse(model, model.with_name("fused.onnx"), Options(cache_dir=cache))
    return Run(
        form,
        nodes,
        warm,
        model.stat().st_size,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        report.fused_nodes,
        report.distinct_kernels,
        {"total": report.compile_seconds.total, **report.compile_seconds.parts},
    )


def measured(form: str, nodes: int) -> list[Run]:
    """A cold and a warm compilation, each in its own process; raises CalledProcessError where one fails."""
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "-m", "benchmarks.scale", "--build", folder, "--form", form, "--nodes"]
        subprocess.run([*build, str(nodes)], cwd=_ROOT, check=True, timeout=_LIMIT_SECONDS)
        for warm in (False, True):
            command = [sys.executable, "-m", "benchmarks.scale", "--compile", folder, "--form", form]
            command += ["--nodes", str(nodes), *(["--warm"] if warm else [])]
            subprocess.run(command, cwd=_ROOT, check=True, timeout=_LIMIT_SECONDS)
            runs.append(Run(**json.loads(Path(folder, "run.json").read_text())))
    return runs


def exponent(runs: Sequence[Run]) -> float:
    """The slope of log(time) over log(nodes), by least squares: 1 is linear."""
    slope, _ = np.polyfit(
        [math.log(run.nodes) for run in runs], [math.log(run.seconds["total"]) for run in runs], 1
    )
    return float(slope)


def line(run: Run) -> str:
    """A run as text: what it took in all and in each part that counts, and its memory."""
    parts = ", ".join(f"{k} {v:.2f}" for k, v in run.seconds.items() if k != "total" and v >= 0.005)
    return (
        f"{run.form} {run.nodes} {'warm' if run.warm else 'cold'}: {run.seconds['total']:.2f} s, "
        f"peak {run.peak / 2**20:.0f} MiB (model {run.model_bytes / 2**20:.0f} MiB), "
        f"{run.fused_nodes} nodes of {run.distinct_kernels} kernels\n    {parts}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--form", action="append", choices=list(FORMS), help="this one; may be repeated")
    parser.add_argument("--nodes", type=int, nargs="+", metavar="N", help="sizes, of every form")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument("--build", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--compile", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.build is not None:
        onnx.save(FORMS[chosen.form[0]](chosen.nodes[0]), chosen.build / "model.onnx")
        return 0
    if chosen.compile is not None:
        folder, form, nodes = chosen.compile, chosen.form[0], chosen.nodes[0]
        run = compiled(folder / "model.onnx", folder / "cache", form, nodes, chosen.warm)
        (folder / "run.json").write_text(json.dumps(asdict(run)))
        return 0
    everything: list[Run] = []
    for form in chosen.form or FORMS:
        sizes = chosen.nodes or (_BERT_SIZES if form == "bert" else _SIZES)
        runs: list[Run] = []
        for nodes in sizes:
            runs += measured(form, nodes)
            print("\n".join(map(line, runs[-2:])), flush=True)
        if len(sizes) > 1:
            cold = [run for run in runs if not run.warm]
            print(f"{form}: time grows with the {exponent(cold):.2f}th power of the nodes", flush=True)
        everything += runs
    if chosen.json:
        record = {"machine": machine(), "runs": list(map(asdict, everything))}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
