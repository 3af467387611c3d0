"""Open LMDB environments, one handle of each in a process, as LMDB wants it, for all of its threads.

A file that another process has made larger than this one's map is mapped anew, when no thread of this process is within
a transaction: mapping moves what transactions point to.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, TypeVar

import lmdb
import numpy as np

from ranker.memory.keys import U64

T = TypeVar("T")
_BIG_ENDIAN, _EIGHT_BYTES = np.dtype(">u8"), np.dtype("V8")
ABOUT, RECORDS = b"about", b"records"
DATA = "data.mdb"
FIRST_MAP_BYTES = 64 << 20
RESERVED_BYTES = 1 << 40
"""address space of a reader's map, or four times the file, so that a growing one seldom needs a new map"""
RESIZE_WITHIN_S = 60.0
Place = tuple[str, int, int]
"""of an environment: folder, and its file's device and inode, by which a rebuilt one of the same name differs"""


class Locking(TypedDict):
    """Settings that all who open an environment share."""

    max_dbs: int
    max_readers: int
    max_spare_txns: int
    readahead: bool


LOCKING: Locking = {"max_dbs": 2, "max_readers": 1024, "max_spare_txns": 0, "readahead": False}
# No spare transactions: a forked child that frees those of its parent frees their slots in the lock table, too.


def names_of(keys: U64) -> list[bytes]:
    """Keys as LMDB has them: big-endian, so that they lie in numeric order."""
    return np.ascontiguousarray(keys, _BIG_ENDIAN).view(_EIGHT_BYTES).tolist()


class Environment:
    """An open environment with its databases; closed with its last user.

    Args:
        create: make the databases where they are not there.
    """

    def __init__(self, env: lmdb.Environment, create: bool) -> None:
        self.env = env
        self._within = self._waiting = 0
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._unusable = ""
        self.records = self.fitting(lambda: env.open_db(RECORDS, create=create))
        self.about = self.fitting(lambda: env.open_db(ABOUT, create=create))

    @contextmanager
    def transaction(self, write: bool = False) -> Generator[lmdb.Transaction]:
        """One within another of the same thread may not write: it would wait for the outer one to end.

        Raises:
            lmdb.Error: it cannot begin, or what it does fails; MapFullError where it did not fit.
        """
        while True:
            self._enter()
            try:
                txn = self.env.begin(write=write)
                break
            except lmdb.MapResizedError:
                self._leave()
                self._resize(0)
            except BaseException:
                self._leave()
                raise
        try:
            with txn:
                yield txn
        finally:
            self._leave()

    def get_many(self, names: Sequence[bytes]) -> list[bytes | None]:
        """The records of these names, in a transaction of their own; without the generators of `transaction`, which
        servers have no time for.

        Raises:
            lmdb.Error: they cannot be read.
        """
        while True:
            self._enter()
            try:
                with self.env.begin(db=self.records) as txn, txn.cursor() as cursor:
                    return list(map(cursor.get, names))
            except lmdb.MapResizedError:
                pass
            finally:
                self._leave()
            self._resize(0)

    def fitting(self, work: Callable[[], T]) -> T:
        """Do it, and again in a map of another size where it does not fit; it must hold no transaction then."""
        while True:
            try:
                return work()
            except lmdb.MapFullError:
                self._resize(2 * self.env.info()["map_size"])
            except lmdb.MapResizedError:
                self._resize(0)

    def _enter(self) -> None:
        with self._lock:
            if self._unusable:
                raise lmdb.Error(self._unusable)
            self._within += 1

    def _leave(self) -> None:
        with self._lock:
            self._within -= 1
            if self._waiting:
                self._ended.notify_all()

    def _resize(self, size: int) -> None:
        """Map the file anew, 0: as large as its last writer has, once every transaction of this process has ended."""
        with self._ended:
            self._waiting += 1
            ended = self._ended.wait_for(lambda: self._within == 0, RESIZE_WITHIN_S)
            self._waiting -= 1
            if not ended:
                raise lmdb.Error(f"a transaction of this process did not end within {RESIZE_WITHIN_S:g} s")
            try:
                self.env.set_mapsize(size)
            except lmdb.Error as error:  # the old map is gone
                self._unusable = f"no address space for a map as large as the file ({error})"
                raise


_reading: weakref.WeakValueDictionary[Place, Environment] = weakref.WeakValueDictionary()
_writing: weakref.WeakValueDictionary[Place, Environment] = weakref.WeakValueDictionary()
"""what this process reads, and writes: it may read what it writes by the same handle alone"""
_opening = threading.Lock()


def _forget() -> None:
    """A child of a fork opens anew what it reads."""
    global _reading, _opening
    _reading, _opening = weakref.WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_forget)


def place_of(folder: Path) -> Place:
    """Of the environment in a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    data = (folder / DATA).stat()
    return str(folder.resolve()), data.st_dev, data.st_ino


def opened_for_reading(folder: Path) -> Environment:
    """This process's handle of an environment.

    Raises:
        lmdb.Error: it is damaged, or written by this process; NotFoundError where nothing was committed yet.
        OSError: it is not there.
    """
    with _opening:
        place = place_of(folder)
        if (opened := _reading.get(place)) is None:
            opened = Environment(_mapped(folder), create=False)
            if place_of(folder) != place:
                raise lmdb.Error("it was replaced by another while it was opened; open it again")
            _reading[place] = opened
        return opened


def opened_for_either(folder: Path) -> Environment:
    """The same, by the writer's handle where this process writes it."""
    return _writing.get(place_of(folder)) or opened_for_reading(folder)


def opened_for_writing(folder: Path) -> Environment:
    """This process's handle of an environment, which is made where it is not there.

    Raises:
        lmdb.Error: it is damaged, or read by this process.
        OSError: it cannot be made.
    """
    with _opening:
        data = folder / DATA
        there = data.is_file()
        if there and (opened := _writing.get(place_of(folder))) is not None:
            return opened
        size = max(FIRST_MAP_BYTES, 2 * data.stat().st_size if there else 0)
        opened = Environment(lmdb.open(str(folder.resolve()), map_size=size, **LOCKING), create=True)
        _writing[place_of(folder)] = opened
        return opened


def _mapped(folder: Path) -> lmdb.Environment:
    """With as much address space as there is, up to what it may grow to."""
    size = (folder / DATA).stat().st_size
    key = str(folder.resolve())
    for reserved in (max(RESERVED_BYTES, 4 * size), max(1 << 30, 2 * size)):
        try:
            return lmdb.open(key, readonly=True, create=False, map_size=reserved, **LOCKING)
        except lmdb.MemoryError:  # no such address space (ulimit -v)
            continue
    return lmdb.open(key, readonly=True, create=False, map_size=size, **LOCKING)
