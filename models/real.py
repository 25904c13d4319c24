"""The registry of models that people use, each taken from a package that ships it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Shipped:
    """A file in a released package: `sha256` is that of the file, so any platform's package will do."""

    package: str
    version: str
    member: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Light:
    """A network in the onnx package's test data, whose weights were left out and are drawn here."""

    network: str


@dataclass(frozen=True, slots=True)
class RealModel:
    """A model and the inputs to measure it with.

    shapes: of the inputs whose shape the model leaves open.
    values: inputs that take one value in every place, because random ones make no sense.
    """

    name: str
    source: Shipped | Light
    shapes: Shapes = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


def _rapidocr(member: str, sha256: str) -> Shipped:
    return Shipped("rapidocr-onnxruntime", "1.4.4", f"rapidocr_onnxruntime/models/{member}", sha256)


def _silero(member: str, sha256: str) -> Shipped:
    return Shipped("silero-vad", "6.2.3", f"silero_vad/data/{member}", sha256)


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
