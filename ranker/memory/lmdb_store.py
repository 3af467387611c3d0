"""A store in a folder of this machine: one LMDB environment a generation, and files that name the current ones.

Layout::

    current/MODEL-CODEBOOK   the name of the generation that readers of these versions read, each 16 hexadecimal
                             digits; replaced by renaming, and a file each, so that no switch undoes another model's
    generations/NAME/        an LMDB environment: database `records`, key (8 bytes, big-endian) → record;
                             database `about`: what is known of it, and a mark for each unit of work that is done
    generations/NAME/lease   locked by the process that builds or refreshes it

Several processes of one machine may write a generation, one commit at a time. The map grows as it fills; readers
reserve address space for what it may become. One process opens an environment for writing or for reading, not for both.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path

import lmdb
from pydantic import ValidationError

from features.progress import log
from features.publish import sync_path
from ranker.memory.keys import U64
from ranker.memory.lease import Lease, file_lease
from ranker.memory.lmdb_environment import DATA, Environment, names_of, opened_for_either
from ranker.memory.lmdb_reader import CURRENT, LmdbReader
from ranker.memory.lmdb_writer import DONE, GENERATION, LmdbWriter
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

BATCH = 4096
"""records that are read in one transaction: a long one would keep old pages from being used again"""


class LmdbStore:
    """A store in the folder `root`."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.url = f"lmdb:{root}"
        self._told: set[str] = set()

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
            there = cursor.set_range(DONE)
            while there and (key := bytes(cursor.key())).startswith(DONE):
                marks[key[len(DONE) :].decode()] = json.loads(bytes(cursor.value()))
                there = cursor.next()
        return marks

    def generations(self) -> list[Generation]:
        """Those that were begun; a folder in which a writer was killed before its first commit is none yet, and one
        that cannot be read is told of and passed by."""
        folders = sorted((self.root / "generations").glob(f"*/{DATA}"))
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
        """By ascending key; each batch as of one moment, so that a writer may remove what it reads."""
        after = b""
        while True:
            with self._reading(name) as (txn, opened), txn.cursor(opened.records) as cursor:
                there = cursor.set_range(after) if after else cursor.first()
                if there and bytes(cursor.key()) == after:
                    there = cursor.next()
                batch = [(bytes(key), bytes(value)) for key, value in islice(cursor, BATCH)] if there else []
            for key, value in batch:
                yield int.from_bytes(key, "big"), value
            if not batch:
                return
            after = batch[-1][0]

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
        if not (folder / DATA).is_file():
            found_in(self.generations(), name, self.url)
        return folder

    def _about(self, name: str) -> Generation | None:
        try:
            with self._reading(name) as (txn, opened):
                raw = txn.get(GENERATION, db=opened.about)
            return None if raw is None else Generation.model_validate_json(bytes(raw))
        except _NotBegunError:
            return None
        except StoreError as error:
            reason = str(error)
        except ValidationError:
            reason = (
                f"{self._folder(name)}: what it says of itself cannot be read; drop it "
                f"(`ranker memory drop {self.url} {name}`) and build it again"
            )
        if name not in self._told:
            self._told.add(name)
            log(f"{reason}; it is passed by")
        return None

    @contextmanager
    def _reading(self, name: str) -> Generator[tuple[lmdb.Transaction, Environment]]:
        """A transaction; by the writer's handle where this process writes that generation."""
        folder = self._existing(name)
        try:
            if not (folder / DATA).stat().st_size:
                raise lmdb.NotFoundError(f"{DATA} is empty")
            opened = opened_for_either(folder)
            with opened.transaction() as txn:
                yield txn, opened
        except lmdb.NotFoundError as error:
            raise _NotBegunError(
                f"{folder}: nothing was committed yet; wait for its build, or start it again"
            ) from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(
                f"{folder}: cannot be read ({error}); drop it (`ranker memory drop {self.url} {name}`); build it again"
            ) from error


class _NotBegunError(StoreError):
    """A writer was killed, or is at work, before its first commit."""
