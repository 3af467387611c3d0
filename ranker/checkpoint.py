"""Checkpoints that resume to the same numbers: model, optimisers, position in the data.

Randomness has no place in them: what is shuffled, dropped or masked at a step is a function of the seed and the step.
Written by `torch.distributed.checkpoint`, so that a run saved by some ranks goes on with another number of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from ranker.ranks import Ranks

POSITION = "position.json"


class Position(BaseModel):
    """Where training stands."""

    model_config = ConfigDict(extra="forbid")

    shards: int
    """data shards that `step_in_epoch` counts the batches of"""
    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    """the monitored metric at its best, the greater the better"""
    best_step: int | None = None
    stale_validations: int = 0


def path_of(root: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is, or is to be."""
    return root / "checkpoints" / f"step-{step:08d}"


def all_of(root: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted((root / "checkpoints").glob("step-*"))


def save(path: Path, model: nn.Module, optimizer: CombinedOptimizer, position: Position, ranks: Ranks) -> None:
    """Write a checkpoint folder, aside first: `path` is whole or absent."""
    aside = path.with_name(f".{path.name}.partial")
    if ranks.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.barrier()
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=aside)
    ranks.barrier()
    if ranks.first:
        (aside / POSITION).write_text(position.model_dump_json())
        remove(path)
        aside.rename(path)
    ranks.barrier()


def load(path: Path, model: nn.Module, optimizer: CombinedOptimizer | None) -> None:
    """Restore what `save` wrote, whatever the number of ranks; the optimisers only where given."""
    state: dict[str, object] = {"model": model.state_dict()}
    if optimizer is not None:
        for _, part in optimizer.optimizers:
            if isinstance(part, KeyedOptimizerWrapper):
                part.init_state()  # Adam has no moments before its first step, and what is not there would not be read
        state["optimizer"] = optimizer.state_dict()
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])  # type: ignore[arg-type]
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]


def position_of(path: Path) -> Position:
    """Where a checkpoint stands."""
    return Position.model_validate_json((path / POSITION).read_text())


def remove(path: Path) -> None:
    """Delete a checkpoint; out of the way first, so that a removal cut short leaves none that looks whole."""
    if path.exists():
        aside = path.with_name(f".{path.name}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        shutil.rmtree(aside)
