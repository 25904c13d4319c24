"""How a compilation tells what it is at: a protocol, and its two forms, silent and drawn by rich."""

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichBars


class Progress(Protocol):
    """What a compilation calls as it goes. A stage ends where the next begins, or with the whole."""

    def stage(self, name: str, total: int | None) -> None:
        """Begin the stage `name`, of `total` steps (kernels, nodes), or of a number not known (None)."""

    def advance(self, n: int = 1) -> None:
        """`n` more steps of the present stage are done."""


class SilentProgress:
    """Tells nothing."""

    def stage(self, name: str, total: int | None) -> None:
        """Say nothing."""

    def advance(self, n: int = 1) -> None:
        """Say nothing."""


class TerminalProgress:
    """A bar a stage on a terminal, and one plain line a finished stage elsewhere.

    A context manager: the last stage ends with it. `console` should write to stderr.
    """

    __slots__ = ("_bars", "_began", "_console", "_done", "_name", "_task", "_total")

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichBars | None = None
        if console.is_terminal:
            self._bars = RichBars(
                SpinnerColumn(finished_text="·"),
                TextColumn("{task.description:<12}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
        self._task: TaskID | None = None
        self._name: str | None = None
        self._total: int | None = None
        self._done = 0
        self._began = 0.0

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end_stage()
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage, and end the one before it."""
        self._end_stage()
        self._name, self._total, self._done, self._began = name, total, 0, time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(escape(name), total=total)

    def advance(self, n: int = 1) -> None:
        """`n` more steps of the present stage are done."""
        self._done += n
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, n)

    def _end_stage(self) -> None:
        if self._name is None:
            return
        if self._bars is None:
            steps = (
                ""
                if not self._done
                else f" {self._done}"
                if self._total is None
                else f" {self._done}/{self._total}"
            )
            self._console.out(f"{self._name}:{steps} {time.monotonic() - self._began:.1f} s", highlight=False)
        elif self._task is not None:
            finished = max(self._done, 1) if self._total is None else self._total
            self._bars.update(self._task, total=finished, completed=finished)
        self._name = None
