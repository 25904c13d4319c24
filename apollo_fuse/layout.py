"""The cut into onnxruntime's ladder of optimisations that a model is fused at.

*Portable* is behind the basic optimisations: such a graph runs anywhere. *ort* is behind all of them: tensors
and weights around convolutions lie in blocks, for processors like this one, and what is fused works on them
as they lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_io
from apollo_fuse.blocked import DOMAIN, block_size
from apollo_fuse.bodies import add_weight, bodies, nodes
from apollo_fuse.branches import take_decided_branches
from apollo_fuse.convolution_scales import fold_scales
from apollo_fuse.graph import Refused
from apollo_fuse.loop_products import take_out_of_loops
from apollo_fuse.one_hot_products import read_one_hot_rows
from apollo_fuse.passes.keep_blocked import KeepBlocked
from apollo_fuse.passes.open_compound_ops import OpenCompoundOps
from apollo_fuse.plain_sums import write_sums_as_additions
from apollo_fuse.shape_nodes import remove_known_shapes
from apollo_fuse.symbolic import infer_shapes, known_in
from apollo_fuse.tolerance import Array

METADATA = "apollo_fuse.made_for"


class Layout(StrEnum):
    """Which graph of onnxruntime's is fused."""

    PORTABLE = "portable"
    ORT = "ort"


@dataclass(frozen=True, slots=True)
class Cut:
    """A model at one cut; `model` is `clean` with shapes, inputs with a default made plain ones.

    rewritten: whether it may be faster than the original with no kernel, by other operators or its layout.
    """

    clean: ir.Model
    model: ir.Model
    defaults: Mapping[str, Array]
    refused: tuple[Refused, ...]
    rewritten: bool = False


def load_clean_at(path: Path, layout: Layout, folder: Path) -> ir.Model:
    """The model at `path` behind the optimisations of this cut; otherwise as `onnx_io.load_clean`.

    What is rewritten in a portable model is so before all optimisations, too: behind them, operators and
    weights are others. `cut` does so again there, where more types are known.
    """
    clean = onnx_io.load_clean(path, folder)
    if layout is Layout.PORTABLE:
        return clean
    _rewrite(clean)
    return onnx_io.load_clean(
        onnx_io.save_beside(clean, folder), folder, ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    )


def cut(clean: ir.Model, layout: Layout) -> Cut:
    """The model with its shapes; `clean` is rewritten, and what Loops stack has the extents that are known.

    Behind all optimisations it is changed, too, to keep tensors in blocks.
    """
    rewritten = _rewrite(clean)
    first = _annotated(clean, ())
    _state_stacked(clean, first.model)
    if layout is Layout.PORTABLE:
        return replace(first, rewritten=rewritten)
    values = known_in(clean, first.model)
    opened = OpenCompoundOps(clean.opset_imports[""])(clean.graph, values)
    refused = KeepBlocked(block_size())(clean.graph, values, opened)
    return replace(_annotated(clean, refused), rewritten=True)


def _rewrite(clean: ir.Model) -> bool:
    """Leaves out of the model what need not be computed, or less often, or not by an operator of its own.

    Gives whether that may gain much by itself.
    """
    write_sums_as_additions(clean)
    take_decided_branches(clean, _with_shapes)
    remove_known_shapes(clean, _with_shapes)
    return any(
        [rewrite(clean, _with_shapes) for rewrite in (fold_scales, read_one_hot_rows, take_out_of_loops)]
    )


def _state_stacked(clean: ir.Model, model: ir.Model) -> None:
    """States the extents that are known of what Loops stack; `model` is a copy with shapes.

    Where no iteration runs, onnxruntime gives what is stacked extents of 0 where it knows none, and it cannot
    see through kernels.
    """
    loops = [node for node in nodes(clean.graph) if node.op_type == "Loop" and not node.domain]
    values = known_in(clean, model) if loops else {}
    for node in loops:
        (body,) = bodies(node)
        for made in body.outputs[len(node.inputs) - 1 :]:
            known = values.get(made)
            if known is not None and made.shape is not None and len(made.shape) == len(known.shape):
                numbers = (extent.constant for extent in known.shape)
                pairs = zip(numbers, made.shape, strict=True)
                made.shape = ir.Shape([dim if number is None else number for number, dim in pairs])


def pin(model: ir.Model) -> None:
    """Makes a model that holds blocked tensors fail where blocks are of another size, in place.

    onnxruntime's own operators take weights in blocks of 8 for ones in blocks of 16, and compute nonsense. So
    the weights of a convolution get a zero added, from an operator that refuses to give it there; its name,
    which the error shows, says why. onnxruntime folds no such operator: it runs each time, on one element.
    """
    convolutions = [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type == "Conv"]
    if not convolutions:
        return
    node = min(convolutions, key=_weights)
    graph, weights = node.graph, node.inputs[1]
    assert isinstance(graph, ir.Graph)
    made_for = made_for_text(model)
    model.metadata_props[METADATA] = made_for
    name = f"apollo_fuse: this model was made for {made_for}; fuse it again on this machine"
    shape = (1, block_size(), 1, 1)
    zeros = add_weight(graph, "apollo_fuse_block", np.zeros(shape, np.float32))
    # one channel of a block: a block of another size holds it in fewer channels, or in none
    attributes = {"channels": 1, "channels_last": 0}
    zero = ir.node("ReorderOutput", [zeros], attributes, domain=DOMAIN, name=name)
    checked = ir.node("Add", [weights, zero.outputs[0]], name="apollo_fuse_checked_weights")
    zero.outputs[0].name, checked.outputs[0].name = "apollo_fuse_zero", "apollo_fuse_checked_weights"
    graph.insert_before(node, [zero, checked])
    node.replace_input_with(1, checked.outputs[0])


def made_for_text(model: ir.Model) -> str:
    """What a model that onnxruntime optimised is bound to."""
    version = f"onnxruntime {ort.__version__}"
    if all(node.domain != DOMAIN for node in model.graph.all_nodes()):
        return version
    return f"{version} and processors with blocks of {block_size()} channels"


def _with_shapes(model: ir.Model) -> ir.Model:
    return _annotated(model, ()).model


def _annotated(clean: ir.Model, refused: tuple[Refused, ...]) -> Cut:
    model = clean.clone()
    defaults = onnx_io.take_defaults(model)
    infer_shapes(model)
    return Cut(clean, model, defaults, refused)


def _weights(convolution: ir.Node) -> int:
    weights = convolution.inputs[1]
    return weights.const_value.size if weights is not None and weights.const_value is not None else 2**63
