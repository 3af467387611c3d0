"""Batches of users instead of requests: each user once, at the end of her history, for memories computed ahead.

A user is a request without candidates (:class:`features.batch.RequestBatch`): it has a history, and the time at which
that is looked at. Features of requests are missing in it, as the user's are, for nothing that a memory is made of reads
them. Users come in file order, partition after partition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from features.collate import assemble
from features.dataset import Dataset
from features.reader import Drop, Reader
from features.schema import Split
from features.selection import Selection
from features.views import Ints, Partition

NEVER = int(np.iinfo(np.int64).min)
"""time of the last event of a history without events"""


@dataclass(frozen=True)
class AsOf:
    """When histories are looked at: only events strictly before it are known.

    now: milliseconds. before: each user's history also ends where that of her first request in this split does, and is
        looked at at that request's time; users without one are looked at at `now`.
    """

    now: int
    before: Split | None = None


class Cut(NamedTuple):
    """Where each history row of a partition ends, `[rows]`: events of it that are known, the time of the last of them
    (NEVER without one), and when it is looked at."""

    length: Ints
    last: Ints
    now: Ints


class UserSlot(NamedTuple):
    """One batch: the users ``first … end - 1`` of those chosen of a partition."""

    partition: int
    first: int
    end: int


def newest_time(dataset: Dataset, partitions: list[int]) -> int:
    """The latest time of an event of these partitions, or of a request of the dataset; ms."""
    found = [split.last_ms for split in dataset.manifest.splits.values() if split.requests]
    for index in partitions:
        partition = Partition(dataset, index)
        offsets = partition.histories.lists("item").offsets
        last = offsets[1:][offsets[1:] > offsets[:-1]] - 1
        found += [int(partition.event("time")[last].max())] if last.size else []
    return max(found, default=0)


def cut_of(dataset: Dataset, partition: Partition, index: int, as_of: AsOf) -> Cut:
    """Where the histories of partition `index` end."""
    offsets, time = partition.histories.lists("item").offsets, partition.event("time")
    base, end = offsets[:-1], offsets[1:]
    now = np.full(base.size, as_of.now)
    if as_of.before is not None:
        first, last = dataset.manifest.partitions[index].requests.get(as_of.before, (0, 0))
        row = partition.requests.flat("row")[first:last]
        np.minimum.at(now, row, partition.requests.flat("time")[first:last])
        end = end.copy()
        np.minimum.at(end, row, base[row] + partition.requests.flat("history_end")[first:last])
    end = first_not_before(time, base, end, now)
    known = end > base
    newest = np.full(base.size, NEVER)
    newest[known] = time[end[known] - 1]
    return Cut(end - base, newest, now)


def first_not_before(time: Ints, start: Ints, end: Ints, when: Ints) -> Ints:
    """The first position of each window ``[start, end)``, ascending in `time`, whose time is not before `when`; its end
    where all are. All windows are halved at once, and windows that end before `when` are looked at in one place.

    >>> first_not_before(np.array([1, 5, 5, 9]), np.array([0, 2]), np.array([4, 4]), np.array([5, 10])).tolist()
    [1, 4]
    """
    low, high = start.copy(), end.copy()
    open_ = (low < high).nonzero()[0]
    middle = high - 1  # most windows end before: one look settles them
    while open_.size:
        before = time[middle[open_]] < when[open_]
        low[open_[before]] = middle[open_[before]] + 1
        high[open_[~before]] = middle[open_[~before]]
        open_ = open_[low[open_] < high[open_]]
        middle[open_] = (low[open_] + high[open_]) // 2
    return low


class UserBatches(TorchDataset[dict[str, Tensor]]):
    """Batches of users as plain tensors by name; ``self[i]`` builds the one of ``slots[i]``. What worker processes run.

    Args:
        rows: by partition, the history rows wanted, ascending; None for all of them.
        users, events: what a batch holds at most; a user with more events than that is a batch of her own.
    """

    def __init__(
        self,
        dataset: Dataset,
        selection: Selection,
        as_of: AsOf,
        rows: Mapping[int, Ints | None],
        users: int = 256,
        events: int = 65_536,
    ) -> None:
        self._dataset, self._selection, self._as_of, self._rows = dataset, selection, as_of, rows
        self._reader = Reader(dataset, selection, Drop(0.0, 0.0))
        self._open: tuple[int, Partition, Cut] | None = None
        self.slots = [slot for index in rows for slot in self._slots_of(index, users, events)]

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        slot = self.slots[i]
        partition, cut = self._opened(slot.partition)
        rows = self.rows(slot)
        return assemble([self._reader.read_users(partition, rows, cut.length[rows], cut.now[rows])], self._selection)

    def rows(self, slot: UserSlot) -> Ints:
        """The history rows of a batch."""
        rows = self._rows[slot.partition]
        return np.arange(slot.first, slot.end) if rows is None else rows[slot.first : slot.end]

    def _slots_of(self, index: int, users: int, events: int) -> list[UserSlot]:
        """Batches of a partition: as many users in a row as fit."""
        rows = self._rows[index]
        if rows is not None and rows.size == 0:
            return []
        length = self._opened(index)[1].length
        length = length if rows is None else length[rows]
        longest = self._selection.history_length
        until = np.cumsum(np.minimum(length, longest) if longest else length)
        slots: list[UserSlot] = []
        first = 0
        while first < length.size:
            before = int(until[first - 1]) if first else 0
            fits = int(np.searchsorted(until, before + events, side="right"))
            end = min(max(fits, first + 1), first + users)
            slots.append(UserSlot(index, first, end))
            first = end
        return slots

    def _opened(self, index: int) -> tuple[Partition, Cut]:
        """A partition and its cut; the one used last is kept."""
        if self._open is None or self._open[0] != index:
            partition = Partition(self._dataset, index)
            self._open = index, partition, cut_of(self._dataset, partition, index, self._as_of)
        return self._open[1:]
