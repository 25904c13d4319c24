"""What each ONNX operator means: one description each, as a tensor expression.

To add an operator, write its description in the module it belongs to; docs/operators.md shows how.
"""

from apollo_fuse.operators import (
    blocks,
    borders,
    depthwise,
    elementwise,
    indexing,
    movement,
    quantization,
    quantized,
    reductions,
    resize,
    transformers,
    windows,
)
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported
from apollo_fuse.operators.registry import DESCRIPTIONS

__all__ = [
    "DESCRIPTIONS",
    "Opener",
    "Tensor",
    "Unsupported",
    "blocks",
    "borders",
    "depthwise",
    "elementwise",
    "indexing",
    "movement",
    "quantization",
    "quantized",
    "reductions",
    "resize",
    "transformers",
    "windows",
]
