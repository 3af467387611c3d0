"""What a store of records offers, whatever keeps them: named generations, written side by side, one read by each model.

A generation is one build's records, with what is known of them (:class:`Generation`). Units of work are marked as done
within it, each mark after or together with the unit's records, so that a build that was cut off goes on where it
stood. Readers read the current generation of their own versions: servers of two models share a store, and a newly
trained one's memories take nothing from those of the model in service. :meth:`MemoryStore.switch` makes a generation
the current one of its versions, for all readers at once; a reader notices within a second, and reads the former till
then.

    lmdb:PATH                              a folder of this machine (also: a path alone)
    redis://HOST:PORT/DB?namespace=NAME    a server; rediss:// by TLS; other parameters as redis-py's
    redis+cluster://HOST:PORT?namespace=…  a cluster, by any of its nodes; rediss+cluster:// by TLS
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from features.errors import UserError
from ranker.memory.keys import U64
from ranker.memory.record import Dtype
from ranker.memory.versions import MemoryVersions

if TYPE_CHECKING:
    from ranker.memory.lease import Lease

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
Reason = Literal["", "timeout", "connection", "unresolved", "backing_off", "no_generation", "store", "closed"]
"""why records could not be looked up; "unresolved": the server's name has no address, or none yet; "store": it answered
what no store should"""


class StoreError(UserError):
    """A store that cannot be used, or not so."""


class Generation(BaseModel):
    """What is known of a build's records. Kept as JSON in the store."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: int
    codebook: int
    dtype: Dtype
    blocks: dict[int, Literal["request", "probe"]]
    """numbers of the blocks in ``model.long``, with what a record is of"""
    as_of_ms: int
    """no record knows of anything from this time on; one that a refresh left as it was is as of when it was made"""
    begun_ms: int
    finished_ms: int | None = None
    """None while it is being built: it cannot become a current one"""
    counts: dict[str, int] = Field(default_factory=dict)
    """what the build counted"""
    notes: dict[str, str] = Field(default_factory=dict)
    """what else the build says of it: run, dataset, policy"""

    @property
    def versions(self) -> MemoryVersions:
        """Of its records."""
        return MemoryVersions(self.model, self.codebook)


class Lookup(NamedTuple):
    """values: the bytes of each key's record, None where there is none; lost: `[U]`, which could not be looked up, or
    None where all could; reason: of the first that could not."""

    values: Sequence[bytes | None]
    lost: npt.NDArray[np.bool_] | None = None
    reason: Reason = ""

    @classmethod
    def failed(cls, count: int, reason: Reason) -> Lookup:
        """None of `count` records could be looked up."""
        return cls([None] * count, np.ones(count, np.bool_), reason)


class Size(NamedTuple):
    """Of a generation: records; bytes on the disk, or of the values where the store tells no more."""

    records: int
    bytes: int


class StoreReader(Protocol):
    """Looks up records of the current generation of some versions; for many threads."""

    def get_many(self, keys: U64, deadline_ms: float) -> Lookup:
        """Records of the keys `[U]`, in their order; whatever the store does, in time and without raising."""
        ...

    def generation(self) -> str | None:
        """The one that was read last."""
        ...

    def close(self) -> None:
        """Give back what it holds; look-ups fail from here on."""
        ...


