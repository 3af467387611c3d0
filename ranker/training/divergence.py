"""Batches that would ruin a model: told, kept to look at, and skipped where the config says so.

``torch.load("RUN/diverged/step-00000012-rank-0.pt")`` gives the plain tensors that :func:`features.batch.from_tensors`
makes a batch of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from features.batch import RequestBatch, to_tensors
from features.errors import UserError
from features.progress import log
from ranker.config import DivergenceConfig
from ranker.ranks import Ranks
from ranker.training.checkpoint import Position


class Diverged(UserError):
    """Training diverged; raised on every rank."""


@dataclass(frozen=True)
class Divergence:
    """The watch over a run's losses and gradients. All ranks come to the same verdict.

    Attributes:
        root: the run's folder; None: batches are not kept.
    """

    config: DivergenceConfig
    ranks: Ranks
    root: Path | None

    def skips(self, batch: RequestBatch, loss: float, position: Position) -> bool:
        """Whether a batch is to be left out for its loss, all ranks' together; counts it in `position` then.

        Asked before the backward pass, which updates tables.

        Raises:
            UserError: the config does not let it be skipped.
        """
        limit = self.config.max_loss
        if math.isfinite(loss) and (limit is None or loss <= limit):
            return False
        wrong = f"the loss is {loss:.4g}"
        if math.isfinite(loss):
            wrong += f", more than training.divergence.max_loss ({limit:g})"
        if self.config.policy == "stop":
            self.stop(batch, wrong, "nothing was updated by it; training.divergence.policy: skip would go on", position)
        if position.skipped == self.config.max_skipped:
            most = f"as many as training.divergence.max_skipped ({position.skipped}) were skipped before"
            self.stop(batch, wrong, f"nothing was updated by it; {most}", position)
        position.skipped += 1
        kept = self._keep(batch, position)
        if self.ranks.first:
            count = f"{position.skipped} of at most {self.config.max_skipped}"
            log(f"WARNING: step {position.step + 1}: {wrong}; the batch is skipped, {count}{kept}")
        return True

    def stop(self, batch: RequestBatch, wrong: str, state: str, position: Position) -> NoReturn:
        """End the run.

        Args:
            state: what the batch has done.
        """
        raise Diverged(
            f"step {position.step + 1}: {wrong}; lower optimizer.lr or tables.lr, or look for extreme values in "
            f"features.dense. The batch: {state}{self._keep(batch, position)}"
        )

    def _keep(self, batch: RequestBatch, position: Position) -> str:
        """Keep this rank's batch; the end of a sentence that says so."""
        if self.root is None:
            return ""
        folder = self.root / "diverged"
        folder.mkdir(exist_ok=True)
        which = f"step-{position.step + 1:08d}-batch-{position.batch_in_epoch:08d}"
        path = folder / f"{which}-rank-{self.ranks.rank}.pt"
        aside = path.with_name(f".{path.name}")
        torch.save({name: x.cpu() for name, x in to_tensors(batch).items()}, aside)
        aside.rename(path)
        return f"; kept in {folder}"
