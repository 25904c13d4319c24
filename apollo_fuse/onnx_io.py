"""Reads models, cleans them with onnxruntime's basic optimisations, and writes the results."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse.atomic import replacing
from apollo_fuse.errors import ModelError, OutputError, what_onnxruntime_says

_LARGE = 1_500_000_000  # bytes from which a protobuf file keeps its weights beside it
_FATAL = 4  # onnxruntime's log level that shows fatal errors only
_OWN_WEIGHTS = "clean.bin"  # where onnxruntime writes the weights of a large model
_NOT_WRITTEN = "Protobuf serialization failed"
_OVERRIDABLE_SINCE = 4  # the IR version from which an initialiser that is an input is a default value only


def load_clean(path: Path) -> ir.Model:
    """The model after constant folding, common sub-expressions, dead nodes and inlining of functions.

    Raises ModelError when the file is missing, is no ONNX model, or onnxruntime does not accept it.
    """
    size = check_readable(path)
    with tempfile.TemporaryDirectory(prefix="apollo-fuse-") as folder:
        target = Path(folder, "clean.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(target)
        if size > _LARGE:
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", _OWN_WEIGHTS
            )
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
            )
        try:
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own for each status
            if _NOT_WRITTEN in str(error):
                raise OutputError(
                    f"cannot write a working copy of {path} to {folder}; make room there, or set TMPDIR"
                ) from error
            raise ModelError(
                f"{path}: onnxruntime cannot load this model: {what_onnxruntime_says(error)}; "
                "it has to run in onnxruntime before it can be fused"
            ) from error
        model = ir.load(target)
        # onnxruntime keeps what lay beside the original there, under the same relative name.
        for tensor in _tensors(model):
            if isinstance(tensor, ir.ExternalTensor) and Path(tensor.location).name != _OWN_WEIGHTS:
                tensor.base_dir = path.parent
        ir.external_data.load_to_model(model)
    original = ir.load(path)
    if original.ir_version < _OVERRIDABLE_SINCE:
        constants = model.graph.initializers
        for place in reversed(range(len(model.graph.inputs))):
            if model.graph.inputs[place].name in constants:
                del model.graph.inputs[place]
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.metadata_props.update(original.metadata_props)
    model.graph.doc_string = original.graph.doc_string
    return model


def take_defaults(model: ir.Model) -> dict[str, np.ndarray]:
    """Makes inputs with a default value plain ones, whose value no pass relies on; gives the defaults."""
    defaults: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        name = value.name
        if name is not None and name in model.graph.initializers and value.const_value is not None:
            defaults[name] = value.const_value.numpy()
            del model.graph.initializers[name]
            value.const_value = None
    return defaults


def check_readable(path: Path) -> int:
    """Bytes of the model with its external data; raises ModelError when it is no ONNX model."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    proto = _read(path)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX model: it has no graph; is the file complete?")
    files = {path, *(path.parent / name for name in _locations(proto))}
    missing = sorted(str(file) for file in files if not file.is_file())
    if missing:
        raise ModelError(
            f"{path}: its weights should be in {missing[0]}, which is missing; put the file there"
        )
    return sum(file.stat().st_size for file in files)


def write(model: ir.Model, path: Path) -> None:
    """Puts a model at `path` in one step; weights go into a file beside it where one would be too large.

    Raises OutputError where that cannot be done; then nothing has changed.
    """
    weights = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    if weights <= _LARGE:
        with _writing(path), replacing(path) as temporary:
            ir.save(model, temporary)
        return
    data = path.with_name(f"{path.name}.data")
    with _writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".apollo-fuse-") as folder:
        ir.save(model, Path(folder, path.name), external_data=data.name)
        os.replace(Path(folder, data.name), data)
        os.replace(Path(folder, path.name), path)


def write_unchanged(original: Path, path: Path) -> None:
    """Puts a copy of the model `original` at `path`, byte for byte where that makes a whole model.

    Weights in files of their own cannot be found from another folder; there the copy holds them itself.
    Raises OutputError where that cannot be done; then nothing has changed.
    """
    if path.parent.resolve() != original.parent.resolve() and _locations(_read(original)):
        model = ir.load(original)
        ir.external_data.load_to_model(model)
        write(model, path)
        return
    with _writing(path), replacing(path) as temporary:
        shutil.copyfile(original, temporary)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an error of the system into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {why}; choose a place that can be written") from error


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        why = error.strerror or str(error)
        raise ModelError(f"{path}: cannot be read: {why}") from error
    except Exception as error:  # protobuf's decode error has no public class
        raise ModelError(
            f"{path}: not an ONNX model: {what_onnxruntime_says(error)}; is the file complete?"
        ) from error


def _locations(proto: onnx.ModelProto) -> set[str]:
    """The files beside a model that hold its weights, bodies of If, Loop and Scan included."""
    return {
        entry.value
        for tensor in _proto_tensors(proto.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _proto_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _proto_tensors(attribute.g)
            for body in attribute.graphs:
                yield from _proto_tensors(body)


def _tensors(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    """Every weight and constant of a model, bodies of If, Loop and Scan included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if isinstance(attribute.value, ir.TensorProtocol):
                    yield attribute.value
