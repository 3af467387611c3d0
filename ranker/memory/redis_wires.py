"""Connections to the servers of a store, and which of them to leave alone for now.

A server that does not answer in time, or not as it should, is left alone for `retry_after_s`; then one thread tries it
while the others still pass it by. So an outage costs the requests in flight their deadline, and those that follow
nothing. Its connections are closed, and with them goes what it still may answer. No request resolves a name
(:mod:`ranker.memory.names`).
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ranker.memory.names import NAMES, Address
from ranker.memory.redis_url import RedisUrl
from ranker.memory.redis_wire import Reply, ReplyError, Wire
from ranker.memory.store import Reason


class Answered(NamedTuple):
    """replies: to the first of a server's commands, to all where nothing failed; failure: why there are no more;
    stale: a connection that had idled was closed meanwhile, a fresh one may do."""

    replies: Sequence[Reply | ReplyError]
    failure: Reason = ""
    stale: bool = False


class Wires:
    """Idle connections by server; each exchange has its own."""

    def __init__(self, url: RedisUrl, retry_after_s: float) -> None:
        self._url, self._retry_after_s = url, retry_after_s
        self._lock = threading.Lock()
        self._idle: dict[Address, list[Wire]] = defaultdict(list)
        self._leave_until: dict[Address, float] = {}
        self._closed = False
        NAMES.begin((url.host, url.port))

    def known(self) -> list[Address]:
        """Servers that were connected to."""
        with self._lock:
            return list(self._idle)

    def exchange(
        self, commands: Mapping[Address, Sequence[bytes]], deadline: float, fresh: bool = False
    ) -> dict[Address, Answered]:
        """Send each server its commands, then gather the answers.

        Args:
            deadline: of :func:`time.monotonic`.
            fresh: use no connection that has idled.
        """
        answered: dict[Address, Answered] = {}
        waiting: list[tuple[Address, Wire, bool]] = []
        for address, idled in self._idling_first(commands, fresh):
            wire = idled
            if time.monotonic() >= deadline or not self._may_ask(address):
                # another server may have used up the time: no fault of this one
                answered[address] = Answered([], "timeout" if time.monotonic() >= deadline else "backing_off")
                if wire is not None:
                    self._put(address, wire)
                continue
            resolved = () if wire is not None else NAMES.of(address)
            if resolved is None:
                answered[address] = Answered([], "unresolved")
                continue
            try:
                wire = wire or Wire(self._url, address, resolved, deadline)
                wire.send(b"".join(commands[address]), deadline)
                waiting.append((address, wire, idled is not None))
            except (OSError, ReplyError, ValueError) as error:
                answered[address] = self._failed(address, wire, [], error, idled is not None)
        for address, wire, idled in waiting:
            replies: list[Reply | ReplyError] = []
            try:
                for _ in commands[address]:
                    try:
                        replies.append(wire.receive(deadline))
                    except ReplyError as refusal:
                        replies.append(refusal)
            except (OSError, ValueError) as error:
                answered[address] = self._failed(address, wire, replies, error, idled)
            else:
                answered[address] = Answered(replies)
                self._give_back(address, wire)
        return answered

    def close(self) -> None:
        """Close what idles now, and what is given back later."""
        with self._lock:
            self._closed = True
            for wires in self._idle.values():
                while wires:
                    wires.pop().close()

    def _idling_first(self, commands: Mapping[Address, object], fresh: bool) -> list[tuple[Address, Wire | None]]:
        """Servers with an idle connection, if there is one: connecting to another must not take their time."""
        with self._lock:
            if fresh:
                for address in commands:
                    while self._idle[address]:
                        self._idle[address].pop().close()
            taken = [(address, self._idle[address].pop() if self._idle[address] else None) for address in commands]
        return sorted(taken, key=lambda one: one[1] is None)

    def _may_ask(self, address: Address) -> bool:
        now = time.monotonic()
        with self._lock:
            if now < self._leave_until.get(address, 0.0):
                return False
            if address in self._leave_until:
                self._leave_until[address] = now + self._retry_after_s
            return True

    def _give_back(self, address: Address, wire: Wire) -> None:
        with self._lock:
            self._leave_until.pop(address, None)
        self._put(address, wire)

    def _put(self, address: Address, wire: Wire) -> None:
        with self._lock:
            if self._closed:
                wire.close()
            else:
                self._idle[address].append(wire)

    def _failed(
        self, address: Address, wire: Wire | None, replies: list[Reply | ReplyError], error: Exception, idled: bool
    ) -> Answered:
        if wire is not None:
            wire.close()
        late = isinstance(error, TimeoutError | BlockingIOError | ssl.SSLWantReadError)
        if idled and not late and isinstance(error, OSError):
            return Answered(replies, stale=True)
        NAMES.doubt(address)
        with self._lock:
            self._leave_until[address] = time.monotonic() + self._retry_after_s
            while self._idle[address]:
                self._idle[address].pop().close()
        reason: Reason = "connection" if isinstance(error, OSError) else "store"
        if isinstance(error, socket.gaierror):
            reason = "unresolved"
        return Answered(replies, "timeout" if late else reason)
