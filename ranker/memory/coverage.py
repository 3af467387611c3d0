"""What share of a split's requests and candidates finds a record in what was built: read from the store's own stamps.

A candidate finds one where its user has a record of its group, and a request asks once for each group among its
candidates. Requests are read as arrays, some users at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from features.dataset import Dataset
from features.schema import Split
from features.views import File, Ints, Partition, item_file
from ranker.export.inputs import StoredBlock
from ranker.memory.decode import decode
from ranker.memory.keys import U64, user_keys
from ranker.memory.raw_users import RawUsers
from ranker.memory.scope import partitions_of
from ranker.memory.stamps import BLOCK, Asked, Stamps, read_stamps
from ranker.memory.store import Generation, MemoryStore
from ranker.memory.versions import MemoryVersions
from ranker.ranks import Ranks

USERS = 4_096
"""looked up at a time"""


class Share(NamedTuple):
    """How many of how many found a record."""

    found: int = 0
    asked: int = 0

    def plus(self, found: int, asked: int) -> Share:
        """With more."""
        return Share(self.found + found, self.asked + asked)

    def __str__(self) -> str:
        return f"{self.found / self.asked:.1%} of {self.asked:,}" if self.asked else "none asked"


Coverage = dict[str, Share]
"""By what asks: `users`, `requests`, and for block i with probes `I.probes` and `I.candidates`."""


def stamps_of(
    store: MemoryStore, generation: str, users: U64, versions: MemoryVersions, blocks: Sequence[StoredBlock]
) -> Stamps:
    """What a generation's records of some users were made from.

    Args:
        users: `[R, 2]`, hashes of raw ids.
    """
    keys = user_keys(users, BLOCK)
    decoded = decode(store.get(generation, keys.key), keys.fingerprint, versions)
    return read_stamps(decoded.stored, sum(block.probe is not None for block in blocks))


class CoverageMeter:
    """Measures the coverage of a dataset's partitions.

    Args:
        split: whose requests ask.
    """

    def __init__(
        self,
        store: MemoryStore,
        generation: str,
        versions: MemoryVersions,
        dataset: Dataset,
        split: Split,
        blocks: Sequence[StoredBlock],
    ) -> None:
        self._store, self._generation, self._versions = store, generation, versions
        self._dataset, self._blocks = dataset, blocks
        self._split: Split = split
        self._raw, self._items = RawUsers(dataset), item_file(dataset)
        self.found: Coverage = {"users": Share(), "requests": Share()}
        for block in self._with_probes():
            self.found |= {f"{block.number}.probes": Share(), f"{block.number}.candidates": Share()}

    def add(self, index: int) -> None:
        """Measure a partition's requests."""
        partition = Partition(self._dataset, index)
        first, end = self._dataset.manifest.partitions[index].requests.get(self._split, (0, 0))
        row = partition.requests.flat("row")[first:end]  # ascending
        rows, begins = np.unique(row, return_index=True)
        bounds = first + np.append(begins, row.size)
        for start in range(0, rows.size, USERS):
            stop = min(start + USERS, rows.size)
            requests = np.arange(bounds[start], bounds[stop])
            user = np.repeat(np.arange(stop - start), np.diff(bounds[start : stop + 1]))
            self._add(partition, rows[start:stop], requests, user)

    def _add(self, partition: Partition, rows: Ints, requests: Ints, user: Ints) -> None:
        """Some users `[R]` by their rows, and their requests: which, and whose of the R."""
        users = self._raw.hashes(partition.histories.flat("user")[rows])
        stamps = stamps_of(self._store, self._generation, users, self._versions, self._blocks)
        known = stamps.found.numpy()
        self._count("users", int(known.sum()), known.size)
        self._count("requests", int(known[user].sum()), user.size)
        items, candidates = partition.requests.lists("items").rows(requests)
        request = np.repeat(np.arange(requests.size), candidates)
        for block, asked in zip(self._with_probes(), stamps.asked, strict=True):
            assert block.probe is not None
            code = code_of(self._items, block.probe, items)
            there = has_record(asked, user[request], code)
            self._count(f"{block.number}.candidates", int(there.sum()), there.size)
            codes = int(code.max(initial=0)) + 1
            _, once = np.unique(request * codes + code, return_index=True)
            self._count(f"{block.number}.probes", int(there[once].sum()), once.size)

    def _count(self, name: str, found: int, asked: int) -> None:
        self.found[name] = self.found[name].plus(found, asked)

    def _with_probes(self) -> list[StoredBlock]:
        return [block for block in self._blocks if block.probe is not None]


def covered(
    store: MemoryStore,
    generation: Generation,
    dataset: Dataset,
    split: Split,
    blocks: list[StoredBlock],
    ranks: Ranks,
) -> Coverage:
    """What share of a split's requests and candidates finds a record, over all ranks."""
    meter = CoverageMeter(store, generation.name, generation.versions, dataset, split, blocks)
    for partition in partitions_of(dataset, ranks):
        meter.add(partition)
    names = sorted(meter.found)
    totals = ranks.totals(*(float(number) for name in names for number in meter.found[name]))
    return {name: Share(int(totals[2 * i]), int(totals[2 * i + 1])) for i, name in enumerate(names)}


def code_of(items: File, probe: str, item: Ints) -> Ints:
    """The group of each item `[N]`, by its dense index."""
    return items.flat(probe)[item].astype(np.int64)


def has_record(asked: Asked, user: Ints, code: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether there is a record of each (user, code) `[N]`."""
    codes = 1 + max(int(asked.code.max()) if asked.code.numel() else 0, int(code.max(initial=0)))
    there = asked.request * codes + asked.code
    return torch.isin(torch.from_numpy(user * codes + code), there).numpy()
