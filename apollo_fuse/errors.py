"""The one class tree of errors that apollo-fuse raises on purpose.

Each message names the node or file, what was found, what was expected, and what to do; the command line
prints it as one line. Anything else that is raised is a defect of apollo-fuse.
"""

import re

_FAILED_NODE = re.compile(r"while running (\w+) node\. Name:'([^']*)' Status Message: (.*?)(?=Non-zero|$)")
_STATUS = re.compile(r"^\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ")
_LOADING = re.compile(r"^Load model from .*? failed: ?(Fatal error: )?")
_SOURCE_PLACE = re.compile(r"^\S*/onnxruntime/\S+:\d+ .*?\)( const)? ")
_INVALID = re.compile(r"^(This is an invalid model|Invalid model)\. (Error: )?")


class ApolloFuseError(Exception):
    """The root: catching it catches every failure that apollo-fuse foresees."""


class UsageError(ApolloFuseError):
    """The caller asked for something that makes no sense; nothing was started."""


class NoFeedsError(UsageError):
    """No inputs can be made up for the model, so that nothing of it can be verified or measured."""


class ModelError(ApolloFuseError):
    """The model cannot be read, or is not a valid ONNX model."""


class CompilerError(ApolloFuseError):
    """A compiler failed on generated code."""


class NoCompilerError(CompilerError):
    """No C compiler was found."""


class NoTritonError(CompilerError):
    """Triton is not installed, which compiles kernels for GPUs."""


class VerificationError(ApolloFuseError):
    """A fused model does not compute what the original computes."""


class OutputError(ApolloFuseError):
    """A result cannot be written where it was asked for."""


def what_onnxruntime_says(error: BaseException) -> str:
    """The first line of an error of onnxruntime, without its codes, its own source places, or our path."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if failed := _FAILED_NODE.findall(text):  # of nodes in bodies, the innermost is the one that failed
        op_type, name, text = failed[-1]
        return f"{op_type} node {name!r}: {_SOURCE_PLACE.sub('', text).rstrip('.')}"
    for noise in (_STATUS, _LOADING, _SOURCE_PLACE, _INVALID):
        text = noise.sub("", text)
    return text.rstrip(".") or type(error).__name__
