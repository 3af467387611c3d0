"""What was learned since the last log line."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from features.batch import RequestBatch
from ranker.ranks import Ranks


class Window:
    """Sums of this rank's batches; those that were skipped are left out.

    Attributes:
        steps: of the run, with those that skipped their batches.
        norm: of the last step's dense gradient, before it was clipped.
        last: the last batch.
        started: when the window began, by `time.perf_counter`; later by what was not training.
    """

    def __init__(self, tasks: int, ranks: Ranks) -> None:
        self.steps, self.batches, self.norm = 0, 0, 0.0
        self.candidates, self.requests, self.clicks, self.events = 0.0, 0.0, 0.0, 0.0
        self.losses, self.auxiliary = torch.zeros(tasks, device=ranks.device), torch.zeros([], device=ranks.device)
        self.last: RequestBatch | None = None
        self.started = time.perf_counter()

    def add(self, batch: RequestBatch, losses: Tensor, auxiliary: Tensor) -> None:
        """One batch: its losses `[tasks]`, summed over candidates, and this rank's part of the blocks' own."""
        self.losses += losses
        self.auxiliary += auxiliary
        self.batches += 1
        self.last = batch
        self.candidates += batch.candidates
        self.requests += batch.requests
        self.events += batch.event_time.numel()
        self.clicks += float(batch.labels[:, 0].sum())
