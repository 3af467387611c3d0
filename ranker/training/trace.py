"""Traces of a few steps by PyTorch's profiler, asked for by config or, while training runs, by SIGUSR1.

A trace is a file for https://ui.perfetto.dev or chrome://tracing, ``RUN/traces/step-00000101-rank-0.json.gz``, in which
the parts of :mod:`ranker.training.clock` are marked. Each rank that is asked traces itself.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from features.progress import log
from ranker.ranks import Ranks


class Tracer:
    """Traces into the run `root`: from the end of step `begin` on, if given, for `steps` steps."""

    def __init__(self, root: Path, ranks: Ranks, begin: int | None, steps: int) -> None:
        self._root, self._ranks, self._begin, self._steps = root, ranks, begin, steps
        self._asked = False
        self._profile: profile | None = None
        self._first, self._left = 0, 0

    @contextmanager
    def heard(self) -> Generator[None]:
        """Take SIGUSR1 as the wish for a trace, in here. Only the main thread can: elsewhere nothing changes. What is
        being traced at the end is written."""
        if threading.current_thread() is not threading.main_thread():
            try:
                yield
            finally:
                self._write()
            return

        def ask(*_: object) -> None:
            self._asked = True

        before = signal.signal(signal.SIGUSR1, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)
            self._write()

    def look(self, step: int) -> None:
        """Between two steps, `step` of which are done."""
        if self._profile is not None:
            self._left -= 1
            if self._left == 0:
                self._write()
        if self._profile is None and (self._asked or step == self._begin):
            self._asked, self._first, self._left = False, step + 1, self._steps
            activities = [ProfilerActivity.CPU]
            if self._ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def _write(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        folder = self._root / "traces"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{self._first:08d}-rank-{self._ranks.rank}.json.gz"
        aside = path.with_name(f".{path.name}")
        self._profile.export_chrome_trace(str(aside))
        aside.rename(path)
        exchanged = [e for e in self._profile.events() or () if e.name.startswith(("gloo:", "nccl:"))]
        under_way_s = sum(e.time_range.elapsed_us() for e in exchanged) / 1e6
        log(
            f"rank {self._ranks.rank}: {path} has a trace of {self._steps - self._left} steps; {len(exchanged):,} "
            f"collectives were under way for {under_way_s:.3g} s in all"
        )
        self._profile = None
