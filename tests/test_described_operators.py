"""Every operator that is described has a test, and is listed in the documentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from apollo_fuse.operators import DESCRIPTIONS
from tests import test_blocked_operators as blocked
from tests import test_operators as floats
from tests import test_quantized_operators as quantized
from tests import test_transformer_operators as transformers
from tests.test_operators import Table


def every_table() -> Iterator[Table]:
    yield floats.unary("float32")
    yield floats.binary("float32", (*floats.ARITHMETIC, "Div", "Mean"))
    yield floats.reductions("float32")
    yield floats.normalisations("float32")
    yield floats.movement("float32")
    yield floats.windows("float32")
    yield floats.resizes("float32")
    yield floats.linear([3, 4, 12, 24])
    yield floats.quantisation("float32", "int8")
    yield floats.padding("float32")
    yield floats.places("float32")
    yield floats.chosen("float32")
    yield quantized.pairs("int8", 0)
    yield quantized.functions("int8", 0)
    yield quantized.softmaxes("int8")
    yield quantized.pools("int8")
    yield transformers.rotary("float32")
    yield transformers.gated("float32")
    yield transformers.others("float32")
    yield transformers.newest("float32")
    yield transformers.bits("float32")
    yield blocked.reorders()
    yield blocked.scales()
    yield blocked.pools()


def test_every_description_stands_in_a_table() -> None:
    covered = {(case.domain, case.op) for table in every_table() for case in table.cases}
    elsewhere = {
        "And",
        "Or",
        "Xor",
        "Not",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "BitwiseNot",
        "Mod",
        "Cast",
        "Sin",
        "Cos",
        "Softmax",
        "LogSoftmax",
        "BitShift",
        "Range",
        "Upsample",
        "ConstantOfShape",
        "Conv",
        *floats.REMOVED,
    }
    left = set(DESCRIPTIONS) - covered - {("", op) for op in elsewhere}
    left -= {("com.microsoft", op) for op in ("EmbedLayerNormalization", "Range")}
    left -= {(domain, op) for _, _, _, op, domain in floats.SEVERAL.values()}
    # onnxruntime has no kernels for these names: they are those of exporters and of other runtimes
    assert left <= {("", "Silu"), ("com.microsoft", "SimplifiedLayerNormalization")}


def test_the_documentation_lists_what_is_covered() -> None:
    text = (Path(__file__).parent.parent / "docs" / "operators.md").read_text()
    listed = {
        (domain, name)
        for domain, heading in (
            ("", "Of ONNX: "),
            ("com.microsoft", "Of com.microsoft: "),
            ("com.microsoft.nchwc", "Of com.microsoft.nchwc: "),
        )
        for name in text.split(heading)[1].split(".\n")[0].replace("\n", " ").split(", ")
    }
    assert listed == set(DESCRIPTIONS)
