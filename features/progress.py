"""How long work reports itself: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

console = Console(stderr=True)


def log(line: str) -> None:
    """One plain line; above the bar where one is shown."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class Progress:
    """Progress over `total` steps. On a terminal a bar; elsewhere a line every 30 seconds.

    Args:
        shown: false on all ranks but the first.
    """

    def __init__(self, what: str, total: int, shown: bool = True, done: int = 0) -> None:
        self._what, self._total, self._shown, self._done = what, total, shown, done
        self._note = ""
        self._last_line = time.perf_counter()
        self._bar: RichProgress | None = None
        if shown and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"), console=console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._shown and error is None:
            log(f"{self._what}: {self._done}/{self._total} {self._note}")

    def note(self, text: str) -> None:
        """What to show beside the count."""
        self._note = text
        if self._bar:
            self._bar.update(self._task, note=text)

    def advance(self, steps: int = 1) -> None:
        """Count steps done."""
        self._done += steps
        if self._bar:
            self._bar.advance(self._task, steps)
        elif self._shown and time.perf_counter() - self._last_line > 30:
            self._last_line = time.perf_counter()
            log(f"{self._what}: {self._done}/{self._total} {self._note}")


class Steps:
    """A known number of named steps, one after the other. On a terminal a bar; elsewhere a line a step.

    >>> with Steps("ml1m", 2) as steps, steps.step("validating"):  # doctest: +SKIP
    ...     ...
    """

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._bar: RichProgress | None = None
        if sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn(f"{name}: {{task.description}}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                console=console, transient=True,
            )  # fmt: skip
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
            log(f"{self._name}: [{self._done}/{self._total}] {what} ({time.monotonic() - began:.1f} s)")
