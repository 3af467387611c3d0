"""Records that are to go: older ones of users whose memories are made anew, and all of users who are no longer there.

A store does not name users, only keys; but the key of a stamp is a permutation of the user's hash, which therefore can
be found again, and with the codes in the stamp the keys of all her records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.dataset import Dataset
from features.progress import Progress
from features.views import Partition
from ranker.export.inputs import StoredBlock
from ranker.memory.decode import decode
from ranker.memory.keys import GAMMA, U64, keys_of, user_keys
from ranker.memory.raw_users import RawUsers
from ranker.memory.record import HEADER_BYTES
from ranker.memory.stamps import BLOCK, Stamps, read_stamps
from ranker.memory.store import Generation, MemoryStore

BATCH = 4_096
"""users, or records of the store, at a time"""
_ALL = 2**64 - 1
_UNDO = ((31, pow(0x94D049BB133111EB, -1, 2**64)), (27, pow(0xBF58476D1CE4E5B9, -1, 2**64)), (30, 1))
"""the shifts and factors of `mix`, backwards"""


class Older(NamedTuple):
    """keys: by block, those of users' records, stamps' among them; counts: what the records count for, negative."""

    keys: dict[int, U64]
    counts: Counter[str]


def older_records(store: MemoryStore, generation: Generation, users: U64, blocks: list[StoredBlock]) -> Older:
    """The records that a generation has of some users `[R, 2]`."""
    stamp_keys = user_keys(users, BLOCK)
    stored = decode(store.get(generation.name, stamp_keys.key), stamp_keys.fingerprint, generation.versions).stored
    return _older(store, generation, users, read_stamps(stored, _probes(blocks)), blocks)


def mark_of(counts: Counter[str]) -> dict[str, int]:
    """A mark of a unit that changes records which other units have counted."""
    records, size = counts["memories"] + counts["users"], counts["memory_bytes"] + counts["stamp_bytes"]
    return {**counts, "records": records, "bytes": size}


def drop(
    store: MemoryStore,
    generation: Generation,
    dataset: Dataset,
    raw: RawUsers,
    blocks: list[StoredBlock],
    unit: str,
    counted: Counter[str],
    check: Callable[[], None],
) -> None:
    """Remove all records of users whom the dataset does not have. One process alone does so.

    The store is read to its end first, and changed only then: a long look at LMDB would keep the pages of what goes.
    Holds a key of each of the dataset's users and of each who is gone, 8 bytes; marks `unit` as done with each batch.

    Args:
        counted: what the unit has counted so far.
        check: called before anything is removed; raises where that is no longer allowed.
    """
    gone = _stamps_beside(store, generation, _stamp_keys(dataset, raw))
    counts, writer = counted.copy(), store.begin(generation)
    with Progress("removed, of who is gone", -(-gone.size // BATCH)) as progress:
        for at in range(0, gone.size, BATCH):
            keys = gone[at : at + BATCH]
            records = store.get(generation.name, keys)
            prints = np.array([int.from_bytes((record or b"")[12:16], "little") for record in records], np.uint32)
            stamps = read_stamps(decode(records, prints, generation.versions).stored, _probes(blocks))
            users = np.stack([hash_of_stamp(keys), np.zeros_like(keys)], 1)  # the other half makes fingerprints alone
            older = _older(store, generation, users, stamps, blocks)
            check()
            for of_block in older.keys.values():
                writer.remove_many(of_block)
            counts.update(older.counts)
            writer.done(unit, mark_of(counts))
            progress.advance()
    writer.close()


def _stamp_keys(dataset: Dataset, raw: RawUsers) -> U64:
    """Of all users of a dataset, ascending."""
    parts = [np.zeros(0, np.uint64)]
    for index in range(len(dataset.manifest.partitions)):
        user = Partition(dataset, index).histories.flat("user")
        parts += [user_keys(raw.hashes(user[at : at + BATCH]), BLOCK).key for at in range(0, user.size, BATCH)]
    keys = np.concatenate(parts)
    keys.sort()
    return keys


def hash_of_stamp(keys: U64) -> U64:
    """h of the users whose stamps have these keys: :func:`ranker.memory.keys.user_keys` backwards."""
    z = keys.copy()
    for shift, factor in _UNDO:
        z ^= (z >> np.uint64(shift)) ^ (z >> np.uint64(2 * shift))
        z *= np.uint64(factor)
    return z - np.uint64((BLOCK + 1) * GAMMA & _ALL)


def _older(store: MemoryStore, generation: Generation, users: U64, stamps: Stamps, blocks: list[StoredBlock]) -> Older:
    known = stamps.found.numpy()
    asked = iter(stamps.asked)
    keys: dict[int, U64] = {}
    counts: Counter[str] = Counter()
    counts["users"] -= int(known.sum())
    for block in blocks:
        if block.probe is None:
            keys[block.number] = user_keys(users, block.number).key[known]
        else:
            one = next(asked)
            keys[block.number] = keys_of(users, block.number, one.request.numpy(), one.code.numpy()).key
        records, size = _there(store, generation, keys[block.number])
        for name in ("memories", f"{block.number}.records"):
            counts[name] -= records
        for name in ("memory_bytes", f"{block.number}.bytes"):
            counts[name] -= size
    keys[BLOCK] = user_keys(users, BLOCK).key[known]
    counts["stamp_bytes"] -= _there(store, generation, keys[BLOCK])[1]
    return Older(keys, counts)


def _there(store: MemoryStore, generation: Generation, keys: U64) -> tuple[int, int]:
    """How many records there are of these keys, of how many bytes."""
    sizes = [len(value) for value in store.get(generation.name, keys) if value is not None]
    return len(sizes), sum(sizes)


def _probes(blocks: list[StoredBlock]) -> int:
    return sum(block.probe is not None for block in blocks)


def _stamps_beside(store: MemoryStore, generation: Generation, kept: U64) -> U64:
    """Keys of the stamps that are not among `kept`, which ascends. A stamp has no values, and more than one exact
    number, as no block's record has."""
    found = [np.zeros(0, np.uint64)]
    records = store.records(generation.name)
    with Progress("read, for who is gone", -(-generation.counts.get("records", 0) // BATCH)) as progress:
        while batch := list(islice(records, BATCH)):
            heads = b"".join(record[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0") for _, record in batch)
            lengths = np.frombuffer(heads, "<u4").reshape(len(batch), -1)[:, 12:14]
            keys = np.array([key for key, _ in batch], np.uint64)[(lengths[:, 0] == 0) & (lengths[:, 1] >= 2)]
            found.append(keys[~_among(keys, kept)])
            progress.advance()
    return np.unique(np.concatenate(found))  # a store may show a record twice


def _among(keys: U64, ascending: U64) -> npt.NDArray[np.bool_]:
    """Which of the keys are among those that ascend: in time of the keys, where np.isin sorts both."""
    place = np.searchsorted(ascending, keys)
    there = place < ascending.size
    there[there] = ascending[place[there]] == keys[there]
    return there
