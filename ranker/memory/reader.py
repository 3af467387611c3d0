"""What a server reads memories with: raw user ids and codes in, the `memory` of ``candidate_ranker.pt`` out.

All blocks of all requests are one batched look-up. It never raises, and ends by its deadline: a record that is missing,
of another model, damaged, another's, or in a store that is slow or gone, is a lost one, of lengths 0 and 0, which the
ranker takes as an empty history; :class:`ranker.memory.counters.MemoryCounters` tells them apart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from ranker.longseq.stored import Stored
from ranker.memory.counters import MemoryCounters, Read
from ranker.memory.decode import Outcomes, decode
from ranker.memory.keys import I64, U32, U64, hashes_of, keys_of, keys_of_one, user_keys
from ranker.memory.store import open_store
from ranker.memory.versions import MemoryVersions

Per = Literal["request", "probe"]
_LOG = logging.getLogger(__name__)
_CODE_0, _NO_KEYS = np.zeros(1, np.int64), np.zeros(0, np.uint64)


class MemoryReader:
    """For many threads, and for processes forked after it was made.

    Args:
        store_url: as :func:`ranker.memory.store.open_store` takes it; the store need not be there yet. Names are
            resolved in the background (:mod:`ranker.memory.names`); the first time, here, for up to a second.
        blocks: number in ``model.long``, and what its records are of, as the export's manifest lists them.
        versions: of the model that is served: their current generation is read, and records of others are lost ones.
        deadline_ms: of a read from Redis.
        check_every_s: how soon a switch to another generation is noticed.
        retry_after_s: how long a server that failed is left alone.

    Raises:
        StoreError: no such kind of store.
        ValueError: an argument is no such thing.
    """

    def __init__(
        self,
        store_url: str,
        blocks: Mapping[int, Per],
        versions: MemoryVersions,
        deadline_ms: float = 20.0,
        check_every_s: float = 1.0,
        retry_after_s: float = 1.0,
        counters: MemoryCounters | None = None,
    ) -> None:
        for block, per in blocks.items():
            if block < 0 or per not in ("request", "probe"):
                raise ValueError(f"block {block}: {per!r}; must be a number in model.long, with 'request' or 'probe'")
        for name, value in (
            ("deadline_ms", deadline_ms),
            ("check_every_s", check_every_s),
            ("retry_after_s", retry_after_s),
        ):
            if not value > 0:
                raise ValueError(f"{name}: {value}; must be greater than 0")
        self._blocks, self._versions, self._deadline_ms = dict(sorted(blocks.items())), versions, deadline_ms
        self._names = {block: tuple(f"{block}.{part}" for part in Stored._fields) for block in self._blocks}
        self._reader = open_store(store_url).reader(versions, check_every_s, retry_after_s)
        self.counters = counters or MemoryCounters()

    def read(self, users: Sequence[int | str], probes: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Memories of R requests.

        Args:
            users: raw ids, `[R]`.
            probes: for each block i that has records by probe ``"{i}.request"`` `[Q]`, ascending, and ``"{i}.code"``
                `[Q]`, each pair once: what ``user_encoder.pt`` takes.

        Returns:
            ``"{i}.values"``, ``"{i}.exact"``, ``"{i}.lengths"`` and ``"{i}.time"`` of every block.
        """
        begin = time.perf_counter()
        try:
            memory, read = self._read(users, probes or {})
        except Exception:
            counts = {block: self._count(block, users, probes or {}) for block in self._blocks}
            if self.counters.error(time.perf_counter() - begin, counts):
                _LOG.exception("memories are lost; further exceptions are counted, not logged")
            memory: dict[str, Tensor] = {}
            for block, names in self._names.items():
                memory.update(zip(names, decode_none(counts[block]), strict=True))
            return memory
        self.counters.read(time.perf_counter() - begin, read)
        return memory

    def generation(self) -> str | None:
        """The one that was read last."""
        return self._reader.generation()

    def close(self) -> None:
        """Give back what the store holds; reads give lost records from here on."""
        self._reader.close()

    def _read(self, users: Sequence[int | str], probes: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Read]:
        hashes = None if len(users) == 1 else hashes_of(users)
        asked: list[U64] = []
        parts: list[tuple[int, U32, I64]] = []
        for block, per in self._blocks.items():
            code = _CODE_0 if per == "request" else probes[f"{block}.code"].numpy()
            if hashes is None:
                key, fingerprint = keys_of_one(users[0], block, code)
            elif per == "request":
                key, fingerprint = user_keys(hashes, block)
            else:
                key, fingerprint = keys_of(hashes, block, probes[f"{block}.request"].numpy(), code)
            order = key.argsort()  # as LMDB's pages lie
            asked.append(key[order])
            parts.append((block, fingerprint, order))
        one = len(asked) == 1
        found = self._reader.get_many(asked[0] if one else np.concatenate([_NO_KEYS, *asked]), self._deadline_ms)
        memory: dict[str, Tensor] = {}
        outcomes: dict[int, tuple[Outcomes, int]] = {}
        as_of: list[I64] = []
        start = 0
        for block, fingerprint, order in parts:
            end = start + len(order)
            values = found.values if one else found.values[start:end]
            stored, of_records, times = decode(values, fingerprint, self._versions, order)
            lost = 0 if found.lost is None else int(np.count_nonzero(found.lost[start:end]))
            outcomes[block] = of_records._replace(missing=of_records.missing - lost) if lost else of_records, lost
            as_of.append(times)
            memory.update(zip(self._names[block], stored, strict=True))
            start = end
        return memory, Read(outcomes, found.reason, as_of, self._reader.generation())

    def _count(self, block: int, users: Sequence[int | str], probes: Mapping[str, Tensor]) -> int:
        """Records that a read asks for, whatever was wrong with its arguments."""
        try:
            return len(users) if self._blocks[block] == "request" else probes[f"{block}.code"].numel()
        except Exception:
            return 0


def decode_none(count: int) -> Stored:
    """So many lost records."""
    return decode([None] * count, np.zeros(count, np.uint32)).stored
