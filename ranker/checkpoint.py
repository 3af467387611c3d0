"""Checkpoints that resume to the same numbers: model, optimisers, position in the data, random state of each rank.

Written by `torch.distributed.checkpoint`, so that a run saved by some ranks goes on with another number of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer

from ranker.ranks import Ranks


class Position(BaseModel):
    """Where training stands."""

    model_config = ConfigDict(extra="forbid")

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    best: float | None = None
    stale_validations: int = 0


def save(path: Path, model: nn.Module, optimizer: CombinedOptimizer, position: Position, ranks: Ranks) -> None:
    """Write a checkpoint folder, aside first: `path` is whole or absent."""
    aside = path.with_name(f".{path.name}.partial")
    if ranks.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.barrier()
    dcp.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint_id=aside)
    torch.save(torch.get_rng_state(), aside / f"random-{ranks.rank}.pt")
    ranks.barrier()
    if ranks.first:
        (aside / "position.json").write_text(position.model_dump_json())
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
    ranks.barrier()


def load(path: Path, model: nn.Module, optimizer: CombinedOptimizer | None, ranks: Ranks) -> Position:
    """Restore what `save` wrote, whatever the number of ranks; the optimisers only where given."""
    state: dict[str, object] = {"model": model.state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])  # type: ignore[arg-type]
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        random = path / f"random-{ranks.rank}.pt"
        if random.is_file():
            torch.set_rng_state(torch.load(random))
    return Position.model_validate_json((path / "position.json").read_text())
