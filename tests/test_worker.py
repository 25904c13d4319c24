"""A call that ends its process fails by itself; those behind it do not."""

from __future__ import annotations

import os

import pytest

from tests.worker import Ended, Worker

_started = 0


def start(number: int) -> None:
    global _started
    _started = number


def started() -> int:
    return _started


def test_only_the_call_that_ends_its_process_fails() -> None:
    worker = Worker(start, 7)
    try:
        assert worker(started) == 7
        with pytest.raises(Ended, match="abort ended its process"):
            worker(os.abort)
        assert worker(started) == 7
    finally:
        worker.close()


def test_what_a_call_raises_comes_back() -> None:
    worker = Worker(start, 0)
    try:
        with pytest.raises(ValueError, match="invalid literal"):
            worker(int, "none")
    finally:
        worker.close()
