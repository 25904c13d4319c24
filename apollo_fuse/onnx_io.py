"""Cleans models with onnxruntime's optimisations, and writes the results.

Weights are never held in memory: those of a clean model lie in one file of a working folder, which tensors
map and trial sessions read, until the result is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_files
from apollo_fuse.bodies import make_names_unique
from apollo_fuse.errors import ModelError, OutputError, what_onnxruntime_says
from apollo_fuse.wire import KEPT

_FATAL = 4  # onnxruntime's log level that shows fatal errors only
_WEIGHTS = "clean.bin"  # where onnxruntime writes the weights of the clean model
_NOT_WRITTEN = "Protobuf serialization failed"
_NOT_IMPLEMENTED = "Could not find an implementation"
_IN_BFLOAT16 = (
    ". It holds bfloat16, in which onnxruntime on a CPU moves, casts and normalises but does no arithmetic; "
    "compute in float32 behind a Cast, or convert the model to float16"
)
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
    proto = onnx_files.read(path)
    original = ir.from_proto(_without_graph(proto))
    place = Path(tempfile.mkdtemp(dir=folder))
    target = place / "clean.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(target)
    entries = {
        "session.optimized_model_external_initializers_file_name": _WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(KEPT),
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
        remedy = _IN_BFLOAT16 if _NOT_IMPLEMENTED in str(error) and _holds_bfloat16(proto) else ""
        raise ModelError(
            f"{path}: onnxruntime cannot load this model: {what_onnxruntime_says(error)}; "
            f"it has to run in onnxruntime before it can be fused{remedy}"
        ) from error
    model = ir.load(target)
    if original.ir_version < _OVERRIDABLE_SINCE:
        constants = model.graph.initializers
        for number in reversed(range(len(model.graph.inputs))):
            if model.graph.inputs[number].name in constants:
                model.graph.inputs.pop(number)
        model.ir_version = _OVERRIDABLE_SINCE  # in which weights need not be inputs
    model.producer_name, model.producer_version = original.producer_name, original.producer_version
    model.metadata_props.update(original.metadata_props)
    model.graph.doc_string = original.graph.doc_string
    make_names_unique(model.graph)
    _keep_used_domains(model)
    return model


def save_beside(model: ir.Model, folder: Path) -> Path:
    """Writes a clean model to the folder of its weights, or to a new one in `folder`; gives where."""
    path = (_folder_of_weights(model) or Path(tempfile.mkdtemp(dir=folder))) / "rewritten.onnx"
    ir.save(model, path)
    return path


def _holds_bfloat16(proto: onnx.ModelProto) -> bool:
    """Whether weights or inputs are of this type, by which whole models are."""
    types = [weight.data_type for weight in proto.graph.initializer]
    types += [value.type.tensor_type.elem_type for value in proto.graph.input]
    return onnx.TensorProto.BFLOAT16 in types


def _keep_used_domains(model: ir.Model) -> None:
    """onnxruntime lists every domain that the process knows, that of fused models it has loaded included."""
    used = {"", *(node.domain for node in model.graph.all_nodes())}
    for domain in set(model.opset_imports) - used:
        del model.opset_imports[domain]


def beside_weights(options: ort.SessionOptions, model: ir.Model) -> ort.SessionOptions:
    """The options, for a session of the model as bytes, with the folder that its weights lie in."""
    folder = _folder_of_weights(model)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
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


def _without_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
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


def write(model: ir.Model, path: Path) -> None:
    """Puts a model at `path` in one step; otherwise as `onnx_files.write`."""
    folder = _folder_of_weights(model) or Path()
    onnx_files.write(ir.to_proto(model), lambda location: folder / location, path)


def _folder_of_weights(model: ir.Model) -> Path | None:
    """Where those weights lie that are in a file; None where none are."""
    folders = {Path(tensor.base_dir) for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)}
    assert len(folders) <= 1, "all weights of a clean model lie in one file"
    return next(iter(folders), None)


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
