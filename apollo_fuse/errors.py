"""The one class tree of errors that apollo-fuse raises on purpose.

Each message names the node or file, what was found, what was expected, and what to do; the command line
prints it as one line. Anything else that is raised is a defect of apollo-fuse.
"""


class ApolloFuseError(Exception):
    """The root: catching it catches every failure that apollo-fuse foresees."""


class UsageError(ApolloFuseError):
    """The caller asked for something that makes no sense; nothing was started."""


class ModelError(ApolloFuseError):
    """The model cannot be read, or is not a valid ONNX model."""


class CompilerError(ApolloFuseError):
    """The C compiler failed on generated code."""


class NoCompilerError(CompilerError):
    """No C compiler was found."""


class VerificationError(ApolloFuseError):
    """A fused model does not compute what the original computes."""


class OutputError(ApolloFuseError):
    """A result cannot be written where it was asked for."""
