"""SIGTERM, by which schedulers say that a job's time is over, as something to ask for between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


class Interruption:
    """Whether the process was told to end; `asked` counts how often."""

    def __init__(self) -> None:
        self.asked = 0

    @contextmanager
    def heard(self) -> Generator[None]:
        """Count SIGTERM instead of dying of it, in here. Only the main thread can: elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(*_: object) -> None:
            self.asked += 1

        before = signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
