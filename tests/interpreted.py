"""A model whose kernels all run in Triton's interpreter, one after the other, beside the original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_io
from apollo_fuse.codegen.triton.emit import Program, emit
from apollo_fuse.codegen.triton.spread import spreads
from apollo_fuse.fusion import Candidate
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.running import run
from apollo_fuse.symbolic import infer_shapes
from tests.fusing import Array, reference_session
from tests.interpreter import Interpreter


def candidates_of(model: onnx.ModelProto, folder: Path) -> tuple[ir.Model, Sequence[Candidate]]:
    """The clean model and all kernels that it can have, worth it or not."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    clean = onnx_io.load_clean(path, folder)
    infer_shapes(clean)
    return clean, plan(clean, Options(fuse_all=True)).candidates


def emitted(candidate: Candidate) -> Program:
    program = emit(candidate.group, candidate.name, candidate.name)
    assert isinstance(program, Program), program
    return program


def spread(candidate: Candidate) -> Iterator[Candidate]:
    """The candidate with loops of its kernels in their grids, in each way that some kernel has."""
    group = candidate.group
    for ways in zip_longest(*(spreads(kernel) for kernel in group.kernels)):
        if any(ways):
            kernels = tuple(way or kernel for way, kernel in zip(ways, group.kernels, strict=True))
            yield replace(candidate, group=replace(group, kernels=kernels))


@dataclass(frozen=True, slots=True)
class Kernels:
    """Runs the kernels of a model that has nothing but kernels."""

    clean: ir.Model
    candidates: Sequence[Candidate]
    interpreter: Interpreter

    def run(self, _: None, feeds: Mapping[str, Array]) -> list[Array]:
        values = {value: feeds[value.name] for value in self.clean.graph.inputs if value.name in feeds}

        def array(value: ir.Value) -> Array | None:
            return value.const_value.numpy() if value.const_value is not None else values.get(value)

        waiting = list(self.candidates)
        while waiting:
            ready = [x for x in waiting if all(array(value) is not None for value in x.part.inputs)]
            assert ready, "kernels wait for each other"
            for candidate in ready:
                inputs = [array(value) for value in candidate.part.inputs]
                found = self.interpreter.run(emitted(candidate), candidate.group, inputs)
                values |= dict(zip(candidate.part.outputs, found, strict=True))
                waiting.remove(candidate)
        return [array(value) for value in self.clean.graph.outputs]


@dataclass(frozen=True, slots=True)
class Interpreted:
    """What `tests.fusing.Fused` is for kernels in C."""

    original: ort.InferenceSession
    fused: Kernels

    def run(self, feeds: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
        """For each output what is expected and what the kernels found."""
        names = [output.name for output in self.original.get_outputs()]
        expected = run(self.original, feeds)
        found = self.fused.run(None, feeds)
        return {n: (np.asarray(a), np.asarray(b)) for n, a, b in zip(names, expected, found, strict=True)}


def interpreted(model: onnx.ModelProto, folder: Path, interpreter: Interpreter) -> Interpreted:
    """Every node of the model in a kernel."""
    clean, candidates = candidates_of(model, folder)
    inside = {node for candidate in candidates for node in candidate.part.nodes}
    left = [node.op_type for node in clean.graph if node not in inside]
    assert not left, left
    return Interpreted(reference_session(model), Kernels(clean, candidates, interpreter))
