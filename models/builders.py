"""The registry of models that are built here: each stands for one thing that fusion has to do well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import onnx

from models import columns, detection, gpt2, memory_bound, networks

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Builder:
    """A model and the inputs to measure it with.

    function: builds it in the size that is measured; keyword arguments build another one.
    shapes: of the inputs whose shape the model leaves open.
    values: inputs that take one value in every place, because random ones make no sense.
    positive: inputs that are never negative.
    memory_bound: whether its time goes into moving tensors.
    core: whether it belongs to the set that the headline figure is the geometric mean of.
    """

    name: str
    function: Callable[..., onnx.ModelProto]
    memory_bound: bool
    core: bool
    shapes: Shapes = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    positive: frozenset[str] = frozenset()

    @property
    def chosen(self) -> frozenset[str]:
        """The inputs whose values are not those of any random ones."""
        return self.positive.union(self.values)


_STEP = {"learning_rate": 1e-3, "step": 10.0}
_MOMENTS = frozenset(f"second_{index}" for index in range(1000))

BUILDERS: dict[str, Builder] = {
    builder.name: builder
    for builder in (
        Builder("chain20_4m", partial(memory_bound.chain20, 2048, 2048), True, True),
        Builder("chain20_64k", partial(memory_bound.chain20, 256, 256), True, True),
        Builder("softmax", memory_bound.softmax, True, True),
        Builder("layernorm", memory_bound.layernorm, True, True),
        Builder(
            "layernorm_symbolic",
            partial(memory_bound.layernorm, rows="batch"),
            True,
            True,
            {"x": (512, 1024)},
        ),
        Builder("rmsnorm", memory_bound.rmsnorm, True, True),
        Builder("rmsnorm_divided", partial(memory_bound.rmsnorm, divided=True), True, True),
        Builder("gelu_erf", memory_bound.gelu_erf, True, True),
        Builder("gelu_tanh", memory_bound.gelu_tanh, True, True),
        Builder("mish", memory_bound.mish, True, True),
        Builder("image_preprocessing", memory_bound.image_preprocessing, True, True),
        Builder("wide_deep", memory_bound.wide_deep, True, False),
        Builder("adam", memory_bound.adam, True, False, values=_STEP, positive=_MOMENTS),
        Builder("adam100", partial(memory_bound.adam, 100), True, False, values=_STEP, positive=_MOMENTS),
        Builder(
            "adam1000",
            partial(memory_bound.adam, 1000, shapes=memory_bound.VECTOR_SHAPES),
            True,
            False,
            values=_STEP,
            positive=_MOMENTS,
        ),
        Builder("lamb100", partial(memory_bound.lamb, 100), True, False, values=_STEP, positive=_MOMENTS),
        Builder("reduce_sum_square", memory_bound.reduce_sum_square, True, False),
        Builder(
            "wide_deep_preprocessing",
            columns.wide_deep_preprocessing,
            True,
            False,
            positive=frozenset(f"count_{index}" for index in range(40)),
        ),
        Builder("detection_decode", detection.detection_decode, True, False),
        Builder(
            "bert_layer",
            networks.bert_layer,
            False,
            True,
            {"hidden_states": (8, 128, 768), "attention_mask": (8, 128)},
        ),
        Builder(
            "bert_large",
            networks.bert_large,
            False,
            False,
            {"hidden_states": (1, 128, 1024), "attention_mask": (1, 128)},
            {"attention_mask": 1},
        ),
        Builder("gpt2_block", gpt2.gpt2_block, False, False, {"hidden_states": (4, 128, 768)}),
        Builder(
            "gpt2_decode",
            gpt2.gpt2_decode,
            False,
            False,
            {
                "hidden_states": (1, 1, 768),
                "past_key": (1, 12, 511, 64),
                "past_value": (1, 12, 511, 64),
            },
        ),
        Builder("matmul_add_gelu", networks.matmul_add_gelu, False, False, {"x": (8, 128, 768)}),
        Builder("levit_hardswish", networks.levit_hardswish, False, False, {"x": (16, 196, 256)}),
        Builder("mbconv", networks.mbconv, False, False),
        Builder("silu_net", networks.silu_net, False, False),
        Builder("hardswish_se_net", networks.hardswish_se_net, False, False),
    )
}
