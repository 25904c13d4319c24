"""Reads models, cleans them with onnxruntime's optimisations, and writes the results.

Weights are never held in memory: those of a clean model lie in one file of a working folder, which tensors
map and trial sessions read, until the result is written.
"""

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
from apollo_fuse.bodies import make_names_unique
from apollo_fuse.errors import ModelError, OutputError, what_onnxruntime_says

_LARGE = 1 << 30  # bytes of weights from which a model keeps them beside it: protobuf ends at 2 GiB
_SMALL = 1024  # bytes up to which a weight stays in the clean model itself
_FATAL = 4  # onnxruntime's log level that shows fatal errors only
_WEIGHTS = "clean.bin"  # where onnxruntime writes the weights of the clean model
_NOT_WRITTEN = "Protobuf serialization failed"
_OVERRIDABLE_SINCE = 4  # the IR version from which an initialiser that is an input is a default value only


def load_clean(
    path: Path,
    folder: Path,
    level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
) -> ir.Model:
    """The model after constant folding, common sub-expressions, dead nodes and inlining of functions.

    At a higher `level` than the basic one, with onnxruntime's own fusions and layouts too.
    Its weights lie in a new file in `folder`, which has to stay while the model is used.
    No name means two values, bodies of If, Loop and Scan included.

    Raises ModelError when the file is missing, is no ONNX model, or onnxruntime does not accept it.
    """
    proto = _checked(path)
    original = ir.from_proto(_without_weights(proto))
    del proto  # holds the weights
    place = Path(tempfile.mkdtemp(dir=folder))
    target = place / "clean.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    entries = {
        "session.optimized_model_external_initializers_file_name": _WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_SMALL),
        "session.disable_prepacking": "1",  # nothing is run: no second copy of the weights
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
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
    if original.ir_version < _OVERRIDABLE_SINCE:
        constants = model.graph.initializers
        for number in reversed(range(len(model.graph.inputs))):
            if model.graph.inputs[number].name in constants:
                del model.graph.inputs[number]
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.metadata_props.update(original.metadata_props)
    model.graph.doc_string = original.graph.doc_string
    make_names_unique(model.graph)
    _keep_used_domains(model)
    return model


def _keep_used_domains(model: ir.Model) -> None:
    """onnxruntime lists every domain that the process knows, that of fused models it has loaded included."""
    used = {"", *(node.domain for node in model.graph.all_nodes())}
    for domain in set(model.opset_imports) - used:
        del model.opset_imports[domain]


def beside_weights(options: ort.SessionOptions, model: ir.Model) -> ort.SessionOptions:
    """The options, for a session of the model as bytes, with the folder that its weights lie in."""
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            folder = str(tensor.base_dir)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            break
    return options


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


def _checked(path: Path) -> onnx.ModelProto:
    """The model as it is read; raises ModelError when it is none, or what belongs to it is missing."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    proto = _read(path)
    if not proto.graph.node and not proto.graph.output:
        raise ModelError(f"{path}: not an ONNX model: it has no graph; is the file complete?")
    missing = sorted(str(file) for file in _data_files(path, proto) if not file.is_file())
    if missing:
        raise ModelError(
            f"{path}: its weights should be in {missing[0]}, which is missing; put the file there"
        )
    return proto


def check_output(original: Path, path: Path) -> None:
    """Raises OutputError where writing a fused model to `path` would overwrite weights of another model."""
    data = weights_path(path)
    if not data.exists():
        return
    if any(data.samefile(file) for file in _data_files(original, _read(original))):
        whose = f"holds weights of {original}"
    elif not path.is_file() or data not in _data_files(path, _read(path)):
        whose = f"is no part of {path.name}"
    else:
        return
    raise OutputError(f"cannot write {path}: {data.name} beside it {whose}; give another output, or move it")


def weights_path(path: Path) -> Path:
    """Where the weights of a large model that is written to `path` lie."""
    return path.with_name(f"{path.name}.data")


def write(model: ir.Model, path: Path) -> None:
    """Puts a model at `path` in one step; weights go into a file beside it where one would be too large.

    Raises OutputError where that cannot be done; then nothing has changed.
    """
    data = weights_path(path)
    if sum(tensor.nbytes for tensor in _tensors(model)) <= _LARGE:
        proto = ir.to_proto(model)
        for tensor in _tensors(model):
            if isinstance(tensor, ir.ExternalTensor):
                onnx.load_external_data_for_model(proto, str(tensor.base_dir))
                break
        with _writing(path), replacing(path) as temporary:
            temporary.write_bytes(proto.SerializeToString())
        return
    with _writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".apollo-fuse-") as folder:
        ir.save(model, Path(folder, path.name), external_data=data.name)
        os.replace(Path(folder, data.name), data)
        os.replace(Path(folder, path.name), path)


def write_unchanged(original: Path, path: Path) -> None:
    """Puts a copy of the model `original` at `path`, byte for byte where that makes a whole model.

    Weights in files of their own cannot be found from another folder; there the copy holds them itself.
    Raises OutputError where that cannot be done; then nothing has changed.
    """
    if path.parent.resolve() != original.parent.resolve() and _data_files(original, _read(original)):
        write(ir.load(original), path)
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


def _data_files(path: Path, proto: onnx.ModelProto) -> set[Path]:
    """The files beside the model at `path` that hold its weights, bodies of If, Loop and Scan included."""
    return {
        path.parent / entry.value
        for tensor in _proto_tensors(proto.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What a model says about itself: no graph but its documentation."""
    result = onnx.ModelProto(
        ir_version=proto.ir_version,
        producer_name=proto.producer_name,
        producer_version=proto.producer_version,
        metadata_props=proto.metadata_props,
        opset_import=proto.opset_import,
    )
    result.graph.doc_string = proto.graph.doc_string
    return result


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
