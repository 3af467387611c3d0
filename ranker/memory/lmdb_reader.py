"""Look-ups in a folder, in the current generation of some versions; page faults are the system's, and no deadline's.

A store that is absent, damaged or closed gives lost records. Whether another generation is the current one is asked of
the file system at most every `check_every_s`; until then, and until their last look-up ends, threads read the former.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import cast

import lmdb
import numpy as np

from ranker.memory.keys import U64
from ranker.memory.lmdb_environment import Environment, Place, opened_for_reading, place_of
from ranker.memory.store import Lookup, Reason
from ranker.memory.versions import MemoryVersions

CURRENT = "current"


class LmdbReader:
    """Of the store in the folder `root`, which may appear later."""

    def __init__(self, root: Path, versions: MemoryVersions, check_every_s: float = 1.0) -> None:
        self._root, self._current, self._check_every_s = root, root / CURRENT / versions.key, check_every_s
        self._opened: Environment | None = None
        self._name: str | None = None
        self._reason: Reason = "no_generation"
        self._seen: Place | None = None
        self._closed, self._process, self._check_at = False, os.getpid(), 0.0
        self._lock = threading.Lock()
        self._look()

    def get_many(self, keys: U64, deadline_ms: float) -> Lookup:
        """By one cursor; `deadline_ms` is not kept."""
        if time.monotonic() >= self._check_at or os.getpid() != self._process:
            self._look()
        if (opened := self._opened) is None:
            return Lookup.failed(len(keys), self._reason)
        # in the order of the pages: a cursor that stays on one need not come down the tree again
        order = np.argsort(keys)
        names = keys[order].astype(">u8").view("V8").tolist()
        try:
            with opened.transaction() as txn, txn.cursor(opened.records) as cursor:
                found = cast("list[tuple[bytes, bytes]]", cursor.getmulti(names))
        except (lmdb.Error, OSError):
            self._opened, self._seen, self._reason = None, None, "store"
            return Lookup.failed(len(keys), "store")
        if len(found) == len(names):
            values: list[bytes | None] = [value for _, value in found]
        else:
            values = list(map(dict(found).get, names))
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return Lookup(list(map(values.__getitem__, place.tolist())))

    def generation(self) -> str | None:
        """The one that is read."""
        return None if self._opened is None else self._name

    def close(self) -> None:
        """Look-ups fail from here on; the environment is closed when the last one that runs has ended."""
        with self._lock:
            self._closed, self._opened, self._reason, self._check_at = True, None, "closed", float("inf")

    def _look(self) -> None:
        """Open the current generation where it is another one than before; one thread does, the others read on."""
        if os.getpid() != self._process:
            self._process, self._lock, self._opened, self._seen = os.getpid(), threading.Lock(), None, None
        if not self._lock.acquire(blocking=self._opened is None):
            return
        try:
            if self._closed:
                return
            self._check_at = time.monotonic() + self._check_every_s
            name = self._current.read_text().strip()
            folder = self._root / "generations" / name
            if (seen := place_of(folder)) != self._seen or self._opened is None:
                self._opened, self._name, self._seen = opened_for_reading(folder), name, seen
        except FileNotFoundError:
            self._opened, self._seen, self._reason = None, None, "no_generation"
        except (lmdb.Error, OSError, ValueError):
            self._opened, self._seen, self._reason = None, None, "store"
        finally:
            self._lock.release()
