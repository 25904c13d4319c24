"""GPU kernels in Triton, from the same kernel IR as those in C."""