class GenerationWriter(Protocol):
    """Writes records into one generation; any number of processes may, one machine's for LMDB."""

    def put_many(self, keys: U64, values: Sequence[bytes]) -> None:
        """Keep records, over older ones of the same keys; some may be written only by the next `done` or `close`."""
        ...

    def remove_many(self, keys: U64) -> None:
        """Remove records, or what was put of them; in order with `put_many`. Keys without a record are none."""
        ...

    def done(self, unit: str, counts: Mapping[str, int] | None = None) -> None:
        """Mark a unit of work as done, with what was counted in it, once all records put so far are kept."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class MemoryStore(Protocol):
    """All that is done with a store but reading online. Every method may raise StoreError."""

    url: str

    def begin(self, generation: Generation) -> GenerationWriter:
        """Make a generation, or go on with one of the same versions, dtype and blocks; a writer into it."""
        ...

    def lease(self, name: str, seconds: float = 60.0) -> AbstractContextManager[Lease]:
        """Exclude a second writer of a generation, which need not be there yet, until the context ends.

        Args:
            seconds: Redis' lease ends so long after its last renewal, whatever became of its holder; LMDB's ends
                with the process.

        Raises:
            LeaseHeldError: another holds it.
        """
        ...

    def finish(self, generation: Generation) -> None:
        """Replace what is known of a generation, and state that it is whole (`finished_ms`)."""
        ...

    def done(self, name: str) -> dict[str, dict[str, int]]:
        """Units of a generation that are done, with their counts."""
        ...

    def generations(self) -> list[Generation]:
        """All of them, oldest first."""
        ...

    def current(self, versions: MemoryVersions) -> str | None:
        """The name of the one that readers of these versions read."""
        ...

    def currents(self) -> dict[MemoryVersions, str]:
        """The same of all versions that have one."""
        ...

    def switch(self, name: str) -> None:
        """Have all readers of a finished generation's versions read it from now on."""
        ...

    def drop(self, name: str, current: bool = False) -> None:
        """Remove a generation. Readers that have not noticed the last switch yet lose records of Redis till they do.

        Args:
            current: also where it is the current one of its versions; their readers find nothing from then on.

        Raises:
            StoreError: there is none, it is a current one, or it is being written.
        """
        ...

    def size(self, name: str) -> Size:
        """Of a generation."""
        ...

    def records(self, name: str) -> Iterator[tuple[int, bytes]]:
        """Every key and record of a generation, in the store's order."""
        ...

    def get(self, name: str, keys: U64) -> list[bytes | None]:
        """Records of a generation by their keys, without haste."""
        ...

    def reader(self, versions: MemoryVersions, check_every_s: float = 1.0, retry_after_s: float = 1.0) -> StoreReader:
        """What looks up records online; made even while the store is absent.

        Args:
            versions: whose current generation is read.
            check_every_s: how soon a switch is noticed.
            retry_after_s: how long a server that did not answer in time is left alone.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


def open_store(url: str) -> MemoryStore:
    """The store that a URL names; LMDB's folder is made by the first generation.

    Raises:
        StoreError: no such kind of store.
    """
    kind = re.match(r"[a-z][a-z0-9+]*(?=:)", url)
    scheme = kind[0] if kind else "lmdb"
    if scheme == "lmdb":
        from ranker.memory.lmdb_store import LmdbStore

        return LmdbStore(url.removeprefix("lmdb:").removeprefix("//"))
    if scheme in ("redis", "rediss", "redis+cluster", "rediss+cluster"):
        from ranker.memory.redis_store import RedisStore

        return RedisStore(url)
    raise StoreError(
        f"{url}: a store of kind {scheme!r}; use lmdb:PATH, redis://HOST:PORT/DB, rediss://…, "
        "redis+cluster://HOST:PORT or rediss+cluster://…"
    )


def named(name: str, what: str = "generation") -> str:
    """A name that is safe in paths and keys.

    Raises:
        StoreError: it is not.
    """
    if not _NAME.fullmatch(name):
        raise StoreError(f"{what} {name!r}: use 1 to 64 letters, digits, '.', '_' and '-', a letter or digit first")
    return name


def wait_or_stop(name: str) -> str:
    """The remedy of who finds a generation's lease taken."""
    return f"wait until it is done with generation {name!r}, or stop it, then start this command again"


def found_in(generations: Sequence[Generation], name: str, url: str) -> Generation:
    """The generation of that name.

    Raises:
        StoreError: there is none.
    """
    for generation in generations:
        if generation.name == name:
            return generation
    have = ", ".join(generation.name for generation in generations) or "none"
    raise StoreError(f"{url}: no generation {name!r}; it has {have} (`ranker memory stats {url}`)")


def refuse_other(old: Generation, new: Generation, url: str) -> None:
    """Raise StoreError where records of `new` would lie among those of another kind."""
    for key in ("model", "codebook", "dtype", "blocks"):
        was, wanted = getattr(old, key), getattr(new, key)
        if was != wanted:
            raise StoreError(
                f"{url}: generation {old.name!r} has {key} {was!r}, and these records {wanted!r}; choose another "
                f"name, or drop it (`ranker memory drop {url} {old.name}`)"
            )


def switchable(generation: Generation, url: str) -> None:
    """Raise StoreError where a generation is not whole."""
    if generation.finished_ms is None:
        raise StoreError(
            f"{url}: generation {generation.name!r} is not finished; go on with its build, then switch to it"
        )


def droppable(name: str, currents: Mapping[MemoryVersions, str], url: str) -> None:
    """Raise StoreError where readers read it."""
    for versions, current in currents.items():
        if name == current:
            raise StoreError(
                f"{url}: generation {name!r} is the current one of {versions}; switch to another of them first, or, "
                "where servers of that model are to find nothing from now on, drop it with --current"
            )
