"""The version of apollo-fuse, in a module of its own so that a build can read it without importing."""

__version__ = "0.1.0"
