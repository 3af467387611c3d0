"""The lease of a job on the generation that it writes: its first rank has it for all of them.

Whoever starts a killed job again meets the lease that it left behind, which in Redis ends by itself: he waits for that
end, unless the holder shows by renewing it that he lives.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from features.progress import log
from ranker.memory.lease import Lease, LeaseHeldError
from ranker.memory.store import MemoryStore
from ranker.ranks import Ranks

LEASE_S = 60.0
"""for which a holder may be stalled"""
ENDING_S = 3.0
"""that a killed process may take to end"""
_AGAIN_S = 0.25


class JobLease:
    """The lease that a job's first rank has; `lease` is None on the others."""

    def __init__(self, ranks: Ranks, lease: Lease | None) -> None:
        self._ranks, self._lease = ranks, lease

    def check(self) -> None:
        """To be called by all ranks before they write.

        Raises:
            UserError: the lease is lost; on every rank.
        """
        self._ranks.agree(self.check_alone)

    def check_alone(self) -> None:
        """The same for the first rank when the others have ended."""
        assert self._lease is not None
        self._lease.check()


def leased(store: MemoryStore, name: str, ranks: Ranks, held: ExitStack) -> JobLease:
    """Take the lease of a generation, which need not be there yet, until `held` ends. Every rank calls it.

    Raises:
        UserError: another job that lives has it; on every rank.
    """
    taken: list[Lease] = []
    ranks.agree(lambda: taken.append(_taken(store, name, held)))
    return JobLease(ranks, taken[0] if taken else None)


def _taken(store: MemoryStore, name: str, held: ExitStack) -> Lease:
    """The lease; a former holder's, if he is gone, is waited for.

    Raises:
        LeaseHeldError: its holder has renewed it, or has not lost it in time.
    """
    until = left = None
    while True:
        try:
            return held.enter_context(store.lease(name, LEASE_S))
        except LeaseHeldError as error:
            now = time.monotonic()
            if until is None:
                until = now + max(error.ends_in_s, ENDING_S) + 1
                log(f"{error}; waiting for {until - now:.0f} s at most")
            if now > until or (left is not None and error.ends_in_s > left):
                raise
            left = error.ends_in_s
        time.sleep(_AGAIN_S)
