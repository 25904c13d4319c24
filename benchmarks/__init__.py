"""Benchmarks of apollo-fuse: ``python -m benchmarks.bench``."""
