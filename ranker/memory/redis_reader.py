"""Look-ups in a Redis server or cluster that end by their deadline, whatever the servers do.

A look-up sends all its commands, an MGET to a server or for each slot of a cluster, before it waits for an answer.
Which generation is the current one is asked along with them every `check_every_s`.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import cast

import numpy as np
from redis.crc import key_slot

from ranker.memory.keys import I64, U64
from ranker.memory.redis_url import CURRENT, RedisUrl, key_rows
from ranker.memory.redis_wire import Address, Reply, ReplyError, packed
from ranker.memory.redis_wires import Wires
from ranker.memory.store import Lookup, Reason
from ranker.memory.versions import MemoryVersions

KEYS_OF_COMMAND = 1000
"""a server does nothing else while it answers one"""
_UNANSWERED: Reply = -1
"""stands for a reply that did not come; no command here is answered by a number"""
_MOVED = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")
Asks = dict[Address, list[tuple[I64, bytes]]]
"""commands by server, with the rows of the asked keys that each is about; none for the current generation's name"""


class _Lost(Exception):
    def __init__(self, reason: Reason) -> None:
        self.reason: Reason = reason


class _Found:
    """What a look-up has found so far, all lost at first; the first failure is its reason."""

    def __init__(self, count: int) -> None:
        self._values: list[bytes | None] = [None] * count
        self._lost = np.ones(count, np.bool_)
        self._reason: Reason = ""

    def put(self, rows: I64, reply: list[Reply]) -> None:
        """The records of these rows, in their order."""
        if len(reply) != len(rows):
            self.fail("store")
            return
        values = cast("list[bytes | None]", reply)  # MGET gives nothing else
        if len(rows) == len(self._values):  # a command for all rows has them in order
            self._values = values
        else:
            for row, value in zip(rows.tolist(), values, strict=True):
                self._values[row] = value
        self._lost[rows] = False

    def fail(self, reason: Reason) -> None:
        """Some rows stay lost."""
        self._reason = self._reason or reason

    def result(self) -> Lookup:
        """Rows that were asked again in vain are lost for want of a connection."""
        return (
            Lookup(self._values, self._lost, self._reason or "connection") if self._lost.any() else Lookup(self._values)
        )


