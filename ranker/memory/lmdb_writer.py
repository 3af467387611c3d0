"""Writes one generation of a store in a folder, gathering records for commits of some size.

A mark is committed with the last of its unit's records: what is marked is there, whatever process was killed when.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lmdb

from ranker.memory.keys import U64
from ranker.memory.lmdb_environment import Environment, names_of, opened_for_writing
from ranker.memory.store import Generation, StoreError, refuse_other

COMMIT_BYTES = 64 << 20
"""records that a writer gathers for one commit"""
REMOVAL_BYTES = 256
"""what one to be removed counts for in it: about what its key takes here"""
GENERATION, DONE = b"generation", b"done/"


class LmdbWriter:
    """For one thread.

    Raises:
        StoreError: this process reads it, or the folder cannot be written.
    """

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self._pending: dict[bytes, bytes | None] = {}  # None: to be removed
        self._pending_bytes = self._records = self._bytes = 0
        try:
            self._opened: Environment | None = opened_for_writing(folder)
        except (lmdb.Error, OSError) as error:
            raise self._unwritable(error) from error

    def register(self, generation: Generation) -> None:
        """Write what is known of it, unless another process has.

        Raises:
            StoreError: it exists with other records.
        """

        def write(txn: lmdb.Transaction, opened: Environment) -> None:
            raw = txn.get(GENERATION, db=opened.about)
            if raw is None:
                txn.put(GENERATION, generation.model_dump_json().encode(), db=opened.about)
            else:
                refuse_other(Generation.model_validate_json(bytes(raw)), generation, self.url)

        self._commit(write)

    def replace(self, generation: Generation) -> None:
        """Write what is known of it now."""
        raw = generation.model_dump_json().encode()
        self._commit(lambda txn, opened: txn.put(GENERATION, raw, db=opened.about))

    def put_many(self, keys: U64, values: Sequence[bytes]) -> None:
        """Gather them for a commit."""
        self._pending.update(zip(names_of(keys), values, strict=True))
        added = sum(map(len, values))
        self._records, self._bytes = self._records + len(values), self._bytes + added
        self._gathered(added)

    def remove_many(self, keys: U64) -> None:
        """Gather them for the same commit."""
        self._pending.update(dict.fromkeys(names_of(keys)))
        self._gathered(len(keys) * REMOVAL_BYTES)

    def done(self, unit: str, counts: Mapping[str, int] | None = None) -> None:
        """Commit what is gathered with the mark; `records` and `bytes` put since the last mark are counted."""
        mark = {"records": self._records, "bytes": self._bytes, **(counts or {})}
        self._write({DONE + unit.encode(): json.dumps(mark).encode()})
        self._records = self._bytes = 0

    def close(self) -> None:
        """Commit what is left."""
        if self._opened is not None and self._pending:
            self._write({})
        self._opened = None  # the last handle closes it

    def _gathered(self, added: int) -> None:
        self._pending_bytes += added
        if self._pending_bytes >= COMMIT_BYTES:
            self._write({})

    def _write(self, marks: dict[bytes, bytes]) -> None:
        records = [(name, value) for name, value in self._pending.items() if value is not None]
        removed = [name for name, value in self._pending.items() if value is None]

        def write(txn: lmdb.Transaction, opened: Environment) -> None:
            # The first records fill their pages in order. Later ones go between them: as they come, pages are about
            # two thirds full (ln 2 in the long run); in order, they would leave each page that they split half empty.
            first = txn.stat(opened.records)["entries"] == 0
            with txn.cursor(opened.records) as cursor:
                cursor.putmulti(sorted(records) if first else records, append=first)
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

        def commit() -> None:
            with opened.transaction(write=True) as txn:
                write(txn, opened)

        try:
            opened.env.reader_check()  # slots of readers that were killed would keep old pages from being used again
            opened.fitting(commit)
        except lmdb.Error as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> StoreError:
        return StoreError(
            f"{self.folder}: cannot be written ({error}); close this process's readers of it, free space or correct "
            f"permissions; one that is damaged: `ranker memory drop {self.url} {self.folder.name}`"
        )
