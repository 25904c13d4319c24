"""Graphs inside graphs: the bodies of If, Loop and Scan, which are fused like the graph around them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

_ATTRIBUTES = {"If": ("then_branch", "else_branch"), "Loop": ("body",), "Scan": ("body",)}


def bodies(node: ir.Node) -> tuple[ir.Graph, ...]:
    """The graphs that a node of ONNX's control flow runs.

    Bodies of other operators (a beam search) are left out, since what they are fed is not known. So is that
    of the Scan of opset 8, which has an input more than its body and feeds it a batch.
    """
    if node.domain or node.op_type not in _ATTRIBUTES:
        return ()
    found = tuple(node.attributes[name].as_graph() for name in _ATTRIBUTES[node.op_type])
    return found if node.op_type != "Scan" or len(found[0].inputs) == len(node.inputs) else ()


def of_scanned(scan: ir.Node, what: str) -> tuple[int, ...]:
    """The `axes` or the `directions` of what a Scan reads in slices, 0 where it does not state them."""
    count = scan.attributes["num_scan_inputs"].as_int()
    return tuple(scan.attributes.get_ints(f"scan_input_{what}", (0,) * count))


def graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graph and the bodies in it, each before those that lie in it."""
    yield graph
    for node in graph:
        for body in bodies(node):
            yield from graphs(body)


def nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of the graph and of the bodies in it; a node's place here is its position in the model."""
    for part in graphs(graph):
        yield from part


def make_names_unique(graph: ir.Graph) -> None:
    """Renames values of bodies so that a name says which value of the model is meant.

    ONNX lets the two branches of an If use the same names.
    """
    taken: set[str] = set()
    for part in graphs(graph):
        own = [*part.inputs, *part.initializers.values(), *(v for node in part for v in node.outputs)]
        for value in dict.fromkeys(own):
            if not value.name:  # an output that is left out
                continue
            name, number = value.name, 1
            while name in taken:
                name, number = f"{value.name}_{number}", number + 1
            taken.add(name)
            if name != value.name:
                value.name = name


def add_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new weight of the graph; nothing else may have the name."""
    tensor = ir.tensor(array)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


class Names:
    """The names of a graph's values and nodes, those of the bodies that `graphs` gives included."""

    def __init__(self, graph: ir.Graph) -> None:
        self.taken: set[str | None] = set()
        for part in graphs(graph):
            self.taken |= {value.name for value in (*part.inputs, *part.initializers.values())}
            for node in part:
                self.taken |= {node.name, *(value.name for value in node.outputs)}

    def like(self, value: ir.Value, ending: str) -> str:
        """A name that nothing has yet."""
        name = f"{value.name}_{ending}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name