class RedisReader:
    """Of the store at `url`; no server need be there yet."""

    def __init__(
        self, url: RedisUrl, versions: MemoryVersions, check_every_s: float = 1.0, retry_after_s: float = 1.0
    ) -> None:
        self._current_key = url.key(CURRENT).encode()
        self._current_command = packed(b"HGET", self._current_key, versions.key.encode())
        self._url, self._check_every_s, self._retry_after_s = url, check_every_s, retry_after_s
        self._wires = Wires(url, retry_after_s)
        self._first: Address = (url.host, url.port)
        self._slots: list[Address] | None = None
        self._generation: str | None = None
        self._check_at, self._closed, self._process = 0.0, False, os.getpid()

    def get_many(self, keys: U64, deadline_ms: float) -> Lookup:
        """By as few commands as there are servers, or slots, concerned."""
        if self._closed:
            return Lookup.failed(len(keys), "closed")
        if os.getpid() != self._process:  # a child of a fork must not share its parent's connections
            self._process, self._wires = os.getpid(), Wires(self._url, self._retry_after_s)
        deadline = time.monotonic() + deadline_ms / 1000
        try:
            return self._looked_up(keys, self._current(deadline), deadline)
        except _Lost as lost:
            return Lookup.failed(len(keys), lost.reason)

    def generation(self) -> str | None:
        """The one that is read."""
        return self._generation

    def close(self) -> None:
        """Look-ups fail from here on."""
        self._closed = True
        self._wires.close()

    # ---- the current generation

    def _current(self, deadline: float) -> str:
        if (generation := self._generation) is None:
            if time.monotonic() < self._check_at:
                raise _Lost("no_generation")
            home = self._home(self._current_key, deadline)
            generation = self._learn(self._asked_alone(home, self._current_command, deadline))
        if generation is None:
            raise _Lost("no_generation")
        return generation

    def _learn(self, reply: Reply | ReplyError) -> str | None:
        generation = reply.decode(errors="replace") if isinstance(reply, bytes) else None
        self._generation, self._check_at = generation, time.monotonic() + self._check_every_s
        return generation

    def _question(self, deadline: float) -> Asks:
        """For the current generation's name, where it is time to ask; by one of the threads."""
        asks: Asks = defaultdict(list)
        if (now := time.monotonic()) >= self._check_at:
            self._check_at = now + self._check_every_s
            home = self._home(self._current_key, deadline)
            asks[home].append((np.zeros(0, np.int64), self._current_command))
        return asks

    # ---- records

    def _looked_up(self, keys: U64, generation: str, deadline: float) -> Lookup:
        found = _Found(len(keys))
        framed = _framed(self._url.prefix(generation), keys)
        asks, rows = self._question(deadline), np.arange(len(keys))
        for fresh in (False, True):  # again where a connection had idled too long, or a slot has moved
            try:
                for address, some in self._groups(keys, rows, deadline):
                    command = b"*%d\r\n$4\r\nMGET\r\n" % (len(some) + 1) + framed[some].tobytes()
                    asks[address].append((some, command))
            except _Lost as lost:  # no server tells where the slots are; what was found before stays
                found.fail(lost.reason)
                break
            commands = {address: [command for _, command in asked] for address, asked in asks.items()}
            again: list[I64] = []
            for address, answered in self._wires.exchange(commands, deadline, fresh).items():
                if answered.failure:
                    found.fail(answered.failure)
                if answered.failure in ("timeout", "connection", "unresolved"):
                    self._slots = None  # another server may have taken its place
                replies = [*answered.replies, *[_UNANSWERED] * (len(asks[address]) - len(answered.replies))]
                for (some, _), reply in zip(asks[address], replies, strict=True):
                    if len(some) == 0:
                        if reply is None or isinstance(reply, bytes):
                            self._learn(reply)
                    elif isinstance(reply, list):
                        found.put(some, reply)
                    elif isinstance(reply, ReplyError) and str(reply).startswith(_MOVED):
                        self._slots = None
                        again.append(some)
                    elif isinstance(reply, ReplyError):
                        found.fail("store")
                    elif answered.stale:
                        again.append(some)
            if not again:
                break
            asks, rows = defaultdict(list), np.concatenate(again)
        return found.result()

    def _groups(self, keys: U64, rows: I64, deadline: float) -> Iterator[tuple[Address, I64]]:
        """Rows that one command may ask for, and its server."""
        if not self._url.cluster:
            for start in range(0, len(rows), KEYS_OF_COMMAND):
                yield self._first, rows[start : start + KEYS_OF_COMMAND]
            return
        tags = keys[rows] >> np.uint64(32)
        order = np.argsort(tags, kind="stable")
        edges = np.flatnonzero(np.diff(tags[order])) + 1
        for alike in np.split(rows[order], edges) if len(rows) else []:
            address = self._home(b"%08x" % int(keys[alike[0]] >> np.uint64(32)), deadline)
            for start in range(0, len(alike), KEYS_OF_COMMAND):
                yield address, alike[start : start + KEYS_OF_COMMAND]

    # ---- servers

    def _home(self, key: bytes, deadline: float) -> Address:
        """The server of a key."""
        if not self._url.cluster:
            return self._first
        slots = self._slots
        if slots is None:
            slots = self._slots = self._topology(deadline)
        return slots[key_slot(key)]

    def _topology(self, deadline: float) -> list[Address]:
        """Of each slot its server, by the first server that tells."""
        reason: Reason = "connection"
        for address in dict.fromkeys([self._first, *self._wires.known()]):
            try:
                ranges = self._asked_alone(address, packed(b"CLUSTER", b"SLOTS"), deadline)
                slots = _slots_of(ranges, address)
            except _Lost as lost:
                reason = lost.reason
                continue
            if any(port for _, port in slots):
                return slots
        raise _Lost(reason)

    def _asked_alone(self, address: Address, command: bytes, deadline: float) -> Reply:
        for fresh in (False, True):
            answered = self._wires.exchange({address: [command]}, deadline, fresh)[address]
            if not answered.stale:
                break
        if answered.failure or not answered.replies:
            raise _Lost(answered.failure or "connection")
        if isinstance(reply := answered.replies[0], ReplyError):
            raise _Lost("store")
        return reply


def _framed(prefix: bytes, keys: U64) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Names of records `[U, bytes]` as words of a command."""
    names = key_rows(prefix, keys)
    head = b"$%d\r\n" % names.shape[1]
    rows = np.empty([len(keys), len(head) + names.shape[1] + 2], np.uint8)
    rows[:, : len(head)] = np.frombuffer(head, np.uint8)
    rows[:, len(head) : -2] = names
    rows[:, -2:] = np.frombuffer(b"\r\n", np.uint8)
    return rows


def _slots_of(reply: Reply, asked: Address) -> list[Address]:
    """From CLUSTER SLOTS: first slot, last slot, then of each server its address; masters first."""
    slots: list[Address] = [("", 0)] * 16384
    try:
        for first, last, master, *_ in reply:  # type: ignore[union-attr, misc]
            address = (master[0].decode() or asked[0] if master[0] else asked[0], int(master[1]))
            slots[first : last + 1] = [address] * (last + 1 - first)
    except (TypeError, ValueError, IndexError, AttributeError):
        raise _Lost("store") from None
    return slots
