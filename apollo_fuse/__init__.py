"""apollo-fuse fuses the operators of an ONNX model into C kernels that onnxruntime runs as custom ops.

`fuse` compiles a model and `session` opens the result; both are loaded when first used, so that importing
this package stays light.
"""

from typing import TYPE_CHECKING

from apollo_fuse._version import __version__
from apollo_fuse.cpu import CpuTargets
from apollo_fuse.errors import ApolloFuseError
from apollo_fuse.options import InputShape, Options
from apollo_fuse.report import Report

if TYPE_CHECKING:
    from apollo_fuse.fusing import fuse
    from apollo_fuse.runtime import session

__all__ = [
    "ApolloFuseError",
    "CpuTargets",
    "InputShape",
    "Options",
    "Report",
    "__version__",
    "fuse",
    "session",
]


def __getattr__(name: str) -> object:
    if name == "fuse":
        from apollo_fuse.fusing import fuse

        return fuse
    if name == "session":
        from apollo_fuse.runtime import session

        return session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
