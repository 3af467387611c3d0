"""Walk a generation and judge every record as a reader would, but for its user, whom a record does not name."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import NamedTuple

import numpy as np

from ranker.memory.decode import Outcomes, decode
from ranker.memory.keys import I64, U64
from ranker.memory.record import DTYPES, HEADER_BYTES
from ranker.memory.store import Generation, MemoryStore

BATCH = 4096
EXAMPLES = 5


class Verified(NamedTuple):
    """What was found.

    outcomes: of the records that were read; other_dtype: of those found, the ones of another dtype than the
    generation's; examples: keys of some that no reader would take; sizes: records by their bytes.
    as_of_ms: the oldest and the newest of the times whose histories the records hold; None without records.
    put: records that units of the build say they put; fewer are there where two met in one key, or one was put twice.
    whole: every record was read.
    """

    outcomes: Outcomes
    other_dtype: int
    examples: list[int]
    sizes: dict[int, int]
    as_of_ms: tuple[int, int] | None
    put: int
    whole: bool

    @property
    def records(self) -> int:
        """How many were read."""
        return sum(self.outcomes)

    @property
    def bad(self) -> int:
        """Records that no reader would take."""
        return self.records - self.outcomes.found

    @property
    def overwritten(self) -> int:
        """Records that were put and are not there."""
        return max(self.put - self.records, 0) if self.whole else 0


def verify(store: MemoryStore, generation: Generation, sample: int | None = None) -> Verified:
    """Read every record, or `sample` of them: the first in the store's order, which is that of hashes."""
    records = store.records(generation.name)
    total, other_dtype, examples = np.zeros(len(Outcomes._fields), np.int64), 0, list[int]()
    sizes: Counter[int] = Counter()
    oldest, newest = 2**63 - 1, -(2**63)
    left = 2**63 - 1 if sample is None else sample
    while left > 0:
        batch = list(islice(records, min(BATCH, left)))
        if not batch:
            break
        left -= len(batch)
        values = [value for _, value in batch]
        headers = _headers(values)
        # a record's own fingerprint: whether it is the asked user's, only a reader can tell
        found = decode(values, (headers[:, 1] >> np.uint64(32)).astype(np.uint32), generation.versions).outcomes
        total += found
        if found.found < len(batch):
            good = np.array([_sound(value, generation) for value in values])
            headers = headers[good]
            examples += [batch[i][0] for i in np.flatnonzero(~good)[: EXAMPLES - len(examples)].tolist()]
        dtype = headers[:, 1] >> np.uint64(24) & np.uint64(0xFF)
        other_dtype += int(np.count_nonzero(dtype != DTYPES.index(generation.dtype)))
        as_of: I64 = headers[:, 4].view(np.int64)
        if len(as_of):
            oldest, newest = min(oldest, int(as_of.min())), max(newest, int(as_of.max()))
        sizes.update(map(len, values))
    whole = sample is None or next(records, None) is None
    put = sum(mark["records"] for mark in store.done(generation.name).values())
    return Verified(
        Outcomes(*total.tolist()),
        other_dtype,
        examples,
        dict(sorted(sizes.items())),
        (oldest, newest) if oldest <= newest else None,
        put,
        whole,
    )


def _sound(value: bytes, generation: Generation) -> bool:
    """Whether a reader would take the record."""
    fingerprint = (_headers([value])[:, 1] >> np.uint64(32)).astype(np.uint32)
    return decode([value], fingerprint, generation.versions).outcomes.found == 1


def _headers(values: list[bytes]) -> U64:
    """The first words of each record `[n, 7]`; zero where a record has not so many."""
    heads = [value[:HEADER_BYTES] if len(value) >= HEADER_BYTES else bytes(HEADER_BYTES) for value in values]
    return np.frombuffer(b"".join(heads), "<u8").reshape(-1, HEADER_BYTES // 8)
