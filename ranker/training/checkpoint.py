"""Checkpoints that resume to the same numbers: model, optimisers, position in the data.

Randomness has no place in them: what is shuffled, dropped or masked at a step is a function of the seed and the step.
Written by `torch.distributed.checkpoint`, so that a run saved by some ranks goes on with another number of them.

A checkpoint is a folder, written aside and renamed. Its ``SHA256SUMS``, which ``sha256sum -c`` reads too, tells whether
it is still what was written: a disk or a copy can cut or change a file without a word.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from pydantic import BaseModel, ConfigDict
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from features.errors import UserError
from features.progress import log
from ranker.ranks import Ranks
from ranker.training import managed_state

POSITION, SUMS = "position.json", "SHA256SUMS"


class CheckpointError(UserError):
    """A checkpoint is not what was written."""


class Position(BaseModel):
    """Where training stands."""

    model_config = ConfigDict(extra="forbid")

    shards: int
    """data shards that `batch_in_epoch` counts the batches of"""
    step: int = 0
    epoch: int = 0
    batch_in_epoch: int = 0
    best: float | None = None
    """the monitored metric at its best, the greater the better"""
    best_step: int | None = None
    stale_validations: int = 0
    skipped: int = 0
    """batches that would have ruined the model"""


def path_of(root: Path, step: int) -> Path:
    """Where a run's checkpoint of a step is, or is to be."""
    return root / "checkpoints" / f"step-{step:08d}"


def all_of(root: Path) -> list[Path]:
    """A run's whole checkpoints, oldest first."""
    return sorted((root / "checkpoints").glob("step-*"))


def save(path: Path, model: nn.Module, optimizer: CombinedOptimizer, position: Position, ranks: Ranks) -> None:
    """Write a checkpoint folder, aside first: `path` is whole or absent."""
    aside = made_aside(path, ranks)
    dcp.save(state_of(model, optimizer), checkpoint_id=aside)
    ranks.barrier()
    seal(aside, path, position, ranks)


def state_of(model: nn.Module, optimizer: CombinedOptimizer) -> dict[str, object]:
    """What a checkpoint holds; the tensors are the model's own."""
    state: dict[str, object] = {"model": model.state_dict(), "optimizer": _with_state(optimizer.state_dict())}
    met = managed_state.histories(model)
    return state | ({"histories": met} if met else {})


def _with_state(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Without the parameters that have no state, as all tables under plain SGD: an empty entry would be written, and
    asked for, under another name by a rank that has no part of the table."""
    return optimizer | {"state": {name: state for name, state in optimizer["state"].items() if state}}


def made_aside(path: Path, ranks: Ranks) -> Path:
    """An empty folder to write the checkpoint `path` into."""
    aside = path.with_name(f".{path.name}.partial")
    if ranks.first:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    ranks.barrier()
    return aside


def seal(aside: Path, path: Path, position: Position, ranks: Ranks) -> None:
    """Make the checkpoint `path` of what all ranks have written aside."""
    if ranks.first:
        (aside / POSITION).write_text(position.model_dump_json())
    names = ranks.agree(lambda: sorted(file.name for file in aside.iterdir()))
    sums = ranks.gathered([f"{_sum(aside / name)}  {name}\n" for name in names[ranks.rank :: ranks.world]])
    if ranks.first:
        (aside / SUMS).write_text("".join(line for lines in sums for line in lines))
        remove(path)
        aside.rename(path)
    ranks.barrier()


def fault(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, None where nothing is; the same on every rank, each of which reads a share."""
    return next((wrong for wrong in ranks.gathered(_fault(path, ranks)) if wrong), None)


def _fault(path: Path, ranks: Ranks) -> str | None:
    sums = path / SUMS
    if not sums.is_file():
        return f"{SUMS} is missing"
    text = sums.read_text()
    lines = [line.split("  ", 1) for line in text.splitlines()]
    if not text.endswith("\n") or {file.name for file in path.iterdir()} - {SUMS, *(line[-1] for line in lines)}:
        return f"{SUMS} is cut"
    for digest, name in lines[ranks.rank :: ranks.world]:
        if not (path / name).is_file():
            return f"{name} is missing"
        if _sum(path / name) != digest:
            return f"{name} is not what was written"
    return None


def check(path: Path, ranks: Ranks) -> None:
    """Raise CheckpointError, on every rank, where a checkpoint is not what was written."""
    if wrong := fault(path, ranks):
        raise CheckpointError(
            f"{path}: {wrong}; `ranker train … --resume` sets it aside and goes on from the one before"
        )


def newest_whole(root: Path, ranks: Ranks) -> Path | None:
    """The newest checkpoint of a run that is what was written; None where there is none. Those after it are told, and
    set aside as ``damaged-step-…``."""
    for path in reversed(all_of(root)):
        wrong = fault(path, ranks)
        if wrong is None:
            return path
        if ranks.first:
            kept = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(kept, ignore_errors=True)
            path.rename(kept)
            log(f"WARNING: {path}: {wrong}; kept as {kept.name}, the checkpoint before it is taken")
        ranks.barrier()
    return None


def load(path: Path, model: nn.Module, optimizer: CombinedOptimizer | None) -> None:
    """Restore what `save` wrote, whatever the number of ranks; the optimisers only where given."""
    managed_state.refuse_other_ranks(path, model)
    state: dict[str, Any] = {"model": model.state_dict()}
    every: dict[str, Any] = {}
    if optimizer is not None:
        for _, part in optimizer.optimizers:
            if isinstance(part, KeyedOptimizerWrapper):
                part.init_state()  # Adam has no moments before its first step, and what is not there would not be read
        every = optimizer.state_dict()
        state["optimizer"] = _with_state(every)
    dcp.load(state, checkpoint_id=path)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        read: dict[str, Any] = state["optimizer"]
        optimizer.load_state_dict(read | {"state": every["state"] | read["state"]})
    managed_state.go_on_from(path, model)


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


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
