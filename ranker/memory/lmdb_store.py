"""A store in a folder of this machine: one LMDB environment a generation, and files that name the current ones.

Layout::

    current/MODEL-CODEBOOK   the name of the generation that readers of these versions read, each 16 hexadecimal
                             digits; replaced by renaming, and a file each, so that no switch undoes another model's
    generations/NAME/        an LMDB environment: database `records`, key (8 bytes, big-endian) → record;
                             database `about`: what is known of it, and a mark for each unit of work that is done

A mark is committed with the last of its unit's records: what is marked is there, whatever process was killed when.
Several processes of one machine may write a generation, one commit at a time. The map grows as it fills; readers
reserve address space for what it may become. One process opens an environment for writing or for reading, not for both.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np

from features.publish import sync_path
from ranker.memory.keys import U64
from ranker.memory.lease import Lease, file_lease
from ranker.memory.lmdb_reader import ABOUT, CURRENT, LOCKING, RECORDS, Environment, LmdbReader, opened_for_reading
from ranker.memory.store import (
    Generation,
    GenerationWriter,
    Size,
    StoreError,
    StoreReader,
    droppable,
    found_in,
    named,
    refuse_other,
    switchable,
    wait_or_stop,
)
from ranker.memory.versions import MemoryVersions

T = TypeVar("T")
FIRST_MAP_BYTES = 64 << 20
COMMIT_BYTES = 64 << 20
"""records that a writer gathers for one commit"""
_GENERATION, _DONE = b"generation", b"done/"

_writing: weakref.WeakValueDictionary[str, Environment] = weakref.WeakValueDictionary()
"""environments that this process writes, by folder: it may read them by the same handle alone"""


class LmdbStore:
    """A store in the folder `root`."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.url = f"lmdb:{root}"

    def begin(self, generation: Generation) -> GenerationWriter:
        """Make it, or go on with it; readers of this process must have been closed."""
        folder = self._folder(named(generation.name))
        folder.mkdir(parents=True, exist_ok=True)
        writer = LmdbWriter(folder, self.url)
        writer.register(generation)
        return writer

    def lease(self, name: str, seconds: float = 60.0) -> AbstractContextManager[Lease]:
        """A lock of the system's on a file in its folder; `seconds` are of no account."""
        return file_lease(self._folder(named(name)), wait_or_stop(name))

    def finish(self, generation: Generation) -> None:
        """State that it is whole."""
        folder = self._existing(generation.name)
        refuse_other(found_in(self.generations(), generation.name, self.url), generation, self.url)
        writer = LmdbWriter(folder, self.url)
        writer.replace(generation)
        writer.close()

    def done(self, name: str) -> dict[str, dict[str, int]]:
        """By unit."""
        marks: dict[str, dict[str, int]] = {}
        with self._reading(name) as (txn, opened), txn.cursor(opened.about) as cursor:
            there = cursor.set_range(_DONE)
            while there and (key := bytes(cursor.key())).startswith(_DONE):
                marks[key[len(_DONE) :].decode()] = json.loads(bytes(cursor.value()))
                there = cursor.next()
        return marks

    def generations(self) -> list[Generation]:
        """Those that were begun; a folder in which a writer was killed before its first commit is none yet."""
        folders = sorted((self.root / "generations").glob("*/data.mdb"))
        found = [self._about(path.parent.name) for path in folders]
        return sorted((one for one in found if one is not None), key=lambda one: (one.begun_ms, one.name))

    def current(self, versions: MemoryVersions) -> str | None:
        """What their file says."""
        return self.currents().get(versions)

    def currents(self) -> dict[MemoryVersions, str]:
        """What the files say."""
        found: dict[MemoryVersions, str] = {}
        for path in sorted((self.root / CURRENT).glob("[!.]*")):
            try:
                found[MemoryVersions.of_key(path.name)] = path.read_text().strip()
            except FileNotFoundError:  # removed meanwhile
                continue
            except (ValueError, OSError) as error:
                raise StoreError(f"{path}: names no current generation ({error}); remove it") from error
        return found

    def switch(self, name: str) -> None:
        """Rename a new file over the old one."""
        generation = found_in(self.generations(), name, self.url)
        switchable(generation, self.url)
        folder = self.root / CURRENT
        aside = folder / f".{generation.versions.key}.{os.getpid()}.{threading.get_ident()}"
        try:
            folder.mkdir(exist_ok=True)
            aside.write_text(f"{name}\n")
            sync_path(aside)
            aside.replace(folder / generation.versions.key)
            sync_path(folder)
            sync_path(self.root)
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written ({error}); free space or correct permissions") from error

    def drop(self, name: str, current: bool = False) -> None:
        """Remove its folder; who still reads it keeps what he has opened."""
        folder, currents = self._existing(name), self.currents()
        if not current:
            droppable(name, currents, self.url)
        with self.lease(name):
            for versions, of_versions in currents.items():
                if of_versions == name:
                    (self.root / CURRENT / versions.key).unlink(missing_ok=True)
            shutil.rmtree(folder)

    def size(self, name: str) -> Size:
        """Records, and bytes of the pages in use."""
        with self._reading(name) as (txn, opened):
            used = (opened.env.info()["last_pgno"] + 1) * opened.env.stat()["psize"]
            return Size(txn.stat(opened.records)["entries"], used)

    def records(self, name: str) -> Iterator[tuple[int, bytes]]:
        """By ascending key, as of one moment."""
        with self._reading(name) as (txn, opened), txn.cursor(opened.records) as cursor:
            for key, value in cursor:
                yield int.from_bytes(key, "big"), bytes(value)

    def get(self, name: str, keys: U64) -> list[bytes | None]:
        """By one cursor."""
        names = names_of(keys)
        with self._reading(name) as (txn, opened), txn.cursor(opened.records) as cursor:
            found = {bytes(key): bytes(value) for key, value in cursor.getmulti(names)}
        return [found.get(key) for key in names]

    def reader(self, versions: MemoryVersions, check_every_s: float = 1.0, retry_after_s: float = 1.0) -> StoreReader:
        """For this process; it may fork afterwards."""
        return LmdbReader(self.root, versions, check_every_s)

    def close(self) -> None:
        """Nothing is held."""

    def _folder(self, name: str) -> Path:
        return self.root / "generations" / name

    def _existing(self, name: str) -> Path:
        folder = self._folder(named(name))
        if not (folder / "data.mdb").is_file():
            found_in(self.generations(), name, self.url)
        return folder

    def _about(self, name: str) -> Generation | None:
        try:
            with self._reading(name) as (txn, opened):
                raw = txn.get(_GENERATION, db=opened.about)
        except _NotBegunError:
            return None
        return None if raw is None else Generation.model_validate_json(bytes(raw))

    @contextmanager
    def _reading(self, name: str) -> Generator[tuple[lmdb.Transaction, Environment]]:
        """A transaction; by the writer's handle where this process writes that generation."""
        folder = self._existing(name)
        try:
            opened = _writing.get(str(folder.resolve())) or opened_for_reading(folder)
            with opened.env.begin() as txn:
                yield txn, opened
        except lmdb.NotFoundError as error:
            raise _NotBegunError(
                f"{folder}: nothing was committed yet; wait for its build, or start it again"
            ) from error
        except lmdb.Error as error:
            raise StoreError(f"{folder}: cannot be read ({error}); build the generation again") from error


