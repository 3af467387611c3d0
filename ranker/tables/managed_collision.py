"""Tables for ids without end, as they are trained: TorchRec's managed-collision modules (zero-collision hashing).

An id comes to a row of its own by being met: every so many batches, each rank counts the ids it has met since, of those
whose rows it holds, and lets the most worth keeping have rows; those of ids that are worth less are taken from them,
start anew and forget their optimizer's state. An id without a row reads the last row of its rank. Id 0, a missing or
dropped one, is an id like others. In evaluation nothing is let in or out. A batch that is skipped, as its loss is not
finite, teaches nothing, but its ids have been met, and may have got rows, which start anew.

Ids are divided among ranks by ranges, which hashes fill evenly and indices of a vocabulary, the frequent ones first, do
not; nor do those mean the same on the next day. So only features with `hash_buckets` can be managed.

All tables go through EmbeddingCollections, pooled ones too, which :func:`ranker.tables.embeddings.pooled` pools:
TorchRec shards pooled tables by rows on GPUs alone, and an id of a categorical feature costs the same both ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    LFU_EvictionPolicy,
    LRU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHEvictionPolicy,
    MCHManagedCollisionModule,
)
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from features.dataset import Manifest
from features.errors import UserError
from features.selection import FeatureSpec
from ranker.config import ManagedCollisionConfig, TablesConfig

_POLICIES: dict[str, Callable[[], MCHEvictionPolicy]] = {
    "lfu": LFU_EvictionPolicy,
    "lru": LRU_EvictionPolicy,
    "distance_lfu": DistanceLFU_EvictionPolicy,
}
_SPARE = 1.25
"""how much larger than what is asked for a history is made, so that it seldom grows"""


class Slots(MCHManagedCollisionModule):
    """TorchRec's module, with a history of ids that loses none of them and that a checkpoint can hold.

    Attributes:
        read, missed: ids looked up in training since :meth:`counted`, and those of them without a row; on the device.
        renew: told of rows, from this rank's first, that are given to other ids, before these read them.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.read = 0
        self.missed: Tensor | None = None
        self.renew: Callable[[Tensor], None] | None = None

    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Meet the ids of a batch, in training; and let ids in where it is time."""
        if self.training:
            self._make_room(self._current_history_buffer_offset + sum(f.values().numel() for f in features.values()))
        return super().profile(features)

    def remap(self, features: dict[str, JaggedTensor], *arguments: Any, **named: Any) -> dict[str, JaggedTensor]:
        """Rows for ids."""
        found = super().remap(features, *arguments, **named)
        if self.training:
            for rows in found.values():
                missed = (rows.values() == self._output_global_offset + self._zch_size - 1).sum()
                self.missed = missed if self.missed is None else self.missed + missed
                self.read += rows.values().numel()
        return found

    def evict(self) -> None:
        """Renew rows that have other ids now; TorchRec has nothing left to do. It would reset the optimizer's state for
        row-wise Adagrad alone, by an operator that GPUs alone have."""
        rows = super().evict()
        if rows is not None and rows.numel():
            assert self.renew is not None
            self.renew(rows - self._output_global_offset)

    def divide(self, ranks: int) -> None:
        """Before it is planned: into as many ranges of ids, of which TorchRec wants each rank to have as many."""
        self._buckets = ranks

    def counted(self) -> tuple[float, float]:
        """Ids read, and those without a row, since the last time."""
        found = float(self.read), 0.0 if self.missed is None else float(self.missed)
        self.read, self.missed = 0, None
        return found

    def taken(self) -> tuple[float, float]:
        """This rank's rows that ids have, and those that ids can have."""
        can_have = self._zch_size - 1
        return can_have - float(self.open_slots()), float(can_have)

    def history(self) -> dict[str, Tensor]:
        """What was met since ids were let in last, which TorchRec's state does not hold: `ids` and what the policy
        keeps of each, `[n]`; and `since`, the batches since then, `[1]`."""
        met = slice(0, self._current_history_buffer_offset)
        since = self._current_iter - self._last_eviction_iter
        if self._input_history_buffer_size < 0:
            self._make_room(0)
        found = {name: buffer[met].clone() for name, buffer in self._history_metadata.items()}
        return found | {"ids": self._history_accumulator[met].clone(), "since": torch.tensor([since])}

    def history_bytes(self, ids: float) -> float:
        """What a history takes, at most, of batches with so many ids: an old and a new one, as it grows."""
        numbers = 1 + sum(of_history for _, _, of_history in self._eviction_policy.metadata_info)
        return 2 * _SPARE * 8 * numbers * ids * self._eviction_interval

    def go_on_from(self, history: dict[str, Tensor]) -> None:
        """The inverse of :meth:`history`, after the state was loaded."""
        count = history["ids"].numel()
        self._make_room(count)
        self._history_accumulator[:count] = history["ids"].to(self.device)
        for name, buffer in self._history_metadata.items():
            buffer[:count] = history[name].to(self.device)
        self._current_history_buffer_offset = count
        self._current_iter = int(self._current_iter_tensor)  # type: ignore[call-overload]
        self._last_eviction_iter = self._current_iter - int(history["since"])

    def _make_room(self, count: int) -> None:
        """Let the history hold `count` ids: TorchRec's holds what its first batch suggests, and drops the rest."""
        if count <= self._input_history_buffer_size:
            return
        size, met = int(count * _SPARE) + 1, self._current_history_buffer_offset
        before = self._history_accumulator[:met] if self._input_history_buffer_size >= 0 else None
        self._history_accumulator = torch.empty(size, dtype=torch.int64, device=self.device)
        if before is not None:
            self._history_accumulator[:met] = before
        for name, _, of_history in self._eviction_policy.metadata_info:
            if of_history:
                buffer = torch.zeros(size, dtype=torch.int64, device=self.device)
                if before is not None:
                    buffer[:met] = self._history_metadata[name][:met]
                self._history_metadata[name] = buffer
        self._input_history_buffer_size = size


