"""A store in a Redis server or cluster, for many machines; :mod:`ranker.memory.redis_url` names its keys.

Records are written before the mark of their unit: what is marked is there, as far as Redis keeps what it has taken.
Memory's end is an error of the build (`maxmemory-policy noeviction`), or evicted records are missing ones.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import redis
from pydantic import ValidationError
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from features.progress import log
from ranker.memory.keys import U64
from ranker.memory.lease import Lease
from ranker.memory.redis_lease import redis_lease
from ranker.memory.redis_reader import RedisReader
from ranker.memory.redis_url import CURRENT, RedisUrl, key_names, key_of, shown
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

COMMANDS = 2000
"""of a pipeline"""
TIMEOUT_S = 30.0


class RedisStore:
    """The store at `url`, connected to at its first use."""

    def __init__(self, url: str, timeout_s: float = TIMEOUT_S) -> None:
        self.at = RedisUrl.parse(url)
        self.url = shown(url)
        self._given, self._timeout_s = url, timeout_s
        self._told: set[str] = set()
        self._client: Any = None

    def begin(self, generation: Generation) -> GenerationWriter:
        """Make it, or go on with it."""
        key = self.at.key("generations")
        with self.connected() as client:
            if not client.hsetnx(key, named(generation.name), generation.model_dump_json()):
                old = Generation.model_validate_json(client.hget(key, generation.name))
                refuse_other(old, generation, self.url)
        return RedisWriter(self, generation.name)

    @contextmanager
    def lease(self, name: str, seconds: float = 60.0) -> Generator[Lease]:
        """A key that expires; over connections of its own, which wait for less than it lives."""
        apart = RedisStore(self._given, min(TIMEOUT_S, seconds / 8))  # twice a renewal, of which there are four
        what = f"{self.url}, generation {named(name)!r}"
        try:
            with redis_lease(apart.connected, self.at.key("lease", name), seconds, what, wait_or_stop(name)) as lease:
                yield lease
        finally:
            apart.close()

    def finish(self, generation: Generation) -> None:
        """State that it is whole."""
        refuse_other(found_in(self.generations(), generation.name, self.url), generation, self.url)
        with self.connected() as client:
            client.hset(self.at.key("generations"), generation.name, generation.model_dump_json())

    def done(self, name: str) -> dict[str, dict[str, int]]:
        """By unit."""
        found_in(self.generations(), name, self.url)
        with self.connected() as client:
            marks = client.hgetall(self.at.key("done", name))
        return {unit.decode(): json.loads(mark) for unit, mark in sorted(marks.items())}

    def generations(self) -> list[Generation]:
        """Those that were begun; one that cannot be read is told of and passed by."""
        with self.connected() as client:
            raw = client.hgetall(self.at.key("generations"))
        found = [self._known(name.decode(), one) for name, one in raw.items()]
        return sorted((one for one in found if one is not None), key=lambda one: (one.begun_ms, one.name))

    def _known(self, name: str, raw: bytes) -> Generation | None:
        """What is known of a generation, None where it cannot be read."""
        try:
            return Generation.model_validate_json(raw)
        except ValidationError:
            if name not in self._told:
                self._told.add(name)
                log(
                    f"{self.url}: what generation {name!r} says of itself cannot be read; drop it "
                    f"(`ranker memory drop {self.url} {name}`) and build it again; it is passed by"
                )
            return None

    def current(self, versions: MemoryVersions) -> str | None:
        """What a field of one key says."""
        with self.connected() as client:
            name = client.hget(self.at.key(CURRENT), versions.key)
        return None if name is None else name.decode()

    def currents(self) -> dict[MemoryVersions, str]:
        """What its fields say."""
        with self.connected() as client:
            names = client.hgetall(self.at.key(CURRENT))
        try:
            found = {MemoryVersions.of_key(key.decode()): name.decode() for key, name in names.items()}
        except ValueError as error:
            raise StoreError(f"{self.url}: {self.at.key(CURRENT)} has the field {error}; remove it") from error
        return dict(sorted(found.items()))

    def switch(self, name: str) -> None:
        """Write that field."""
        generation = found_in(self.generations(), name, self.url)
        switchable(generation, self.url)
        with self.connected() as client:
            client.hset(self.at.key(CURRENT), generation.versions.key, name)

    def drop(self, name: str, current: bool = False) -> None:
        """Remove its records, then what is known of it: a drop that was cut off is done by another."""
        currents = self.currents()
        if not current:
            droppable(named(name), currents, self.url)
        with self.connected() as client:
            raw = client.hget(self.at.key("generations"), name)
        if raw is None:
            found_in(self.generations(), name, self.url)
            raise StoreError(f"{self.url}: generation {name!r} came just now; look again, then drop it")
        with self.lease(name), self.connected() as client:
            for versions in [versions for versions, of_versions in currents.items() if of_versions == name]:
                client.hdel(self.at.key(CURRENT), versions.key)
            if (generation := self._known(name, raw)) is not None:
                unfinished = generation.model_copy(update={"finished_ms": None})
                client.hset(self.at.key("generations"), name, unfinished.model_dump_json())
            client.delete(self.at.key("done", name))
            for names in self._batches(name):
                pipeline = client.pipeline(transaction=False)
                for key in names:
                    pipeline.unlink(key)
                pipeline.execute()
            client.hdel(self.at.key("generations"), name)

    def size(self, name: str) -> Size:
        """As its marks count them: a record that was written twice counts twice, one of no finished unit not at all."""
        marks = self.done(name).values()
        return Size(sum(mark["records"] for mark in marks), sum(mark["bytes"] for mark in marks))

    def records(self, name: str) -> Iterator[tuple[int, bytes]]:
        """As SCAN finds them; one that changes meanwhile may come twice."""
        found_in(self.generations(), name, self.url)
        with self.connected() as client:
            for names in self._batches(name):
                for key, value in zip(names, _values(client, names), strict=True):
                    if value is not None:
                        yield key_of(key), value

    def get(self, name: str, keys: U64) -> list[bytes | None]:
        """By pipelines."""
        found_in(self.generations(), name, self.url)
        names = key_names(self.at.prefix(name), keys)
        with self.connected() as client:
            starts = range(0, len(names), COMMANDS)
            return [value for at in starts for value in _values(client, names[at : at + COMMANDS])]

    def reader(self, versions: MemoryVersions, check_every_s: float = 1.0, retry_after_s: float = 1.0) -> StoreReader:
        """With connections of its own."""
        return RedisReader(self.at, versions, check_every_s, retry_after_s)

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def put(self, name: str, keys: U64, values: Sequence[bytes]) -> None:
        """Write records of a generation."""
        names = key_names(self.at.prefix(name), keys)
        with self.connected() as client:
            for at in range(0, len(names), COMMANDS):
                pipeline = client.pipeline(transaction=False)
                for key, value in zip(names[at : at + COMMANDS], values[at : at + COMMANDS], strict=True):
                    pipeline.set(key, value)
                pipeline.execute()

    def remove(self, name: str, keys: U64) -> None:
        """Remove records of a generation."""
        names = key_names(self.at.prefix(name), keys)
        with self.connected() as client:
            for at in range(0, len(names), COMMANDS):
                pipeline = client.pipeline(transaction=False)
                for key in names[at : at + COMMANDS]:
                    pipeline.unlink(key)
                pipeline.execute()

    def mark(self, name: str, unit: str, counts: Mapping[str, int]) -> None:
        """Mark a unit as done."""
        with self.connected() as client:
            client.hset(self.at.key("done", name), unit, json.dumps(dict(counts)))

    def _batches(self, name: str) -> Generator[list[bytes]]:
        """Names of a generation's records."""
        with self.connected() as client:
            names = client.scan_iter(match=self.at.prefix(name) + b"*", count=COMMANDS)
            while batch := list(islice(names, COMMANDS)):
                yield batch

    @contextmanager
    def connected(self) -> Generator[Any]:
        """redis-py's client, of a server or a cluster.

        Raises:
            StoreError: it does not answer, or refuses.
        """
        try:
            if self._client is None:
                options: dict[str, Any] = {
                    "socket_timeout": self._timeout_s,
                    "socket_connect_timeout": self._timeout_s,
                }
                if self.at.cluster:
                    self._client = redis.RedisCluster.from_url(self.at.client, **options)
                else:
                    retry = Retry(NoBackoff(), 1)
                    self._client = redis.Redis.from_url(self.at.client, retry=retry, **options)
            yield self._client
        except (RedisError, OSError) as error:
            raise StoreError(
                f"{self.url}: {error or type(error).__name__}; see that the server is there, takes these credentials, "
                "and has memory left"
            ) from error


