"""What training a run cost, as its ``training.json`` tells: speed, memory, parameters."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ranker.machine import machine

if TYPE_CHECKING:
    from ranker.tables.embeddings import Tables


@dataclass
class TrainingCost:
    """Sums over the steps of one process, those of a resumed run from where it was resumed; validation is left out.
    first_step: how many steps had been done before."""

    dense_parameters: int
    table_parameters: int
    first_step: int = 0
    steps: int = 0
    candidates: float = 0.0
    seconds: float = 0.0

    def add(self, steps: int, candidates: float, seconds: float) -> None:
        """So much more."""
        self.steps += steps
        self.candidates += candidates
        self.seconds += seconds

    def content(self) -> dict[str, float | int | str | None]:
        """As it is written; no speed where nothing was left to train. `peak_rss_bytes` and `machine` are the first
        rank's."""
        return {
            "steps": self.steps,
            "total_steps": self.first_step + self.steps,
            "candidates": int(self.candidates),
            "seconds": self.seconds,
            "candidates_per_s": self.candidates / self.seconds if self.seconds else None,
            "peak_rss_bytes": peak_rss_bytes(),
            "dense_parameters": self.dense_parameters,
            "table_parameters": self.table_parameters,
            "machine": machine("torch", "torchrec"),
        }


def table_parameters(tables: Tables) -> int:
    """Of the tables that are trained, before they are sharded: frozen content is not."""
    return sum(p.numel() for name, p in tables.named_parameters() if not name.startswith("content."))


def rss_bytes() -> int:
    """The memory that this process has in RAM now; the most it had, where only that can be told."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.is_file() else peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory that this process has had in RAM. From /proc where there is one: `getrusage` also counts what the
    parent had when it forked."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
