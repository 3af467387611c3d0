"""From the memory-mapped dataset to :class:`features.batch.RequestBatch`.

A *shard* is the partitions p with p mod shards = s, and a step takes one batch of each shard. Rank r reads the shards s
with s mod ranks = r: with as many shards as ranks (the default) that is one each; with a fixed number of shards the
global batches stay the same whatever the number of ranks. :mod:`features.schedule` says in which order batches come.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from features.batch import RequestBatch, from_tensors
from features.collate import Part, assemble, nothing
from features.dataset import Dataset, PartitionInfo
from features.errors import UserError, did_you_mean
from features.reader import Drop, Reader
from features.schedule import Draw, Slot, batch_count, generator, schedule, shuffled
from features.schema import Split, Strict
from features.selection import Selection
from features.views import Ints, Partition
from features.workers import built

__all__ = ["Loader", "LoaderConfig", "RequestBatches", "Selection"]


class LoaderConfig(Strict):
    """How batches are formed."""

    requests: int = Field(default=64, ge=1, description="requests of a batch, at most, for each shard")
    group: int = Field(
        default=1,
        ge=1,
        description="up to so many consecutive requests of a user share a batch and one history row; 1: off",
    )
    shards: int | None = Field(
        default=None,
        ge=1,
        description="data shards; default: as many as ranks. Fix it to keep the global batches when ranks change",
    )
    workers: int = Field(default=1, ge=0, description="worker processes; 0 loads in the training process")
    prefetch: int = Field(default=4, ge=1, description="batches each worker keeps ready")
    drop_item: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="share of known item ids read as unknown in training, so that the row of new items is trained",
    )
    drop_with_item: list[str] = Field(
        default_factory=list,
        description="item columns of ids that are dropped with the item: what a new item lacks too, such as semantic "
        "IDs made from behaviour",
    )
    drop_user: float = Field(default=0.05, ge=0, lt=1, description="the same for user ids")


def _ranges(info: PartitionInfo, splits: tuple[Split, ...]) -> list[tuple[int, int]]:
    """The rows of these splits in a partition's requests."""
    return [info.requests.get(split, (0, 0)) for split in splits]


def _check_labels(dataset: Dataset, what: str, names: tuple[str, ...], available: list[str]) -> None:
    for name in names:
        if name not in available:
            hint = did_you_mean(name, available)
            raise UserError(
                f"{dataset.root}: no {what} {name!r}{hint} It has {', '.join(available) or f'no {what}s at all'}"
            )


def _check_dropped(dataset: Dataset, names: list[str]) -> None:
    columns = dataset.manifest.columns.get("item", {})
    allowed = sorted(f"item.{name}" for name, info in columns.items() if info.kind in ("categorical", "bag"))
    for i, name in enumerate(names):
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            raise UserError(
                f"loader.drop_with_item[{i}]: {dataset.root} has no item column of ids {name!r}{hint} It has "
                f"{', '.join(allowed) or 'none'}"
            )


