"""Addresses of servers by their names, resolved in the background: no request waits for a resolver.

The system's ``getaddrinfo`` knows no deadline, and takes 5 s and more where a resolver does not answer. So one thread
of the process calls it, for each name when it is first used, every `renew_every_s`, and soon after a connection failed;
connections are made to what it found last. A name that resolves no longer keeps its addresses. A forked process has
those of its parent, and a thread of its own as soon as it connects.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from ipaddress import ip_address
from typing import NamedTuple

RENEW_EVERY_S = 30.0
"""how soon a name that moved is followed while its old address still answers"""
AGAIN_S = 1.0
"""between two attempts at a name that does not resolve, or does not connect"""
START_S = 1.0
"""what a reader waits for its server's name when it is made"""
Address = tuple[str, int]
"""a server by its name, or its address as text, and port"""


class Resolved(NamedTuple):
    """One address of a name, as the socket module takes it."""

    family: int
    where: tuple[object, ...]


class Names:
    """The names that a process uses, for all of its threads; few, and kept as long as the process runs."""

    def __init__(self, renew_every_s: float = RENEW_EVERY_S) -> None:
        self._renew_every_s = renew_every_s
        self._found: dict[Address, tuple[Resolved, ...]] = {}
        self._due: dict[Address, float] = {}
        self._tried: dict[Address, float] = {}
        self.forked()

    def forked(self) -> None:
        """In a child: locks may be held by threads, and the thread may be one, that it does not have."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def begin(self, address: Address) -> None:
        """Resolve a name that will be used; where it is new, wait up to START_S for it."""
        new = address not in self._found and address not in self._due
        self.of(address)
        if new:
            with self._changed:
                self._changed.wait_for(lambda: address in self._found, START_S)

    def of(self, address: Address) -> tuple[Resolved, ...] | None:
        """What is known of a name now, without waiting: None where there was no answer yet, none where it has none."""
        if not address[0]:
            return ()
        if _numeric(address[0]):
            if address not in self._found:
                self._found[address] = _resolved(address, socket.AI_NUMERICHOST | socket.AI_NUMERICSERV)
            return self._found[address]
        with self._changed:
            if address not in self._due:
                self._due[address] = 0.0
                self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._renew, name="memory-names", daemon=True)
                self._thread.start()
            return self._found.get(address)

    def doubt(self, address: Address) -> None:
        """Resolve a name anew: a connection failed."""
        with self._changed:
            if address in self._due:
                again = self._tried.get(address, 0.0) + AGAIN_S
                self._due[address] = min(self._due[address], again)
                self._changed.notify_all()

    def forget(self) -> None:
        """All names; the thread ends."""
        with self._changed:
            for known in (self._due, self._tried, self._found):
                known.clear()
            self._changed.notify_all()

    def _renew(self) -> None:
        while True:
            with self._changed:
                if not self._due:
                    self._thread = None
                    return
                address = min(self._due, key=lambda one: self._due[one])
                if (left := self._due[address] - time.monotonic()) > 0:
                    self._changed.wait(left)
                    continue
            found = _resolved(address)
            with self._changed:
                if address not in self._due:
                    continue
                now = self._tried[address] = time.monotonic()
                self._due[address] = now + (self._renew_every_s if found else AGAIN_S)
                self._found[address] = found or self._found.get(address, ())
                self._changed.notify_all()


def _numeric(host: str) -> bool:
    """Whether no resolver is needed."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _resolved(address: Address, flags: int = 0) -> tuple[Resolved, ...]:
    """By the system, in its own time; none where it has none, whatever it says why."""
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=flags)
    except (OSError, ValueError, OverflowError):
        return ()
    return tuple(Resolved(family, where) for family, _, _, _, where in found)


NAMES = Names()
"""this process's"""
os.register_at_fork(after_in_child=NAMES.forked)
