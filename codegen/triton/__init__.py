"""GPU kernels in Triton, from the same kernel IR as C."""

from apollo_fuse.codegen.triton.emit import Launch, Program, emit

__all__ = ["Launch", "Program", "emit"]
