"""Model files: read without their weights, checked, counted, and written in one step with them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from apollo_fuse import wire
from apollo_fuse.atomic import replacing
from apollo_fuse.errors import ModelError, OutputError, what_onnxruntime_says

_LARGE = 1 << 30  # bytes of weights from which a model keeps them beside it: protobuf ends at 2 GiB
_ALIGNED = 4096  # bytes at whose multiples weights in a file of their own begin, so that they can be mapped


def read(path: Path) -> ModelProto:
    """The model without its larger weights, as `wire.outline` leaves it.

    Raises ModelError when it is none, or what belongs to it is missing.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give the path of an ONNX model")
    model = _parsed(path)
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{path}: not an ONNX model: it has no graph; is the file complete?")
    missing = sorted(str(file) for file in data_files(path, model) if not file.is_file())
    if missing:
        raise ModelError(
            f"{path}: its weights should be in {missing[0]}, which is missing; put the file there"
        )
    return model


def data_files(path: Path, model: ModelProto) -> set[Path]:
    """The files beside the model at `path` that hold its weights, bodies of If, Loop and Scan included."""
    return {wire.span(x, file_of(path)).file for x in outside(model)} - {path}


def file_of(path: Path) -> Callable[[str], Path]:
    """The files that the locations in the outline of the model at `path` name."""
    return lambda location: path.parent / location if location else path


def check_output(original: Path, path: Path) -> None:
    """Raises OutputError where writing a fused model to `path` would overwrite weights of another model."""
    data = weights_path(path)
    if not data.exists():
        return
    if any(data.samefile(file) for file in data_files(original, _parsed(original))):
        whose = f"holds weights of {original}"
    elif not path.is_file() or data not in data_files(path, _parsed(path)):
        whose = f"is no part of {path.name}"
    else:
        return
    raise OutputError(f"cannot write {path}: {data.name} beside it {whose}; give another output, or move it")


def weights_path(path: Path) -> Path:
    """Where the weights of a large model that is written to `path` lie."""
    return path.with_name(f"{path.name}.data")


def write(model: ModelProto, file: Callable[[str], Path], path: Path) -> None:
    """Puts a model at `path` in one step, whole; `file` finds its weights that lie outside.

    Where they are many, they go into one file beside it, since protobuf holds no more than 2 GiB. Raises
    OutputError where that cannot be done; then nothing has changed.
    """
    if sum(wire.span(tensor, file).length for tensor in outside(model)) > _LARGE:
        _write_large(model, file, path)
        return
    for tensor in _inner_tensors(model.graph):
        if wire.is_outside(tensor):
            take_in(tensor, file)
    with _writing(path), replacing(path) as temporary, temporary.open("xb") as output:
        wire.embed(model, file, output)


def write_unchanged(original: Path, path: Path) -> None:
    """Puts a copy of the model `original` at `path`, byte for byte where that makes a whole model.

    Weights in files of their own cannot be found from another folder; there the copy holds them itself.
    Raises OutputError where that cannot be done; then nothing has changed.
    """
    if path.parent.resolve() != original.parent.resolve():
        model = _parsed(original)
        if data_files(original, model):
            write(model, file_of(original), path)
            return
    with _writing(path), replacing(path) as temporary:
        shutil.copyfile(original, temporary)


def outside(model: ModelProto) -> list[TensorProto]:
    """The tensors that lie in files, bodies of If, Loop and Scan included."""
    return [tensor for tensor in _tensors(model.graph) if wire.is_outside(tensor)]


def take_in(tensor: TensorProto, file: Callable[[str], Path]) -> None:
    """Makes a tensor outside one that holds its bytes."""
    content = bytes(wire.span(tensor, file))
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")
    tensor.raw_data = content


def node_count(graph: GraphProto) -> int:
    """Nodes of a graph and of the bodies in it, less the Constants, which do nothing at run time."""
    return sum((node.op_type != "Constant") + sum(map(node_count, _bodies(node))) for node in graph.node)


def _parsed(path: Path) -> ModelProto:
    try:
        return onnx.load_model_from_string(wire.outline(path))
    except OSError as error:
        why = error.strerror or str(error)
        raise ModelError(f"{path}: cannot be read: {why}") from error
    except Exception as error:  # protobuf's decode error has no public class
        raise ModelError(
            f"{path}: not an ONNX model: {what_onnxruntime_says(error)}; is the file complete?"
        ) from error


def _write_large(model: ModelProto, file: Callable[[str], Path], path: Path) -> None:
    data = weights_path(path)
    with _writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=".apollo-fuse-") as folder:
        with Path(folder, data.name).open("xb") as output:
            for tensor in outside(model):
                span = wire.span(tensor, file)
                output.seek(-(-output.tell() // _ALIGNED) * _ALIGNED)
                wire.point(tensor, data.name, output.tell(), span.length)
                output.writelines(span.pieces())
        Path(folder, path.name).write_bytes(model.SerializeToString())
        os.replace(Path(folder, data.name), data)
        os.replace(Path(folder, path.name), path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns an error of the system into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OutputError(f"cannot write {path}: {why}; choose a place that can be written") from error


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Every weight and constant, bodies of If, Loop and Scan included."""
    yield from graph.initializer
    yield from _inner_tensors(graph)


def _inner_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Those of the graph's nodes alone."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
            for body in attribute.graphs:
                yield from _tensors(body)


def _bodies(node: NodeProto) -> Iterable[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs
