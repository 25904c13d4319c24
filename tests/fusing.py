"""Fuses a model whatever that gains, and runs it beside the original: what tests of semantics stand on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_io
from apollo_fuse.bodies import nodes
from apollo_fuse.driver import fuse
from apollo_fuse.kernel import Kernel, Loop, LoopKind, walk
from apollo_fuse.layout import Layout, cut, load_clean_at
from apollo_fuse.measure import session_options
from apollo_fuse.options import InputShape, Options
from apollo_fuse.partition import Plan, plan
from apollo_fuse.report import Report
from apollo_fuse.running import run
from apollo_fuse.symbolic import infer_shapes
from apollo_fuse.tolerance import compare

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Fused:
    """A model as onnxruntime computes it with no optimisation at all, and with its kernels alone."""

    original: ort.InferenceSession
    fused: ort.InferenceSession
    report: Report
    unfused_nodes: tuple[str, ...]
    """Op types of the nodes that no kernel computes, those in bodies included."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, tuple[Array, Array]]:
        """For each output what is expected and what the kernels found."""
        names = [output.name for output in self.original.get_outputs()]
        expected, found = run(self.original, feeds), run(self.fused, feeds)
        return {
            name: (np.asarray(a), np.asarray(b)) for name, a, b in zip(names, expected, found, strict=True)
        }


def reference_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """onnxruntime's own kernels, one for each node as it stands."""
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the bodies in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from nodes_of(body)


def with_shapes(model: onnx.ModelProto, folder: Path) -> ir.Model:
    """The clean model as it is partitioned: with what its shapes decide and state known."""
    onnx.save(model, folder / "model.onnx")
    clean = load_clean_at(folder / "model.onnx", Layout.PORTABLE, folder)
    cut(clean, Layout.PORTABLE)
    return clean


def planned(model: onnx.ModelProto, folder: Path, options: Options | None = None) -> Plan:
    """All kernels that the model can have; worth it or not, unless the options say otherwise."""
    onnx.save(model, folder / "model.onnx")
    clean = onnx_io.load_clean(folder / "model.onnx", folder)
    infer_shapes(clean)
    return plan(clean, options or Options(fuse_all=True))


def kernels(model: onnx.ModelProto, folder: Path) -> list[Kernel]:
    """Those of a plan, as the passes leave them to the code generators."""
    return [kernel for candidate in planned(model, folder).candidates for kernel in candidate.group.kernels]


def lane_loops(kernel: Kernel) -> list[Loop]:
    return [step for step in walk(kernel.body) if isinstance(step, Loop) and step.kind is LoopKind.LANE]


def op_types(model: ir.Model) -> Counter[str]:
    """Those of the nodes in the model and its bodies."""
    return Counter(node.op_type for node in nodes(model.graph))


def assert_agrees(clean: ir.Model, model: onnx.ModelProto, *cases: Mapping[str, Array]) -> None:
    """Both give the same within the tolerances."""
    expects, finds = (reference_session(m) for m in (model, ir.to_proto(clean)))
    for case in cases:
        for expected, found in zip(run(expects, case), run(finds, case), strict=True):
            assert not compare("y", np.asarray(expected), np.asarray(found)).problem


def assert_computes_as(clean: ir.Model, model: onnx.ModelProto, *inputs: Array) -> None:
    """Both give the same y for each x."""
    expects, finds = (reference_session(m) for m in (model, ir.to_proto(clean)))
    for x in inputs:
        ((expected,), (found,)) = (run(session, {"x": x}) for session in (expects, finds))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def fuse_to_session(
    model: onnx.ModelProto,
    folder: Path,
    cache: Path,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    given: Mapping[str, Array] | None = None,
) -> Fused:
    """Fuses `model` unconditionally in `folder`; compiled kernels are kept in `cache`.

    `shapes` are the input shapes to verify with, `given` whole inputs. Raises VerificationError
    where a kernel computes something else on random inputs. The functions are taken out of the fused
    model, so that nothing but kernels can run in their place.
    """
    path, output = folder / "model.onnx", folder / "fused.onnx"
    onnx.save(model, path)
    sizes = tuple(InputShape(name, tuple(dims)) for name, dims in (shapes or {}).items())
    if given:
        np.savez(folder / "given.npz", **given)  # type: ignore[arg-type]
    options = Options(
        shapes=sizes,
        inputs=folder / "given.npz" if given else None,
        measure=False,
        strict=True,
        fuse_all=True,
        cache_dir=cache,
        threads=2,
        seed=seed,
    )
    report = fuse(path, output, options)
    fused = onnx.load(output)
    unfused = tuple(node.op_type for node in nodes_of(fused.graph) if node.domain != "apollo_fuse")
    del fused.functions[:]
    settings = session_options(2)
    if report.library is not None:
        settings.register_custom_ops_library(str(report.library))
    session = ort.InferenceSession(fused.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return Fused(reference_session(model), session, report, unfused)