class _NotBegunError(StoreError):
    """A writer was killed, or is at work, before its first commit."""


def names_of(keys: U64) -> list[bytes]:
    """Keys as LMDB has them: big-endian, so that they lie in numeric order."""
    return np.ascontiguousarray(keys).astype(">u8").view("V8").tolist()


class LmdbWriter:
    """Writes one generation; for one thread.

    Raises:
        StoreError: this process reads it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self._pending: dict[bytes, bytes | None] = {}  # None: to be removed
        self._pending_bytes = self._records = self._bytes = 0
        self._opened: Environment | None = _opened_for_writing(folder)

    def register(self, generation: Generation) -> None:
        """Write what is known of it, unless another process has.

        Raises:
            StoreError: it exists with other records.
        """

        def write(txn: lmdb.Transaction, opened: Environment) -> None:
            raw = txn.get(_GENERATION, db=opened.about)
            if raw is None:
                txn.put(_GENERATION, generation.model_dump_json().encode(), db=opened.about)
            else:
                refuse_other(Generation.model_validate_json(bytes(raw)), generation, self.url)

        self._commit(write)

    def replace(self, generation: Generation) -> None:
        """Write what is known of it now."""
        raw = generation.model_dump_json().encode()
        self._commit(lambda txn, opened: txn.put(_GENERATION, raw, db=opened.about))

    def put_many(self, keys: U64, values: Sequence[bytes]) -> None:
        """Gather them for a commit."""
        self._pending.update(zip(names_of(keys), values, strict=True))
        added = sum(map(len, values))
        self._records, self._bytes = self._records + len(values), self._bytes + added
        self._pending_bytes += added
        if self._pending_bytes >= COMMIT_BYTES:
            self._write({})

    def remove_many(self, keys: U64) -> None:
        """Gather them for the same commit."""
        self._pending.update(dict.fromkeys(names_of(keys)))

    def done(self, unit: str, counts: Mapping[str, int] | None = None) -> None:
        """Commit what is gathered with the mark; `records` and `bytes` put since the last mark are counted."""
        mark = {"records": self._records, "bytes": self._bytes, **(counts or {})}
        self._write({_DONE + unit.encode(): json.dumps(mark).encode()})
        self._records = self._bytes = 0

    def close(self) -> None:
        """Commit what is left."""
        if self._opened is not None and self._pending:
            self._write({})
        self._opened = None  # the last handle closes it

    def _write(self, marks: dict[bytes, bytes]) -> None:
        pending = sorted(self._pending.items())  # in the order of the pages
        records = [(name, value) for name, value in pending if value is not None]
        removed = [name for name, value in pending if value is None]

        def write(txn: lmdb.Transaction, opened: Environment) -> None:
            with txn.cursor(opened.records) as cursor:
                cursor.putmulti(records)
            for name in removed:
                txn.delete(name, db=opened.records)
            for name, mark in marks.items():
                txn.put(name, mark, db=opened.about)

        self._commit(write)
        self._pending, self._pending_bytes = {}, 0

    def _commit(self, write: Callable[[lmdb.Transaction, Environment], object]) -> None:
        """One transaction, again in a larger map where it does not fit."""
        if (opened := self._opened) is None:
            raise StoreError(f"{self.folder}: the writer is closed; begin the generation again")
        try:
            opened.env.reader_check()  # slots of readers that were killed would keep old pages from being used again

            def commit() -> None:
                with opened.env.begin(write=True) as txn:
                    write(txn, opened)

            _in_larger_maps(opened.env, commit)
        except lmdb.Error as error:
            raise _unwritable(self.folder, error) from error


def _opened_for_writing(folder: Path) -> Environment:
    key = str(folder.resolve())
    if (opened := _writing.get(key)) is None:
        size = (folder / "data.mdb").stat().st_size if (folder / "data.mdb").is_file() else 0
        try:
            env = lmdb.open(key, map_size=max(FIRST_MAP_BYTES, 2 * size), **LOCKING)
            records = _in_larger_maps(env, lambda: env.open_db(RECORDS))
            opened = Environment(env, records, _in_larger_maps(env, lambda: env.open_db(ABOUT)))
        except lmdb.Error as error:
            raise _unwritable(folder, error) from error
        _writing[key] = opened
    return opened


def _in_larger_maps(env: lmdb.Environment, work: Callable[[], T]) -> T:
    """Do it, again with a larger map where it does not fit, or where another process has made the map larger."""
    while True:
        try:
            return work()
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])
        except lmdb.MapResizedError:
            env.set_mapsize(0)


def _unwritable(folder: Path, error: lmdb.Error) -> StoreError:
    return StoreError(
        f"{folder}: cannot be written ({error}); close this process's readers of it, free space or correct permissions"
    )
