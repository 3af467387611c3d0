"""A lease in Redis: a key with its holder's token that expires, and that a thread renews while it is held.

A holder that was stalled for longer than the key lives has lost it, and another may have it: :meth:`RedisLease.check`
asks the server, and so tells. Between the answer and a write that follows it there is no more than that write's time.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from features.progress import log
from ranker.memory.lease import LeaseHeldError, holder
from ranker.memory.store import StoreError

_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"
Connected = Callable[[], AbstractContextManager[Any]]
"""gives redis-py's client, and raises StoreError for what goes wrong with it"""


class RedisLease:
    """The key `key` with the value `value`."""

    def __init__(self, connected: Connected, key: str, value: str, seconds: float, what: str) -> None:
        self._connected, self._key, self._value, self._seconds, self._what = connected, key, value, seconds, what
        self._lost = False

    def check(self) -> None:
        """Renew it now."""
        if not self._lost:
            with self._connected() as client:
                self._lost = not client.eval(_RENEW, 1, self._key, self._value, round(self._seconds * 1000))
        if self._lost:
            raise StoreError(
                f"{self._what}: this process did not renew its lease for {self._seconds:g} s, and another may write "
                "now; start the command again"
            )

    def keep(self, stop: threading.Event) -> None:
        """Renew it until `stop`; a server that does not answer is asked again, and `check` tells what came of it."""
        while not stop.wait(self._seconds / 4):
            try:
                self.check()
            except StoreError as error:
                if self._lost:
                    return
                log(f"{self._what}: the lease was not renewed ({error}); trying again")

    def release(self) -> None:
        """Give it back, if it is still held; a server that does not answer lets it expire."""
        try:
            with self._connected() as client:
                client.eval(_RELEASE, 1, self._key, self._value)
        except StoreError as error:
            log(f"{self._what}: the lease was not given back ({error}); it ends in {self._seconds:g} s")


@contextmanager
def redis_lease(connected: Connected, key: str, seconds: float, what: str, remedy: str) -> Generator[RedisLease]:
    """Hold the lease `key` of `what`.

    Raises:
        LeaseHeldError: another holds it.
        StoreError: the server does not answer.
    """
    value = f"{secrets.token_hex(16)} {holder()}"
    with connected() as client:
        taken = client.set(key, value, nx=True, px=round(seconds * 1000))
        if not taken and (held := client.get(key)) != value.encode():  # else the first of two tries took it
            who = (held or b"").decode(errors="replace").partition(" ")[2] or "another process"
            left = max(client.pttl(key), 0) / 1000
            raise LeaseHeldError(
                f"{what}: is being written by {who}; {remedy}. A lease of one that is gone ends in {left:.0f} s", left
            )
    lease, stop = RedisLease(connected, key, value, seconds, what), threading.Event()
    thread = threading.Thread(target=lease.keep, args=(stop,), name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        lease.release()
