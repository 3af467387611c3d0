"""Rows of a partition to one shard's part of a batch: whole columns at a time, no Python loop over rows or events.

Symbols as in :mod:`features.batch`: R requests, N candidates, H distinct histories, T events of them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from features.collate import Part, without_candidates
from features.dataset import Dataset
from features.selection import Feature, Selection
from features.views import Array, File, Ints, Partition, copy_windows, item_file, ranges


@dataclass(frozen=True)
class Drop:
    """Shares of known ids that are read as unknown in training, so that the rows of unknown ids are trained.

    with_item: columns of the item table, of ids, that are read as absent where the item is dropped.
    """

    item: float
    user: float
    with_item: frozenset[str] = frozenset()


def bernoulli(rng: np.random.Generator | None, rate: float, count: int) -> Ints:
    """Positions of ``0 … count - 1``, each there, once or more often, with probability `rate`, independently; none
    without `rng`.

    Poisson(λ · count) points thrown at random are Poisson(λ) points at each position, independently; with
    λ = -log(1 - rate), at least one with probability 1 - exp(-λ) = rate. The work is in proportion to rate · count.
    """
    if rng is None:
        return np.zeros(0, np.int64)
    points = rng.poisson(-np.log1p(-rate) * count)
    return rng.integers(0, max(count, 1), points)


def known(ids: Array, size: int, dropped: Ints) -> Array:
    """`ids`, in place, with 0 for those outside a table of `size` rows and at the positions `dropped`."""
    ids[(ids >= size).nonzero()[0]] = 0
    ids[dropped] = 0
    return ids


@dataclass(frozen=True)
class _Windows:
    """Which events some requests read. low, high `[H]`: the distinct histories, in the partition's events, ascending.
    start, end `[R]`: each request's window in the T events that are read."""

    low: Ints
    high: Ints
    start: Ints
    end: Ints

    @classmethod
    def of(cls, row: Ints, base: Ints, length: Ints, longest: int) -> _Windows:
        """Windows of the latest `longest` events (0: all) of requests sorted by (row, length).

        Windows of one row that overlap or touch become one history: no event is read twice, and none that nobody needs.
        """
        end = base + length
        start = np.maximum(base, end - longest) if longest else base
        new = np.ones(row.size + 1, np.bool_)
        new[1:-1] = (row[1:] != row[:-1]) | (start[1:] > end[:-1])
        bounds = new.nonzero()[0]  # of each history's requests
        low, high = start[bounds[:-1]], end[bounds[1:] - 1]
        shift = ((high - low).cumsum() - high)[new[:-1].cumsum() - 1]
        return cls(low, high, start + shift, end + shift)


