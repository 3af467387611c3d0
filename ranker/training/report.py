"""What a run says of itself while it trains: TensorBoard's scalars, the progress line, what training cost.

Times by part are the first rank's (:mod:`ranker.training.clock`); counts are of all ranks.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

from features.progress import Progress
from ranker.ranks import Ranks
from ranker.training.clock import StepClock
from ranker.training.cost import TrainingCost, rss_bytes
from ranker.training.table_figures import lookups, norms
from ranker.training.window import Window


class Report:
    """Scalars of a run; written by its first rank, asked for on all.

    Args:
        cost: sums up what training cost.
    """

    def __init__(self, tasks: int, cost: TrainingCost, clock: StepClock, ranks: Ranks) -> None:
        self.cost, self._tasks, self._clock, self._ranks = cost, tasks, clock, ranks
        self._writer: SummaryWriter | None = None
        self.window = Window(tasks, ranks)

    def open(self, root: Path, step: int) -> None:
        """Write to the run `root` from `step` on; what was written there beyond it is taken back."""
        if self._ranks.first:
            self._writer = SummaryWriter(str(root / "tensorboard"), purge_step=step + 1)
        self._clock.read()
        self.window = Window(self._tasks, self._ranks)

    def scalar(self, name: str, value: float, step: int) -> None:
        """One number."""
        if self._writer:
            self._writer.add_scalar(name, value, step)

    def saved(self, model: nn.Module, step: int) -> None:
        """A checkpoint is on its way: how large the tables' numbers are, and all so far on disk, which a run that goes
        on from it would not measure again; on every rank."""
        for name, value in norms(model, self._ranks).items():
            self.scalar(name, value, step)
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """No more comes."""
        if self._writer:
            self._writer.close()

    def steps(self, step: int, scalars: dict[str, float], progress: Progress) -> None:
        """The steps since the last time, with further `scalars` of this moment; on every rank."""
        window, ranks = self.window, self._ranks
        seconds = time.perf_counter() - window.started
        counts = (window.candidates, window.requests, window.clicks, window.events, float(window.batches))
        candidates, requests, clicks, events, batches = ranks.totals(*counts)
        self.cost.add(window.steps, candidates, seconds)
        *losses, auxiliary = ranks.totals(*window.losses.tolist(), float(window.auxiliary))
        losses = [loss / max(candidates, 1) for loss in losses]
        rate = min(max(clicks / max(candidates, 1), 1e-7), 1 - 1e-7)
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        found = dict(zip(("loss/ctr", "loss/ctcvr"), losses, strict=False))
        found |= {
            "loss/auxiliary": auxiliary / max(batches, 1),
            "train/ne": losses[0] / entropy,
            "train/gradient_norm": window.norm,
            "speed/steps_per_s": window.steps / seconds,
            "speed/requests_per_s": requests / seconds,
            "speed/candidates_per_s": candidates / seconds,
            "speed/events_per_s": events / seconds,
            "memory/rss_bytes": max(ranks.gathered(rss_bytes())),
        }
        if ranks.device.type == "cuda":
            found["memory/gpu_peak_bytes"] = max(ranks.gathered(float(torch.cuda.max_memory_allocated())))
        for part, spent in self._clock.read().items():
            found[f"time_ms/{part}"] = 1000 * spent / max(window.steps, 1)
        if ranks.total(float(window.last is None)) == 0:
            assert window.last is not None
            found |= lookups(window.last, ranks)
        for name, value in (found | scalars).items():
            self.scalar(name, value, step)
        progress.note(
            f"loss {losses[0]:.4f}  ne {found['train/ne']:.4f}  {found['speed/candidates_per_s']:,.0f} candidates/s"
        )
        self.window = Window(self._tasks, ranks)
