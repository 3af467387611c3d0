"""Where a preparation is: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Steps:
    """A known number of steps, one after the other.

    >>> with Steps("ml1m", 2) as steps, steps.step("validating"):  # doctest: +SKIP
    ...     ...
    """

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        console = Console(file=sys.stderr)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn(f"{name}: {{task.description}}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def expect(self, more: int) -> None:
        """Add steps whose number was not known before."""
        self._total += more
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)

    @contextmanager
    def step(self, what: str) -> Generator[None]:
        """One step, timed."""
        began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        yield
        self._done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        else:
            seconds = time.monotonic() - began
            print(f"{self._name}: [{self._done}/{self._total}] {what} ({seconds:.1f} s)", file=sys.stderr, flush=True)