class Reader:
    """Reads requests of a dataset's partitions as parts of batches."""

    def __init__(self, dataset: Dataset, selection: Selection, drop: Drop) -> None:
        self._dataset, self._selection, self._drop = dataset, selection, drop
        manifest = dataset.manifest
        self._item_rows, self._user_rows = manifest.id_rows("item"), manifest.id_rows("user")
        self._hashed = manifest.hashed_ids

    @cached_property
    def _items(self) -> File:
        """Opened by the process that reads, which may be a worker."""
        return item_file(self._dataset)

    def read(
        self,
        partition: Partition,
        requests: Ints,
        rng: np.random.Generator | None = None,
        most: Ints | None = None,
    ) -> Part:
        """The part of these requests, reordered so that those of one history row are neighbours.

        Args:
            rng: draws which ids are dropped; without it (evaluation) none are.
            most: `[rows]` events that requests of each history row may read, the first ones; None: all before them.
        """
        spec = self._selection.spec
        row = partition.requests.flat("row")[requests].astype(np.int64)
        length = partition.requests.flat("history_end")[requests].astype(np.int64)
        order = np.lexsort((length, row))
        requests, row, length = requests[order], row[order], length[order]
        base = partition.histories.lists("item").offsets[row]
        read = length if most is None else np.minimum(length, most[row])
        windows = _Windows.of(row, base, read, self._selection.history_length)
        candidate_item, candidates = partition.requests.lists("items").rows(requests)
        candidate_rows = ranges(partition.requests.lists("items").offsets[requests], candidates)
        user = partition.histories.flat("user")[row]

        part = Part(
            row_events=windows.high - windows.low,
            start=windows.start,
            end=windows.end,
            now=partition.requests.flat("time")[requests],
            user=user,
            history_length=length,
            candidates=candidates,
            item=candidate_item,
            event_time=copy_windows(partition.event("time"), windows.low, windows.high),
        )
        candidate_id, candidate_dropped = self._read_sequences(part, partition, windows, rng)

        def of_request(feature: Feature) -> tuple[Array, Ints]:
            if feature.name == "user":
                ids = partition.histories.flat("bucket")[row] if "user" in self._hashed else user.copy()
                return _single(known(ids, self._user_rows, bernoulli(rng, self._drop.user, user.size)))
            if feature.scope == "user":
                return _rows(partition.histories, feature.name, row)
            return _rows(partition.requests, feature.name, requests)

        def of_candidate(feature: Feature) -> tuple[Array, Ints]:
            if feature.name == "item":
                return _single(candidate_id)
            if feature.scope == "item":
                found = _rows(self._items, feature.name, candidate_item)
                return _without(*found, candidate_dropped) if feature.name in self._drop.with_item else found
            return _single(partition.candidate(feature.name)[candidate_rows])

        part.request = [of_request(f) for f in spec.request]
        part.candidate = [of_candidate(f) for f in spec.candidate]
        part.request_dense = [of_request(f)[0] for f in spec.request_dense]
        part.candidate_dense = [of_candidate(f)[0] for f in spec.candidate_dense]
        part.labels = [partition.candidate(f"label.{n}")[candidate_rows] for n in self._selection.labels]
        part.oracles = [partition.candidate(f"oracle.{n}")[candidate_rows] for n in self._selection.oracles]
        return part

    def read_users(self, partition: Partition, rows: Ints, length: Ints, now: Ints) -> Part:
        """The part of some users, each a request without candidates at `now` `[U]`, ms, that reads the latest of the
        first `length` `[U]` events of its history row. What a request has besides is missing, the user's id too.

        Args:
            rows: `[U]` rows of histories, ascending.
        """
        base = partition.histories.lists("item").offsets[rows]
        windows = _Windows.of(rows, base, length, self._selection.history_length)
        part = without_candidates(self._selection, rows.size)
        part.row_events, part.start, part.end = windows.high - windows.low, windows.start, windows.end
        part.now, part.user, part.history_length = now, partition.histories.flat("user")[rows], length
        part.event_time = copy_windows(partition.event("time"), windows.low, windows.high)
        self._read_sequences(part, partition, windows, None)
        return part

    def _read_sequences(
        self, part: Part, partition: Partition, windows: _Windows, rng: np.random.Generator | None
    ) -> tuple[Array, Ints]:
        """Fill what histories and candidates are embedded by; the candidates' rows in the table of items' ids, and the
        positions of those that were dropped."""
        spec = self._selection.spec

        def events(name: str) -> Array:
            return copy_windows(partition.event(name), windows.low, windows.high)

        event_item = events("item")
        items = np.concatenate([event_item, part.item])
        dropped = bernoulli(rng, self._drop.item, items.size)
        ids = self._items.flat("bucket")[items] if "item" in self._hashed else items
        item_ids = known(ids, self._item_rows, dropped)
        event_id, candidate_id = item_ids[: event_item.size], item_ids[event_item.size :]
        of_events = dropped < event_item.size
        event_dropped, candidate_dropped = dropped[of_events], dropped[~of_events] - event_item.size

        # attributes are those of the item itself, known to the tables or not
        def of_event_item(feature: Feature) -> Array:
            return event_id if feature.name == "item" else self._attribute(feature.name, event_item, event_dropped)

        def of_candidate_item(feature: Feature) -> Array:
            return (
                candidate_id if feature.name == "item" else self._attribute(feature.name, part.item, candidate_dropped)
            )

        part.history = [of_event_item(f) for f in spec.sequence]
        part.history += [events(f.name) for f in spec.event]
        part.history += [event_item for _ in spec.content]  # rows of a table of every item's vector
        part.target = [of_candidate_item(f) for f in spec.sequence]
        part.event_dense = [events(f.name) for f in spec.event_dense]
        part.event_codes = [of_event_item(f) for f in spec.codes]
        part.candidate_codes = [of_candidate_item(f) for f in spec.codes]
        return candidate_id, candidate_dropped

    def _attribute(self, name: str, items: Array, dropped: Ints) -> Array:
        values = self._items.flat(name).take(items)
        if name in self._drop.with_item:
            values[dropped] = 0
        return values


def _without(values: Array, lengths: Ints, rows: Ints) -> tuple[Array, Ints]:
    """Values and lengths of rows, with nothing in some of them."""
    keep = np.ones(lengths.size, np.bool_)
    keep[rows] = False
    return values[np.repeat(keep, lengths)], np.where(keep, lengths, 0)


def _single(values: Array) -> tuple[Array, Ints]:
    """One id a row."""
    return values, np.ones(values.size, np.int64)


def _rows(file: File, name: str, rows: Array) -> tuple[Array, Ints]:
    """Values and lengths of some rows of a column of lists or of single values."""
    if file.is_list(name):
        return file.lists(name).rows(rows.astype(np.int64))
    return _single(file.flat(name)[rows])
