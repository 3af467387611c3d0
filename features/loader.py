"""From the memory-mapped dataset to :class:`features.batch.RequestBatch`, without a Python loop over rows or events.

The order of an epoch is a pure function of (seed, epoch): in each partition the groups of a user's consecutive requests are
permuted and cut into batches, and the batches of a shard's partitions are permuted among one another. A position is thus two
numbers, (epoch, step), and resuming is exact. Users are spread over partitions by hash, so that the batches of one partition are a
random sample of users.

A *shard* is the partitions p with p mod shards = s, and a step takes one batch of each shard. Rank r reads the shards s with
s mod ranks = r: with as many shards as ranks (the default) that is one each; with a fixed number of shards the global batches stay
the same whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from features.batch import RequestBatch, from_tensors
from features.dataset import Dataset
from features.errors import UserError
from features.schema import Split, Strict
from features.selection import Feature, FeatureSpec

Ints = NDArray[np.int64]
Array = NDArray[np.generic]


class LoaderConfig(Strict):
    """How batches are formed."""

    requests: int = Field(64, ge=1, description="requests of a batch, for each shard")
    group: int = Field(1, ge=1, description="up to so many consecutive requests of a user share a batch and one history row; 1: off")
    shards: int | None = Field(None, ge=1, description="data shards; default: as many as ranks. Fix it to keep the global batches when ranks change")
    workers: int = Field(1, ge=0, description="worker processes; 0 loads in the training process")
    prefetch: int = Field(4, ge=1, description="batches each worker keeps ready")
    drop_item: float = Field(
        0.05, ge=0, lt=1, description="share of known item ids read as unknown in training, so that the row of new items is trained"
    )
    drop_user: float = Field(0.05, ge=0, lt=1, description="the same for user ids")


@dataclass(frozen=True)
class Selection:
    """What to read: features, labels, the longest history needed (0: all)."""

    spec: FeatureSpec
    labels: tuple[str, ...]
    history_length: int
    oracles: tuple[str, ...] = ()


def ranges(first: Ints, lengths: Ints) -> Ints:
    """The concatenation of ``arange(first[i], first[i] + lengths[i])``.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    shift = first - np.cumsum(lengths) + lengths
    out = np.repeat(shift, lengths)
    out += np.arange(out.size)
    return out


@dataclass
class _Lists:
    """A list column: the elements of row i are ``values[offsets[i] : offsets[i + 1]]``."""

    values: Array
    offsets: Ints

    @classmethod
    def of(cls, column: pa.Array) -> _Lists:
        offsets = column.offsets.to_numpy().astype(np.int64)
        return cls(column.flatten().to_numpy(zero_copy_only=True), offsets - offsets[0])

    def rows(self, rows: Ints) -> tuple[Array, Ints]:
        """Values and lengths of some rows."""
        first = self.offsets[rows]
        lengths = self.offsets[rows + 1] - first
        return self.values[ranges(first, lengths)], lengths


Column = Array | _Lists


def _column(batch: pa.RecordBatch, name: str) -> Column:
    column = batch.column(name)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return _Lists.of(column)
    return column.to_numpy(zero_copy_only=True)


@dataclass
class _Ids:
    """Ids of some features over the same rows, feature by feature."""

    values: list[Array] = field(default_factory=list)
    lengths: list[Ints] = field(default_factory=list)


