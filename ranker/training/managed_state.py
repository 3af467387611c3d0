"""Managed tables in checkpoints: what TorchRec's state lacks to go on, and the rows of ids as they are read afterwards.

Which id has which row is divided among ranks as they were in training, and cannot be divided anew: training goes on
with as many ranks. Evaluation and export take all of it at once, on any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from features.errors import UserError
from ranker.tables.held_rows import HeldRows
from ranker.tables.managed_collision import ManagedRows, managed_of

_SLOTS = "table._managed_collision_collection._managed_collision_modules"


def histories(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """What this rank's slots have met since they let ids in, by table and rank: for the checkpoint."""
    return {f"{managed.name}/{dist.get_rank()}": managed.slots.history() for managed in managed_of(model)}


def refuse_other_ranks(path: Path, model: nn.Module) -> None:
    """Raise UserError, on every rank, where a model is to train on with managed tables of other ranks."""
    if tables := managed_of(model):
        read = _Sizes(path)
        for managed in tables:
            read.refuse_other_ranks(managed)


def go_on_from(path: Path, model: nn.Module) -> None:
    """Give slots the ids that they had met when a checkpoint was written; after the model's state was loaded."""
    if not (tables := managed_of(model)):
        return
    read, mine = _Sizes(path), histories(model)
    for name, history in mine.items():
        for part in history:
            history[part] = torch.empty(read.size(f"histories.{name}.{part}"), dtype=torch.int64)
    dcp.load({"histories": mine}, checkpoint_id=path)
    for managed, history in zip(tables, mine.values(), strict=True):
        managed.slots.go_on_from(history)


def start_from(path: Path, model: nn.Module, table_states: Mapping[str, Any]) -> None:
    """Take managed tables as they are in another run's checkpoint: ids are hashes, the same on every day.

    Args:
        table_states: of the optimizer, by table's key, where they are to be taken too.

    Raises:
        UserError: other ranks have written it.
    """
    refuse_other_ranks(path, model)
    if not (names := [f".{managed.name}." for managed in managed_of(model)]):
        return
    own = {key: x for key, x in model.state_dict().items() if "managed_" in key and any(n in key for n in names)}
    states = {key: dict(table_states[key]) for key in own if table_states.get(key)}
    state: dict[str, Any] = {"model": own} | ({"optimizer": {"state": states}} if states else {})
    dcp.load(state, checkpoint_id=path)
    go_on_from(path, model)


def hold(model: nn.Module, path: Path) -> None:
    """Let a ranker's tables hold the rows of ids of a checkpoint."""
    for name, module in model.named_modules():
        if isinstance(module, HeldRows):
            _hold(module, name[name.index("tables.") :], path)  # without what wraps the ranker


def _hold(held: HeldRows, name: str, path: Path) -> None:
    read, own = _Sizes(path), f"{name}.{_SLOTS}.{held.name}"
    ids, rows = f"{own}._mch_sorted_raw_ids", f"{own}._mch_remapped_ids_mapping"
    whole = {key: torch.empty(read.size(f"model.{key}"), dtype=torch.int64) for key in (ids, rows)}
    dcp.load({"model": whole}, checkpoint_id=path)
    last = [first + count - 1 for first, count in read.shards(f"model.{ids}")]
    held.hold(whole[ids], whole[rows], torch.tensor(last))


class _Sizes:
    """How large a checkpoint's tensors are, and how they were cut."""

    def __init__(self, path: Path) -> None:
        self._path, self._tensors = path, FileSystemReader(path).read_metadata().state_dict_metadata

    def size(self, name: str) -> torch.Size:
        return self._of(name).size

    def shards(self, name: str) -> list[tuple[int, int]]:
        """First and number of each shard, in their order."""
        return sorted((int(chunk.offsets[0]), int(chunk.sizes[0])) for chunk in self._of(name).chunks)

    def refuse_other_ranks(self, managed: ManagedRows) -> None:
        before = sum(
            name.startswith(f"histories.{managed.name}/") and name.endswith(".since") for name in self._tensors
        )
        if before != (now := dist.get_world_size()):
            raise UserError(
                f"{self._path}: tables.managed_collision: which id of {managed.name} has which row is divided among "
                f"{before} ranks, and these are {now}; train on with {before}"
            )

    def _of(self, name: str) -> TensorStorageMetadata:
        found = self._tensors[name]
        assert isinstance(found, TensorStorageMetadata)
        return found
