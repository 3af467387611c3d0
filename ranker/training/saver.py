"""Checkpoints of a run as it trains: when one is whole, which are kept, and how long training waits for them."""

from __future__ import annotations

from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torchrec.optim.keyed import CombinedOptimizer

from ranker.ranks import Ranks
from ranker.training import checkpoint
from ranker.training.checkpoint import Position


class _Writing(NamedTuple):
    """A checkpoint that a thread of each rank writes."""

    path: Path
    aside: Path
    position: Position
    written: Future[Any]


def _group(ranks: Ranks) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timedelta(seconds=ranks.timeout_s)))


class Saver:
    """Writes a run's checkpoints and removes old ones; every method on every rank.

    Args:
        keep: so many of the newest, and the best.
        behind: copy the state and write the copy while training goes on: for the time of a copy in memory, and the
            memory of one.
    """

    def __init__(self, root: Path, ranks: Ranks, keep: int, behind: bool) -> None:
        self._root, self._ranks, self._keep = root, ranks, keep
        # a group of its own: its collectives are a thread's and come in no order with training's
        self._group = _group(ranks) if behind else None
        self._writing: _Writing | None = None

    def save(self, model: nn.Module, optimizer: CombinedOptimizer, position: Position) -> None:
        """Write the state of this moment; the checkpoint before it is whole by then."""
        self.finish()
        path = checkpoint.path_of(self._root, position.step)
        position = position.model_copy()
        if self._group is None:
            checkpoint.save(path, model, optimizer, position, self._ranks)
            self._prune(position)
            return
        aside = checkpoint.made_aside(path, self._ranks)
        state = checkpoint.state_of(model, optimizer)
        # the default stager does not know sharded tensors
        written = dcp.async_save(
            state, checkpoint_id=aside, process_group=self._group, async_stager=BlockingAsyncStager()
        )
        assert isinstance(written, Future)
        self._writing = _Writing(path, aside, position, written)

    def look(self) -> None:
        """Once a step: what every rank has written by now becomes a checkpoint."""
        if self._writing and self._ranks.total(float(self._writing.written.done())) == self._ranks.world:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writing:
            path, aside, position, written = self._writing
            written.result()
            checkpoint.seal(aside, path, position, self._ranks)
            self._prune(position)
            self._writing = None

    def _prune(self, position: Position) -> None:
        if not self._ranks.first:
            return
        written = checkpoint.all_of(self._root)
        keep = written[-self._keep :]
        if position.best_step is not None:
            keep.append(checkpoint.path_of(self._root, position.best_step))
        for old in written:
            if old not in keep:
                checkpoint.remove(old)