class _Partition:
    """One partition's columns as views of its files."""

    def __init__(self, dataset: Dataset, index: int) -> None:
        self._histories = dataset.histories(index)
        self._requests = dataset.requests(index)
        self._columns: dict[tuple[str, str], Column] = {}
        events = self._histories.column("item")
        self.event_offsets = events.offsets.to_numpy().astype(np.int64)
        self.event_offsets -= self.event_offsets[0]
        self.items = _Lists.of(self._requests.column("items"))

    def events(self, name: str) -> Array:
        """A history column, all rows' elements one after another."""
        column = self._view("histories", name)
        assert isinstance(column, _Lists)
        return column.values

    def user(self, name: str) -> Column:
        """A column of the history rows' users."""
        return self._view("histories", name)

    def request(self, name: str) -> Column:
        """A column of the requests."""
        return self._view("requests", name)

    def _view(self, file: str, name: str) -> Column:
        if (file, name) not in self._columns:
            self._columns[file, name] = _column(self._histories if file == "histories" else self._requests, name)
        return self._columns[file, name]


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
        self.dataset, self.splits, self.selection, self.config = dataset, splits, selection, config
        self.seed, self.epoch, self.training = seed, epoch, training
        counts = {
            p: sum(end - begin for begin, end in (info.requests.get(s, (0, 0)) for s in splits))
            for p, info in enumerate(dataset.manifest.partitions)
        }
        every = [
            self._schedule(s, [p for p in counts if p % shard_count == s], counts) for s in range(shard_count)
        ]
        self.steps = max((len(schedule) for schedule in every), default=0)
        self._schedules = [every[s] for s in shards]
        self._shards = shards
        self._known_items = dataset.manifest.known_items
        self._partitions: dict[int, _Partition] = {}
        self._items: dict[str, Column] = {}
        self._orders: dict[int, Ints] = {}

    def __len__(self) -> int:
        return self.steps

    def _schedule(self, shard: int, partitions: list[int], counts: dict[int, int]) -> list[tuple[int, int, int]]:
        """The shard's batches in order: (partition, batch of it, batches of it)."""
        batches = [
            (p, k, n)
            for p in partitions
            if counts[p]
            for n in [max(1, round(counts[p] / self.config.requests))]
            for k in range(n)
        ]
        if self.training:
            order = np.random.default_rng([self.seed, self.epoch, shard]).permutation(len(batches))
            batches = [batches[i] for i in order]
        return batches

    def _order(self, index: int) -> Ints:
        """The partition's requests in this epoch's order."""
        if index not in self._orders:
            info = self.dataset.manifest.partitions[index]
            ids = np.concatenate([np.arange(*info.requests.get(s, (0, 0))) for s in self.splits])
            if self.training:
                row = np.asarray(self._partition(index).request("row"))[ids]
                new_row = np.flatnonzero(np.diff(row, prepend=-1))
                position = np.arange(ids.size) - np.repeat(new_row, np.diff(new_row, append=ids.size))
                first = np.flatnonzero(position % self.config.group == 0)
                lengths = np.diff(first, append=ids.size)
                order = np.random.default_rng([self.seed, self.epoch, 1, index]).permutation(first.size)
                ids = ids[ranges(first[order], lengths[order])]
            self._orders[index] = ids
        return self._orders[index]

    def _partition(self, index: int) -> _Partition:
        if index not in self._partitions:
            self._partitions[index] = _Partition(self.dataset, index)
        return self._partitions[index]

    def _item_column(self, name: str) -> Column:
        if name not in self._items:
            self._items[name] = _column(self.dataset.items(), name)
        return self._items[name]

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        parts: list[_Part] = []
        for shard, schedule in zip(self._shards, self._schedules, strict=True):
            if step < len(schedule):
                index, k, n = schedule[step]
                order = self._order(index)
                requests = order[order.size * k // n : order.size * (k + 1) // n]
                rng = np.random.default_rng([self.seed, self.epoch, 2, shard, step])
                parts.append(self._part(self._partition(index), requests, rng))
        return _assemble(parts or [self._nothing()], self.selection)

    def _part(self, partition: _Partition, requests: Ints, rng: np.random.Generator) -> _Part:
        spec, length = self.selection.spec, self.selection.history_length
        row = np.asarray(partition.request("row"))[requests]
        by_row = np.argsort(row, kind="stable")
        requests, row = requests[by_row], row[by_row].astype(np.int64)
        history_length = np.asarray(partition.request("history_end"))[requests].astype(np.int64)
        base = partition.event_offsets[row]
        end = base + history_length
        start = np.maximum(base, end - length) if length else base
        first = np.flatnonzero(np.diff(row, prepend=-1))
        low, high = np.minimum.reduceat(start, first), np.maximum.reduceat(end, first)
        of_request = np.repeat(np.arange(first.size), np.diff(first, append=row.size))
        event = ranges(low, high - low)
        shift = (np.cumsum(high - low) - (high - low) - low)[of_request]

        raw_item = partition.events("item")[event]
        candidate_item, candidates = partition.items.rows(requests)
        candidate_rows = ranges(partition.items.offsets[requests], candidates)
        history_id = self._known(raw_item, self.config.drop_item, rng)
        candidate_id = self._known(candidate_item, self.config.drop_item, rng)

        def of_item(feature: Feature, items: Array, ids: Array) -> tuple[Array, Ints | None]:
            if feature.name == "item":
                return ids, None
            column = self._item_column(feature.name)
            return column.rows(items.astype(np.int64)) if isinstance(column, _Lists) else (column[items], None)

        part = _Part(
            row_events=high - low,
            start=start + shift,
            end=end + shift,
            now=np.asarray(partition.request("time"))[requests],
            user=np.asarray(partition.user("user"))[row],
            history_length=history_length,
            candidates=candidates,
            item=candidate_item,
            event_time=partition.events("time")[event],
        )
        for feature in spec.request:
            if feature.name == "user":
                values, lengths = self._known_user(part.user, rng), None
            else:
                column = partition.user(feature.name) if feature.scope == "user" else partition.request(feature.name)
                rows = row if feature.scope == "user" else requests
                values, lengths = column.rows(rows) if isinstance(column, _Lists) else (column[rows], None)
            part.request.append((values, lengths if lengths is not None else np.ones(requests.size, np.int64)))
        for feature in spec.candidate:
            if feature.scope == "item":
                values, lengths = of_item(feature, candidate_item, candidate_id)
            else:
                values, lengths = partition.request(feature.name).values[candidate_rows], None  # type: ignore[union-attr]
            part.candidate.append((values, lengths if lengths is not None else np.ones(candidate_rows.size, np.int64)))
        part.history = [of_item(f, raw_item, history_id)[0] for f in spec.sequence]
        part.history += [partition.events(f.name)[event] for f in spec.event]
        part.target = [of_item(f, candidate_item, candidate_id)[0] for f in spec.sequence]
        part.event_dense = [partition.events(f.name)[event] for f in spec.event_dense]
        for feature in spec.request_dense:
            column = partition.user(feature.name) if feature.scope == "user" else partition.request(feature.name)
            part.request_dense.append(np.asarray(column)[row if feature.scope == "user" else requests])
        for feature in spec.candidate_dense:
            if feature.scope == "item":
                part.candidate_dense.append(np.asarray(self._item_column(feature.name))[candidate_item])
            else:
                part.candidate_dense.append(partition.request(feature.name).values[candidate_rows])  # type: ignore[union-attr]
        part.labels = [partition.request(f"label.{n}").values[candidate_rows] for n in self.selection.labels]  # type: ignore[union-attr]
        part.oracles = [partition.request(f"oracle.{n}").values[candidate_rows] for n in self.selection.oracles]  # type: ignore[union-attr]
        return part

    def _nothing(self) -> _Part:
        """A request without history and candidates: what a rank feeds when its own have run out."""
        spec, none = self.selection.spec, np.zeros(0, np.int64)
        one = np.zeros(1, np.int64)
        return _Part(
            row_events=one, start=one, end=one, now=one, user=one, history_length=one, candidates=one, item=none, event_time=none,
            request=[(none, one) for _ in spec.request],
            candidate=[(none, none) for _ in spec.candidate],
            history=[none for _ in (*spec.sequence, *spec.event)],
            target=[none for _ in spec.sequence],
            request_dense=[np.zeros(1, np.float32) for _ in spec.request_dense],
            candidate_dense=[none for _ in spec.candidate_dense],
            event_dense=[none for _ in spec.event_dense],
            labels=[none for _ in self.selection.labels],
            oracles=[none for _ in self.selection.oracles],
        )  # fmt: skip

    def _known(self, items: Array, drop: float, rng: np.random.Generator) -> Array:
        """Item ids for the tables: those outside the vocabulary, and in training a random share of the others, read as 0."""
        ids = items.copy()
        ids[ids >= self._known_items] = 0
        if self.training and drop > 0:
            ids[rng.random(ids.size, np.float32) < drop] = 0
        return ids

    def _known_user(self, users: Array, rng: np.random.Generator) -> Array:
        ids = np.where(users < self.dataset.manifest.known_users, users, 0)
        if self.training and self.config.drop_user > 0:
            ids[rng.random(ids.size, np.float32) < self.config.drop_user] = 0
        return ids


@dataclass
class _Part:
    """One shard's share of a batch, in numpy; fields as in RequestBatch, feature by feature."""

    row_events: Ints
    start: Ints
    end: Ints
    now: Array
    user: Array
    history_length: Ints
    candidates: Ints
    item: Array
    event_time: Array
    request: list[tuple[Array, Ints]] = field(default_factory=list)
    candidate: list[tuple[Array, Ints]] = field(default_factory=list)
    history: list[Array] = field(default_factory=list)
    target: list[Array] = field(default_factory=list)
    request_dense: list[Array] = field(default_factory=list)
    candidate_dense: list[Array] = field(default_factory=list)
    event_dense: list[Array] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)
    oracles: list[Array] = field(default_factory=list)


