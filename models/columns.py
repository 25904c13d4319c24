"""What feature columns go through before a Wide & Deep network: many small tensors, each its own way."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from models.writing import LAST_AXIS, Graph

_MOST = 1e6


def wide_deep_preprocessing(rows: int | str = 1024, columns: int = 40, buckets: int = 8) -> onnx.ModelProto:
    """Counts, each clipped and put on a logarithmic scale: normalised for the deep part, and one-hot over
    `buckets` ranges for the wide one, side by side.

    Output: `[rows, columns * (1 + buckets)]`.
    """
    graph = Graph("wide_deep_preprocessing")
    generator = np.random.default_rng(0)
    indices = np.arange(buckets, dtype=np.int32)[None]
    features = []
    for index in range(columns):
        count = graph.input(f"count_{index}", [rows, 1])
        boundaries = np.sort(generator.uniform(0.1, 2.0, (1, buckets - 1)).astype(np.float32))
        mean, deviation = generator.uniform(0.5, 1.0, (2, 1)).astype(np.float32)
        scaled = graph.op("Log", graph.op("Add", graph.op("Clip", count, 0.0, _MOST), 1.0))
        features.append(graph.op("Div", graph.op("Sub", scaled, mean), deviation))
        above = graph.op("Cast", graph.op("GreaterOrEqual", scaled, boundaries), to=TensorProto.INT32)
        bucket = graph.op("ReduceSum", above, LAST_AXIS)
        features.append(graph.op("Cast", graph.op("Equal", bucket, indices), to=TensorProto.FLOAT))
    graph.output(graph.op("Concat", *features, axis=1), "out", [rows, columns * (1 + buckets)])
    return graph.model()
