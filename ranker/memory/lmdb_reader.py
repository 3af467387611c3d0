"""Look-ups in a folder, in the current generation of some versions; page faults are the system's, and no deadline's.

A store that is absent, damaged or closed gives lost records. Whether another generation is the current one is asked of
the file system at most every `check_every_s`; until then, and until their last look-up ends, threads read the former.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import lmdb

from ranker.memory.keys import U64
from ranker.memory.lmdb_environment import Environment, Place, names_of, opened_for_reading, place_of
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
        """By one transaction; `deadline_ms` is not kept."""
        if time.monotonic() >= self._check_at or os.getpid() != self._process:
            self._look()
        if (opened := self._opened) is None:
            return Lookup.failed(len(keys), self._reason)
        try:
            return Lookup(opened.get_many(names_of(keys)))
        except (lmdb.Error, OSError):
            self._opened, self._seen, self._reason = None, None, "store"
            return Lookup.failed(len(keys), "store")

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