def _long(arrays: list[Array]) -> Tensor:
    """One int64 tensor of all arrays, converted while copying."""
    out = np.empty(sum(a.size for a in arrays), np.int64)
    np.concatenate(arrays, out=out, casting="unsafe") if arrays else None
    return torch.from_numpy(out)


def _floats(columns: list[list[Array]], rows: int) -> Tensor:
    """`[rows, features]` float32 from each part's columns."""
    count = len(columns[0])
    out = np.empty((rows, count), np.float32)
    for i in range(count):
        np.concatenate([part[i] for part in columns], out=out[:, i], casting="unsafe")
    return torch.from_numpy(out)


def _assemble(parts: list[_Part], selection: Selection) -> dict[str, Tensor]:
    """One batch from its parts: keyed tensors feature by feature, windows shifted to the common events."""
    spec = selection.spec
    requests = sum(p.start.size for p in parts)
    candidates = sum(p.item.size for p in parts)
    events = [p.event_time.size for p in parts]
    shift = np.cumsum([0, *events[:-1]])
    rows = np.concatenate([p.row_events for p in parts])
    history_lengths = np.pad(rows, (0, requests - rows.size))
    per_request = np.concatenate([p.candidates for p in parts])

    def pooled(which: str, count: int) -> dict[str, Tensor]:
        features = [[getattr(p, which)[i] for p in parts] for i in range(count)]
        return {
            f"{which}.values": _long([values for feature in features for values, _ in feature]),
            f"{which}.lengths": _long([lengths for feature in features for _, lengths in feature]),
        }

    histories, targets = len(spec.sequence) + len(spec.event), len(spec.sequence)
    return {
        **pooled("request", len(spec.request)),
        **pooled("candidate", len(spec.candidate)),
        "sequence.values": _long(
            [p.history[i] for i in range(histories) for p in parts] + [p.target[i] for i in range(targets) for p in parts]
        ),
        "sequence.lengths": _long([history_lengths] * histories + [per_request] * targets),
        "request_dense": _floats([p.request_dense for p in parts], requests),
        "candidate_dense": _floats([p.candidate_dense for p in parts], candidates),
        "event_dense": _floats([p.event_dense for p in parts], sum(events)),
        "event_time": _long([p.event_time for p in parts]),
        "now": _long([p.now for p in parts]),
        "start": _long([p.start + s for p, s in zip(parts, shift, strict=True)]),
        "end": _long([p.end + s for p, s in zip(parts, shift, strict=True)]),
        "offsets": _long([np.concatenate([[0], np.cumsum(per_request)])]),
        "labels": _floats([p.labels for p in parts], candidates),
        "user": _long([p.user for p in parts]),
        "item": _long([p.item for p in parts]),
        "history_length": _long([p.history_length for p in parts]),
        "oracles": _floats([p.oracles for p in parts], candidates),
    }


