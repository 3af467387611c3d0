"""Whose memories a refresh makes anew: users whose stamp is not what their history has now, or is too old."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from features.dataset import Dataset
from features.users import AsOf, cut_of
from features.views import Ints, Partition
from ranker.export.inputs import StoredBlock
from ranker.memory.coverage import USERS
from ranker.memory.decode import decode
from ranker.memory.keys import U64, keys_of, user_keys
from ranker.memory.making import BlockRecords
from ranker.memory.raw_users import RawUsers
from ranker.memory.record import as_of_of
from ranker.memory.stamps import BLOCK, read_stamps
from ranker.memory.store import Generation, MemoryStore
from ranker.memory.vanished import older_records

DAY_MS = 86_400_000


class Changed(NamedTuple):
    """rows: by partition, history rows whose records are to be made; stamped, unchanged: users with a stamp, and those
    whose records stay; oldest_ms: the earliest time that one of the latter was made as of, or the refresh's own."""

    rows: dict[int, Ints]
    stamped: int
    unchanged: int
    oldest_ms: int


def changed(
    store: MemoryStore,
    generation: Generation,
    dataset: Dataset,
    partitions: list[int],
    raw: RawUsers,
    blocks: list[StoredBlock],
    as_of: AsOf,
    older_than_days: float | None = None,
) -> Changed:
    """Compare the stamps of some partitions' users with their histories.

    Args:
        older_than_days: records made as of so long before their users are looked at are made anew, too.
    """
    allowed_ms = None if older_than_days is None else round(older_than_days * DAY_MS)
    probes = sum(block.probe is not None for block in blocks)
    rows: dict[int, Ints] = {}
    stamped = unchanged = 0
    oldest_ms = as_of.now
    for index in partitions:
        partition = Partition(dataset, index)
        cut, user = cut_of(dataset, partition, index, as_of), partition.histories.flat("user")
        parts = [np.zeros(0, np.int64)]
        for first in range(0, user.size, USERS):
            some = slice(first, first + USERS)
            keys = user_keys(raw.hashes(user[some]), BLOCK)
            records = store.get(generation.name, keys.key)
            stamps, made_ms = decode(records, keys.fingerprint, generation.versions).stored, as_of_of(records)
            known = read_stamps(stamps, probes)
            same = known.found.numpy() & (known.events.numpy() == cut.length[some])
            same &= known.last.numpy() == cut.last[some]
            if allowed_ms is not None:
                same &= made_ms >= cut.now[some] - allowed_ms
            stamped, unchanged = stamped + int(known.found.sum()), unchanged + int(same.sum())
            oldest_ms = int(made_ms[same].min(initial=oldest_ms))
            parts.append(first + np.flatnonzero(~same))
        rows[index] = np.concatenate(parts)
    return Changed(rows, stamped, unchanged, oldest_ms)


def replaced(
    store: MemoryStore, generation: Generation, users: U64, made: list[BlockRecords], blocks: list[StoredBlock]
) -> tuple[Counter[str], U64]:
    """What the users' older records count for, negative; and keys of those that get no new ones."""
    older = older_records(store, generation, users, blocks)
    stale: list[U64] = [np.zeros(0, np.uint64)]
    for block, _, codes in made:
        if codes is not None:
            new = keys_of(users, block.number, codes.request.cpu().numpy(), codes.code.cpu().numpy())
            stale.append(np.setdiff1d(older.keys[block.number], new.key))
    return older.counts, np.concatenate(stale)
