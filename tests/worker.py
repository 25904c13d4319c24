"""A process of its own that calls functions, for what has to be set up as a process starts, or may end it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

T = TypeVar("T")


class Ended(AssertionError):
    """A call ended the process that it ran in."""


class Worker:
    """`begin` is called with `arguments` as the process starts.

    A kernel that writes where it must not may end it.  That fails the call alone: the next one has a new
    process.
    """

    def __init__(self, begin: Callable[..., None], *arguments: object) -> None:
        self._begin, self._arguments = begin, arguments
        self._pool = self._started()

    def __call__(self, function: Callable[..., T], *arguments: object) -> T:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pool = self._started()
            raise Ended(f"{function.__name__} ended its process") from None

    def close(self) -> None:
        self._pool.shutdown()

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, get_context("spawn"), self._begin, self._arguments)
