"""Who writes a generation, when only one may: a lease that its holder gives back, or loses with its life.

In a folder it is a lock of the system's on a file of the generation, which ends with the process; in Redis a key that
expires unless its holder, by a thread, renews it (:mod:`ranker.memory.redis_lease`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from ranker.memory.store import StoreError

FILE = "lease"
_held: set[tuple[int, str]] = set()
"""process and file of leases: the system's locks tell processes apart, not the threads of one"""
_holding = threading.Lock()


class LeaseHeldError(StoreError):
    """Another has the lease; ends_in_s: when it ends at the latest, unless its holder lives and renews it."""

    def __init__(self, told: str, ends_in_s: float = 0.0) -> None:
        super().__init__(told)
        self.ends_in_s = ends_in_s


class Lease(Protocol):
    """What its holder has."""

    def check(self) -> None:
        """Raise StoreError where the lease is no longer its holder's; call it before writing."""
        ...


def holder() -> str:
    """This process, for those who are refused."""
    return f"process {os.getpid()} of {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())}"


class FileLease:
    """A lock on the open file `descriptor`."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path, self._process = descriptor, path, os.getpid()

    def check(self) -> None:
        """The system keeps the lock; but it is on a file that may have been removed with its generation."""
        mine = os.fstat(self._descriptor)
        try:
            there = self._path.stat()
        except FileNotFoundError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (mine.st_dev, mine.st_ino):
            raise StoreError(f"{self._path.parent}: was dropped or replaced while it was written; build it again")
        if os.getpid() != self._process:
            raise StoreError(f"{self._path}: is held by the process that this one was forked from, which must write")


@contextmanager
def file_lease(folder: Path, remedy: str) -> Generator[FileLease]:
    """Hold the lease of the generation in `folder`, which is made where it is not there.

    Raises:
        LeaseHeldError: another process, or another thread of this one, holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    key = (os.getpid(), str(folder.resolve()))
    with _holding:
        if key in _held:
            raise LeaseHeldError(f"{folder}: this process writes it already; {remedy}")
        _held.add(key)
    try:
        # not inherited by programs that this one starts; a closed descriptor would take the lock with it
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                who = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
                raise LeaseHeldError(f"{folder}: is being written by {who}; {remedy}") from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{holder()}\n".encode(), 0)
            lease = FileLease(descriptor, path)
            lease.check()
            yield lease
        finally:
            os.close(descriptor)
    finally:
        with _holding:
            _held.discard(key)
