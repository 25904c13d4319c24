"""Kernels written by hand, as good as their author could make them: what generated code is held against."""
