"""Symbolic shapes: the dimensions of every tensor of a model as index polynomials.

Inference is the onnx-shape-inference package's; this module gives input dimensions names of our
own first, so that no text of a model is ever interpreted, and reads the results back.
"""

from __future__ import annotations

import ast
import logging
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir
from onnx_shape_inference import ShapeInferenceContext, infer_symbolic_shapes, registry

from apollo_fuse.dtypes import DType
from apollo_fuse.graph import Shape, Value
from apollo_fuse.index import Index, Symbol

_BEYOND_ANY_AXIS = 2**29
registry.collect()
_infer_slice = registry.get("", "Slice", 13)
assert _infer_slice is not None


@registry.register("", "Slice", since_version=10)  # type: ignore[untyped-decorator]
def _infer_slice_soundly(context: ShapeInferenceContext, node: ir.Node) -> None:
    """The package's inference, less its assumption that an open axis is at least as long as a slice of it.

    Such an extent becomes a symbol of its own. That an axis holds one element at least is assumed here too.
    """
    _infer_slice(context, node)
    data, result = node.inputs[0], node.outputs[0]
    if data is None or data.shape is None or result.shape is None:
        return
    dims: list[int | ir.SymbolicDim] = []
    for before, after in zip(data.shape, result.shape, strict=True):
        assumed = not isinstance(before, int) and isinstance(after, int) and after > 1
        dims.append(context.new_symbolic_dim() if assumed else after)
    result.shape = ir.Shape(dims)


_infer_if = registry.get("", "If", 13)
assert _infer_if is not None


@registry.register("", "If", since_version=1)  # type: ignore[untyped-decorator]
def _infer_if_soundly(context: ShapeInferenceContext, node: ir.Node) -> None:
    """The package's inference, less its assumption that a branch of unknown shape has the other's."""
    _infer_if(context, node)
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for place, output in enumerate(node.outputs):
        if any(branch.outputs[place].shape is None for branch in branches):
            output.shape = None


def infer_shapes(model: ir.Model) -> dict[str, str]:
    """Annotates every value of the model, in place; gives our name of each input dimension's own name.

    Dimensions that the model's inputs leave open become ``s0, s1, ...``; equal names stay equal.
    Shapes that the model claims for intermediate values are inferred again.
    """
    names: dict[str, str] = {}
    for place, value in enumerate(model.graph.inputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [_named(dim, names, f"{place}.{axis}") for axis, dim in enumerate(value.shape)]
            )
    outputs = {value: value.shape for value in model.graph.outputs}
    inputs = set(model.graph.inputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in inputs and value.shape is not None and not value.shape.is_static():
                value.shape = None
    logging.getLogger("onnx_shape_inference").setLevel(logging.ERROR)
    with _open_ended_slices(model.graph):
        infer_symbolic_shapes(model, warn_on_missing=False, adopt_declared_symbols=False)
    for value, shape in outputs.items():
        if value.shape is None:
            value.shape = shape
    return {own: original for original, own in names.items()}


@contextmanager
def _open_ended_slices(graph: ir.Graph) -> Generator[None]:
    """Shows inference ends beyond any axis as the greatest integer, which it knows to mean "to the end"."""
    changed: list[tuple[ir.Node, ir.Value]] = []
    for node in graph:
        ends = node.inputs[2] if node.op_type == "Slice" and len(node.inputs) > 2 else None
        if ends is None or ends.const_value is None:
            continue
        numbers = ends.const_value.numpy().astype(np.int64)
        if (numbers >= _BEYOND_ANY_AXIS).any():
            open_ended = np.where(numbers >= _BEYOND_ANY_AXIS, np.iinfo(np.int64).max, numbers)
            node.replace_input_with(2, ir.Value(name=f"{ends.name}_open", const_value=ir.tensor(open_ended)))
            changed.append((node, ends))
    yield
    for node, ends in changed:
        node.replace_input_with(2, ends)


def values_of(graph: ir.Graph) -> dict[ir.Value, Value]:
    """The tensors of a graph whose type and rank are known, named ``v0, v1, ...`` in order of definition."""
    known: dict[str, Index] = {}
    result: dict[ir.Value, Value] = {}
    for number, value in enumerate(_values(graph)):
        dtype = None if value.dtype is None else DType.of_onnx(value.dtype.value)
        shape = _shape(value, known)
        if dtype is not None and shape is not None:
            result[value] = Value(f"v{number}", dtype, shape)
    return result


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    seen: set[ir.Value] = set()
    for value in (*graph.inputs, *graph.initializers.values()):
        if value not in seen:
            seen.add(value)
            yield value
    for node in graph:
        yield from node.outputs


def _named(dim: int | ir.SymbolicDim, names: dict[str, str], place: str) -> int | ir.SymbolicDim:
    if isinstance(dim, int) and dim >= 0:
        return dim
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    # exporters write "?" and "unk" style names for dimensions that nothing relates
    key = name if name and name.strip("?") else place
    return ir.SymbolicDim(names.setdefault(key, f"s{len(names)}"))


def _shape(value: ir.Value, known: dict[str, Index]) -> Shape | None:
    if value.shape is None:
        return () if value.const_value is not None and not value.const_value.shape else None
    extents: list[Index] = []
    for dim in value.shape:
        if isinstance(dim, int):
            extents.append(Index.of(dim))
            continue
        if dim.value is None:
            return None
        if dim.value not in known:
            known[dim.value] = _parse(dim.value)
        extents.append(known[dim.value])
    return tuple(extents)


def _parse(text: str) -> Index:
    """A dimension's formula as a polynomial; what is not one (a floor, a minimum) becomes one symbol."""
    try:
        return _polynomial(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return Index.of(Symbol(text))


def _has_opaque_part(node: ast.expr) -> bool:
    operators = (ast.Call, ast.FloorDiv, ast.Div, ast.Mod)
    return any(isinstance(part, operators) for part in ast.walk(node))


def _has_sign(node: ast.expr) -> bool:
    return any(isinstance(part, (ast.USub, ast.Sub)) for part in ast.walk(node))


def _polynomial(node: ast.expr) -> Index:
    match node:
        case ast.BinOp(op=ast.Add() | ast.Sub()) | ast.UnaryOp() if _has_opaque_part(node):
            # the size of a window's result: only its value matters, not how it came about
            return Index.of(Symbol(ast.unparse(node)))
        case ast.BinOp(op=ast.Mult()) if _has_opaque_part(node) and _has_sign(node):
            return Index.of(Symbol(ast.unparse(node)))  # its parts may be negative, as no symbol is
        case ast.Constant(value=int() as value):
            return Index.of(value)
        case ast.Name(id=name):
            return Index.of(Symbol(name))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_polynomial(operand)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _polynomial(left) + _polynomial(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _polynomial(left) - _polynomial(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _polynomial(left) * _polynomial(right)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)) if 0 < power < 9:
            base = _polynomial(left)
            result = base
            for _ in range(power - 1):
                result = result * base
            return result
        case _:
            return Index.of(Symbol(ast.unparse(node)))
