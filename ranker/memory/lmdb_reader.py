"""Look-ups in a folder, in the current generation of some versions; page faults are the system's, and no deadline's.

A store that is absent, damaged or closed gives lost records. Whether another generation is the current one is asked of
the file system at most every `check_every_s`; until then, and until their last look-up ends, threads read the former.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import lmdb
import numpy as np

from ranker.memory.keys import U64
from ranker.memory.store import Lookup, Reason
from ranker.memory.versions import MemoryVersions

ABOUT, RECORDS = b"about", b"records"
CURRENT = "current"
RESERVED_BYTES = 1 << 40
"""address space of a reader's map, far beyond the file, so that a growing one needs no new map"""


class Locking(TypedDict):
    """Settings that all who open an environment share."""

    max_dbs: int
    max_readers: int
    max_spare_txns: int
    readahead: bool


LOCKING: Locking = {"max_dbs": 2, "max_readers": 1024, "max_spare_txns": 0, "readahead": False}
# No spare transactions: a forked child that frees those of its parent frees their slots in the lock table, too.


@dataclass(eq=False)
class Environment:
    """An open environment with its databases; closed with its last user."""

    env: lmdb.Environment
    records: lmdb._Database
    about: lmdb._Database


_reading: weakref.WeakValueDictionary[str, Environment] = weakref.WeakValueDictionary()
"""what this process reads, by folder: LMDB wants one handle for all"""
_opening = threading.Lock()


def _forget() -> None:
    """A child of a fork opens anew."""
    global _reading, _opening
    _reading, _opening = weakref.WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_forget)


def opened_for_reading(folder: Path) -> Environment:
    """This process's handle of an environment.

    Raises:
        lmdb.Error: it is not there, damaged, or written by this process; NotFoundError where nothing was committed yet.
    """
    key = str(folder.resolve())
    with _opening:
        if (opened := _reading.get(key)) is None:
            try:
                env = lmdb.open(key, readonly=True, create=False, map_size=RESERVED_BYTES, **LOCKING)
            except lmdb.MemoryError:  # no such address space (ulimit -v): what the file has, and room to grow
                size = max(1 << 30, 4 * (folder / "data.mdb").stat().st_size)
                env = lmdb.open(key, readonly=True, create=False, map_size=size, **LOCKING)
            opened = Environment(env, env.open_db(RECORDS, create=False), env.open_db(ABOUT, create=False))
            _reading[key] = opened
        return opened


class LmdbReader:
    """Of the store in the folder `root`, which may appear later."""

    def __init__(self, root: Path, versions: MemoryVersions, check_every_s: float = 1.0) -> None:
        self._root, self._current, self._check_every_s = root, root / CURRENT / versions.key, check_every_s
        self._opened: Environment | None = None
        self._name: str | None = None
        self._reason: Reason = "no_generation"
        self._seen: tuple[int, ...] = ()
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
            with opened.env.begin(db=opened.records) as txn, txn.cursor() as cursor:
                found = cursor.getmulti(names)
        except (lmdb.Error, OSError):
            self._opened, self._seen, self._reason = None, (), "store"
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
            self._process, self._lock, self._opened, self._seen = os.getpid(), threading.Lock(), None, ()
        if not self._lock.acquire(blocking=self._opened is None):
            return
        try:
            if self._closed:
                return
            self._check_at = time.monotonic() + self._check_every_s
            name = self._current.read_text().strip()
            folder = self._root / "generations" / name
            data = (folder / "data.mdb").stat()
            if (seen := (data.st_dev, data.st_ino)) != self._seen or self._opened is None:
                self._opened, self._name, self._seen = opened_for_reading(folder), name, seen
        except FileNotFoundError:
            self._opened, self._seen, self._reason = None, (), "no_generation"
        except (lmdb.Error, OSError, ValueError):
            self._opened, self._seen, self._reason = None, (), "store"
        finally:
            self._lock.release()