class RedisWriter:
    """Writes one generation; for one thread."""

    def __init__(self, store: RedisStore, name: str) -> None:
        self._store, self._name = store, name
        self._records = self._bytes = 0
        self._closed = False

    def put_many(self, keys: U64, values: Sequence[bytes]) -> None:
        """Write them now."""
        if self._closed:
            raise StoreError(f"{self._store.url}: the writer is closed; begin the generation again")
        self._store.put(self._name, np.ascontiguousarray(keys), values)
        self._records, self._bytes = self._records + len(values), self._bytes + sum(map(len, values))

    def remove_many(self, keys: U64) -> None:
        """Remove them now."""
        if self._closed:
            raise StoreError(f"{self._store.url}: the writer is closed; begin the generation again")
        self._store.remove(self._name, np.ascontiguousarray(keys))

    def done(self, unit: str, counts: Mapping[str, int] | None = None) -> None:
        """Write the mark; `records` and `bytes` put since the last one are counted."""
        self._store.mark(self._name, unit, {"records": self._records, "bytes": self._bytes, **(counts or {})})
        self._records = self._bytes = 0

    def close(self) -> None:
        """Nothing is left to be written."""
        self._closed = True


def _values(client: Any, names: Sequence[bytes]) -> list[bytes | None]:
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.get(name)
    return pipeline.execute()