class RequestBatches(TorchDataset[dict[str, Tensor]]):
    """All steps of one epoch as plain tensors by name; ``self[step]`` builds one. What worker processes run.

    Args:
        shards: the shards read here, out of `shard_count`.
        training: shuffle, and drop ids; otherwise file order.
    """

    def __init__(
        self,
        dataset: Dataset,
        splits: tuple[Split, ...],
        selection: Selection,
        config: LoaderConfig,
        shards: tuple[int, ...] = (0,),
        shard_count: int = 1,
        seed: int = 0,
        epoch: int = 0,
        training: bool = False,
    ) -> None:
        self._dataset, self._splits, self._selection, self._group = dataset, splits, selection, config.group
        self._shards, self._seed, self._epoch, self._training = shards, seed, epoch, training
        partitions = dataset.manifest.partitions
        counts = [sum(end - begin for begin, end in _ranges(info, splits)) for info in partitions]
        batches = [batch_count(count, config.requests) for count in counts]
        self.steps = max(sum(batches[shard::shard_count]) for shard in range(shard_count))
        every = range(len(partitions))
        self._schedules = [
            schedule(every[s::shard_count], batches[s::shard_count], self._random(Draw.BATCHES, s)) for s in shards
        ]
        self._reader = Reader(
            dataset, selection, Drop(config.drop_item, config.drop_user, frozenset(config.drop_with_item))
        )
        self._partitions: dict[int, Partition] = {}
        self._orders: dict[int, Ints] = {}
        self._first_lengths: dict[int, Ints] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of an epoch of {self.steps}")
        parts: list[Part] = []
        for shard, slots in zip(self._shards, self._schedules, strict=True):
            if step < len(slots):
                slot = Slot(*slots[step].tolist())
                requests = slot.of(self._order(slot.partition))
                rng = self._random(Draw.IDS, shard, step)
                most = self._first_length(slot.partition) if self._selection.frozen else None
                parts.append(self._reader.read(self._partition(slot.partition), requests, rng, most))
        return assemble(parts or [nothing(self._selection)], self._selection)

    def _random(self, draw: Draw, index: int, step: int = 0) -> np.random.Generator | None:
        """The stream of one purpose; evaluation has nothing random."""
        return generator(self._seed, self._epoch, draw, index, step) if self._training else None

    def _order(self, index: int) -> Ints:
        """The partition's requests in this epoch's order."""
        if index not in self._orders:
            requests = self._requests(index)
            if rng := self._random(Draw.REQUESTS, index):
                row = self._partition(index).requests.flat("row")[requests]
                requests = shuffled(requests, row, self._group, rng)
            self._orders[index] = requests
        return self._orders[index]

    def _requests(self, index: int) -> Ints:
        """The partition's requests in the splits, in file order."""
        ranges = _ranges(self._dataset.manifest.partitions[index], self._splits)
        return np.concatenate([np.arange(begin, end) for begin, end in ranges])

    def _first_length(self, index: int) -> Ints:
        """Events of each of the partition's history rows before its first request in the splits: `[rows]`."""
        if index not in self._first_lengths:
            partition = self._partition(index)
            requests = self._requests(index)
            first = np.full(partition.histories.flat("user").size, np.iinfo(np.int64).max)
            lengths = partition.requests.flat("history_end")[requests].astype(np.int64)
            np.minimum.at(first, partition.requests.flat("row")[requests], lengths)
            self._first_lengths[index] = first
        return self._first_lengths[index]

    def _partition(self, index: int) -> Partition:
        if index not in self._partitions:
            self._partitions[index] = Partition(self._dataset, index)
        return self._partitions[index]


class Loader:
    """Batches of some splits for one rank.

    Args:
        training: shuffled, ids dropped at random; otherwise in file order.

    Raises:
        UserError: fewer partitions than shards, fewer shards than ranks, no request in the splits, an unknown label.
    """

    def __init__(
        self,
        dataset: Dataset,
        splits: tuple[Split, ...],
        selection: Selection,
        config: LoaderConfig,
        seed: int = 0,
        training: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._shard_count = config.shards or world
        if self._shard_count < world:
            raise UserError(
                f"loader.shards: {self._shard_count} shards are too few for {world} ranks; raise it to {world} or more"
            )
        partitions = len(dataset.manifest.partitions)
        if self._shard_count > partitions:
            raise UserError(
                f"{dataset.root}: {partitions} partitions are too few for {self._shard_count} shards; "
                f"prepare it again with partitions: {self._shard_count} or more"
            )
        filled = dataset.manifest.filled_splits()
        if not set(splits) & set(filled):
            raise UserError(
                f"{dataset.root}: no requests in split {' or '.join(splits)}; it has {', '.join(filled) or 'none'}"
            )
        _check_dropped(dataset, config.drop_with_item)
        _check_labels(dataset, "label", selection.labels, dataset.manifest.labels)
        _check_labels(dataset, "oracle", selection.oracles, dataset.manifest.oracles)
        self._dataset, self._splits, self._selection, self._config = dataset, splits, selection, config
        self._seed, self._training = seed, training
        self._shards = tuple(range(rank, self._shard_count, world))

    def epoch(self, epoch: int) -> RequestBatches:
        """The batches of one epoch as plain tensors."""
        return RequestBatches(
            self._dataset, self._splits, self._selection, self._config, self._shards, self._shard_count,
            self._seed, epoch, self._training,
        )  # fmt: skip

    def steps(self, epoch: int = 0) -> int:
        """Steps of an epoch: the same on every rank."""
        return self.epoch(epoch).steps

    def batches(self, epoch: int = 0, first_step: int = 0) -> Generator[RequestBatch]:
        """The batches of an epoch from `first_step` on; every rank yields equally many."""
        source = self.epoch(epoch)
        steps = range(first_step, source.steps)
        for tensors in built(source, steps, self._config.workers, self._config.prefetch):
            yield from_tensors(self._selection.spec, tensors)