class ManagedRows(nn.Module):
    """One table and its ids in training."""

    def __init__(
        self, table: EmbeddingConfig, size: int, asked: ManagedCollisionConfig, device: torch.device | None
    ) -> None:
        super().__init__()
        assert table.init_fn is not None
        self.name, self._start = table.name, table.init_fn
        slots = Slots(
            zch_size=table.num_embeddings,
            device=device or torch.device("cpu"),
            eviction_policy=_POLICIES[asked.eviction](),
            eviction_interval=asked.every,
            input_hash_size=size,
            name=table.name,
        )
        self.table = ManagedCollisionEmbeddingCollection(
            EmbeddingCollection(tables=[table], device=device), ManagedCollisionCollection({table.name: slots}, [table])
        )

    @property
    def slots(self) -> Slots:
        """This rank's."""
        table: Any = self.table
        return table._managed_collision_collection._managed_collision_modules[self.name]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """The rows of every id of the table's keys, by key."""
        if self.slots.renew is None:  # not before it is sharded, which makes the slots anew
            self.slots.renew = self._renew
        found, _ = self.table(features)
        return found

    @torch.no_grad()
    def _renew(self, rows: Tensor) -> None:
        """Let rows start as all did, and the optimizer forget them."""
        sharded: Any = self.table
        kernel, index = sharded._table_to_tbe_and_index[self.name]
        weights: Tensor = kernel.split_embedding_weights()[int(index)]
        started = torch.empty_like(weights[rows])
        self._start(started)
        weights[rows] = started
        states: list[list[Tensor]] = kernel.split_optimizer_states()  # none at all of plain SGD
        for state in states[int(index)] if states else []:
            state[rows] = 0


def managed_of(model: nn.Module) -> list[ManagedRows]:
    """A model's managed tables in training, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, ManagedRows)]


def history_bytes(model: nn.Module, table: str, ids: float) -> float:
    """What a rank keeps of the ids that it meets, `ids` of a table in a batch; nothing for tables that are not
    managed."""
    return sum(managed.slots.history_bytes(ids) for managed in managed_of(model) if managed.name == table)


def refuse_unmanageable(config: TablesConfig, spec: FeatureSpec, manifest: Manifest) -> None:
    """Raise UserError where a table cannot be managed: what is not hashed, what has rows for all of its ids."""
    sizes = {f.name: f.size for f in (*spec.request, *spec.candidate, *spec.sequence, *spec.event)}
    for name in config.managed_collision:
        where, asked = f"tables.managed_collision.{name}", config.managed_of(name)
        if name not in sizes or asked is None:
            continue  # told where tables are made
        if manifest.codebooks_behind([name]):
            raise UserError(f"{where}: semantic IDs have a row for each code; leave it out")
        if manifest.hashed(name) is None:
            raise UserError(
                f"{where}: ids of {name} have a vocabulary, with a row for each; set hash_buckets (user_hash_buckets, "
                "item_hash_buckets) in the prepare config, far above the ids that there are, or tables.buckets for a "
                "smaller table"
            )
        if asked.rows >= sizes[name]:
            raise UserError(
                f"{where}: {asked.rows:,} rows for {sizes[name]:,} hashes: a row for each needs no managing; "
                "prepare with more hash_buckets, or leave it out"
            )
