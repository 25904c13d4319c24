"""The packages that a result depends on, and their versions."""

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "apollo-fuse",
    "onnx",
    "onnxruntime",
    "onnx-ir",
    "onnx-shape-inference",
    "islpy",
    "numpy",
    "sympy",
    "triton",
)


def versions() -> dict[str, str]:
    """Those that are installed, and Python itself, by name."""
    found = {name: _version(name) for name in _PACKAGES}
    return {name: text for name, text in found.items() if text} | {"python": platform.python_version()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
