"""Parts of ONNX graphs as networkx graphs, and drawings of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx
import numpy as np
import onnx
from matplotlib.axes import Axes

from benchmarks.memory_share import COMPUTE_BOUND
from notebooks.style import FUSED

DOMAIN = "apollo_fuse"
"""Of the nodes that call a kernel."""

_BESIDE = 1.3  # units between vertices of one level
_MEMORY_BOUND = "#DCEBF5"
_COMPUTE_BOUND = "#C9C9C9"
_BEND = 0.5
_IN_A_LINE = 4  # operators that the label of a kernel names
_BOX = {"boxstyle": "round,pad=0.35", "edgecolor": "black", "linewidth": 0.8}


@dataclass(frozen=True, slots=True)
class Part:
    """Nodes of a graph in the order that they run in.

    ends: tensors that are drawn themselves, where the graph begins and ends.
    kernels: the operators that a fused node computes, by its first output; those of others are not told.
    """

    nodes: Sequence[onnx.NodeProto]
    ends: frozenset[str] = frozenset()
    kernels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def network(self) -> networkx.DiGraph:
        """A vertex for each node and each end, with its label and colour; an edge for each tensor."""
        graph = networkx.DiGraph()
        makers = {name: place for place, node in enumerate(self.nodes) for name in node.output}
        for place, node in enumerate(self.nodes):
            graph.add_node(place, label=self._label(node), colour=_colour(node))
            for name in node.input:
                if name in makers:
                    graph.add_edge(makers[name], place, tensor=name)
                elif name in self.ends:
                    graph.add_node(name, label=name, colour="white")
                    graph.add_edge(name, place, tensor=name)
            for name in self.ends.intersection(node.output):
                graph.add_node(name, label=name, colour="white")
                graph.add_edge(place, name, tensor=name)
        return graph

    @property
    def levels(self) -> list[list[int | str]]:
        """The vertices by their distance from the beginning."""
        return [list(level) for level in networkx.topological_generations(self.network)]

    def _label(self, node: onnx.NodeProto) -> str:
        if node.domain != DOMAIN:
            return str(node.op_type)
        computed = self.kernels.get(node.output[0])
        if computed is None:
            return "another kernel"
        lines = [
            " ".join(computed[start : start + _IN_A_LINE]) for start in range(0, len(computed), _IN_A_LINE)
        ]
        return "\n".join(("one kernel for", *lines))


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the bodies of If, Loop and Scan in it, less the Constants."""
    for node in graph.node:
        if node.op_type != "Constant":
            yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from nodes_of(body)


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How many nodes a model has of each operator; all fused ones count as `fused kernel`."""
    return Counter("fused kernel" if n.domain == DOMAIN else n.op_type for n in nodes_of(model.graph))


def whole(model: onnx.ModelProto) -> Part:
    """All of a model; a small one can be drawn."""
    return Part(list(nodes_of(model.graph)), _ends(model), _kernels(model))


def around(model: onnx.ModelProto, kernel: str) -> tuple[Part, Part]:
    """Where a model first calls the kernel, with the nodes before and behind: as it was, and as it is.

    What the call replaced is the body of its function.
    """
    call = next(node for node in model.graph.node if node.op_type == kernel)
    function = next(function for function in model.functions if function.name == kernel)
    names = dict(zip((*function.input, *function.output), (*call.input, *call.output), strict=True))
    replaced = [_renamed(node, names) for node in function.node if node.op_type != "Constant"]
    reads, writes = set(call.input), set(call.output)
    before = [node for node in model.graph.node if reads.intersection(node.output)]
    behind = [node for node in model.graph.node if writes.intersection(node.input)]
    ends, kernels = _ends(model), {call.output[0]: [node.op_type for node in replaced]}
    return (
        Part([*before, *replaced, *behind], ends, kernels),
        Part([*before, call, *behind], ends, kernels),
    )


def tensor_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """The sizes of the tensors of a model whose shapes are all known."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    return {
        value.name: int(np.prod([dimension.dim_value for dimension in tensor.shape.dim]))
        * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
        for value in (*graph.input, *graph.value_info, *graph.output)
        if (tensor := value.type.tensor_type).elem_type
    }


def draw(axes: Axes, part: Part, title: str, sizes: Mapping[str, int] | None = None) -> None:
    """Draws the part from its beginning downwards; `sizes` are written beside the tensors' edges."""
    graph, places = part.network, _places(part)
    boxes = {}
    for vertex, (x, y) in places.items():
        style = {**_BOX, "facecolor": graph.nodes[vertex]["colour"]}
        label = graph.nodes[vertex]["label"]
        text = axes.text(x, y, label, ha="center", va="center", fontsize=9, bbox=style)
        boxes[vertex] = text.get_bbox_patch()
    for source, target, tensor in graph.edges(data="tensor"):
        start, end = np.array(places[source]), np.array(places[target])
        passes_by = start[1] - end[1] > 1  # other vertices lie between
        arrow = {
            "arrowstyle": "-|>",
            "color": "0.35",
            "connectionstyle": f"arc3,rad={_BEND if passes_by else 0}",
            "patchA": boxes[source],
            "patchB": boxes[target],
            "shrinkA": 0,
            "shrinkB": 0,
        }
        axes.annotate("", end, start, arrowprops=arrow, zorder=4)  # above the boxes, whose places it needs
        if sizes and tensor in sizes and not passes_by:
            x, y = (start + end) / 2
            axes.text(x + 0.07, y, _size(sizes[tensor]), fontsize=8, va="center", color="0.3")
    across, down = zip(*places.values(), strict=True)
    axes.set_xlim(min(across) - 1, max(across) + 1)
    margin = 0.06 * (max(down) - min(down))
    axes.set_ylim(min(down) - margin, max(down) + margin)
    axes.set_title(title)
    axes.axis("off")


def _places(part: Part) -> dict[int | str, tuple[float, float]]:
    """Levels below each other, one unit apart, each centred."""
    return {
        vertex: (_BESIDE * (place - (len(level) - 1) / 2), -float(depth))
        for depth, level in enumerate(part.levels)
        for place, vertex in enumerate(level)
    }


def _colour(node: onnx.NodeProto) -> str:
    if node.domain == DOMAIN:
        return FUSED
    return _COMPUTE_BOUND if node.op_type in COMPUTE_BOUND else _MEMORY_BOUND


def _ends(model: onnx.ModelProto) -> frozenset[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return frozenset(v.name for v in (*model.graph.input, *model.graph.output)) - weights


def _kernels(model: onnx.ModelProto) -> dict[str, list[str]]:
    operators = {function.name: _op_types(function.node) for function in model.functions}
    return {n.output[0]: operators[n.op_type] for n in nodes_of(model.graph) if n.domain == DOMAIN}


def _op_types(nodes: Iterable[onnx.NodeProto]) -> list[str]:
    return [node.op_type for node in nodes if node.op_type != "Constant"]


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


def _size(size: int) -> str:
    units = ((1e6, "MB"), (1e3, "kB"), (1, "B"))
    return next(f"{size / unit:.3g} {name}" for unit, name in units if size >= unit or unit == 1)
