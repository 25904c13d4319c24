"""What follows the convolutions of a detector with anchors, up to the suppression of overlapping boxes."""

from __future__ import annotations

import numpy as np
import onnx

from models.writing import LAST_AXIS, Graph

_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
"""Widths and heights in pixels, three for each scale (Redmon & Farhadi 2018, section 2.3)."""
_STRIDES = (8, 16, 32)
_THRESHOLD = 0.25


def detection_decode(batch: int | str = 1, size: int = 640, classes: int = 80) -> onnx.ModelProto:
    """Boxes and scores of a YOLO-like detector from its maps at three scales; low scores become 0.

    Outputs: boxes `[batch, count, 4]` as corners in pixels, scores `[batch, count]`.
    """
    graph = Graph("detection_decode")
    boxes, scores = [], []
    for stride, anchors in zip(_STRIDES, _ANCHORS, strict=True):
        cells, count = size // stride, len(anchors)
        raw = graph.input(f"map_{stride}", [batch, count * (5 + classes), cells, cells])
        split = graph.op("Reshape", raw, np.array([0, count, 5 + classes, cells, cells], np.int64))
        last = graph.op("Transpose", split, perm=[0, 1, 3, 4, 2])
        places, extents, known, kinds = graph.ops(
            "Split", 4, last, np.array([2, 2, 1, classes], np.int64), axis=-1
        )
        shifted = graph.op("Add", graph.op("Sigmoid", places), _grid(cells))
        centre = graph.op("Mul", shifted, float(stride))
        sizes = np.array(anchors, np.float32).reshape(1, count, 1, 1, 2)
        half = graph.op("Mul", graph.op("Mul", graph.op("Exp", extents), sizes), 0.5)
        corners = graph.op("Concat", graph.op("Sub", centre, half), graph.op("Add", centre, half), axis=-1)
        boxes.append(graph.op("Reshape", corners, np.array([0, -1, 4], np.int64)))
        likely = graph.op("ReduceMax", graph.op("Sigmoid", kinds), LAST_AXIS)
        score = graph.op("Mul", graph.op("Sigmoid", known), likely)
        kept = graph.op("Where", graph.op("Greater", score, _THRESHOLD), score, 0.0)
        scores.append(graph.op("Reshape", kept, np.array([0, -1], np.int64)))
    total = sum(
        len(anchors) * (size // stride) ** 2 for stride, anchors in zip(_STRIDES, _ANCHORS, strict=True)
    )
    graph.output(graph.op("Concat", *boxes, axis=1), "boxes", [batch, total, 4])
    graph.output(graph.op("Concat", *scores, axis=1), "scores", [batch, total])
    return graph.model()


def _grid(cells: int) -> np.ndarray:
    """The column and row of each cell, `[1, 1, cells, cells, 2]`."""
    rows, columns = np.mgrid[:cells, :cells].astype(np.float32)
    return np.stack([columns, rows], -1)[None, None]