class Loader:
    """Batches of some splits for one rank.

    Args:
        training: shuffled, ids dropped at random; otherwise in file order.

    Raises:
        UserError: fewer partitions than shards, fewer shards than ranks, or none of the splits has a request.
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
            raise UserError(f"loader.shards: {self._shard_count} shards are too few for {world} ranks; raise it to {world} or more")
        if self._shard_count > len(dataset.manifest.partitions):
            raise UserError(
                f"{dataset.root}: {len(dataset.manifest.partitions)} partitions are too few for {self._shard_count} shards; "
                f"prepare it again with partitions: {self._shard_count} or more"
            )
        if not set(splits) & set(dataset.manifest.filled_splits()):
            have = ", ".join(dataset.manifest.filled_splits())
            raise UserError(f"{dataset.root}: no requests in split {' or '.join(splits)}; it has {have}")
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

    def batches(self, epoch: int = 0, first_step: int = 0) -> Iterator[RequestBatch]:
        """The batches of an epoch from `first_step` on; every rank yields equally many."""
        source = self.epoch(epoch)
        workers = self._config.workers
        tensors: DataLoader[dict[str, Tensor]] = DataLoader(
            source,
            batch_size=None,
            sampler=range(first_step, source.steps),
            num_workers=workers,
            prefetch_factor=self._config.prefetch if workers else None,
        )
        for batch in tensors:
            yield from_tensors(self._selection.spec, batch)
