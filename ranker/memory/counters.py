"""What a reader of memories counts, under names that Prometheus takes as they are."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter

from ranker.memory.decode import Outcomes
from ranker.memory.store import Reason

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""upper edges of the histogram of reads' times"""


class MemoryCounters:
    """Sums since the start, for many threads.

    ranker_memory_reads_total                            reads
    ranker_memory_errors_total                           of them those that ended in an exception of this program
    ranker_memory_failures_total{reason="…"}             of them those that lost records because of the store
    ranker_memory_records_total{block="…",outcome="…"}   records; outcomes as of `Outcomes`, and `unavailable`
    ranker_memory_read_seconds_bucket{le="…"}, _sum, _count
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads = self._errors = 0
        self._seconds = 0.0
        self._records: Counter[tuple[int, str]] = Counter()
        self._failures: Counter[str] = Counter()
        self._histogram = [0] * (len(SECONDS) + 1)

    def read(self, seconds: float, outcomes: dict[int, tuple[Outcomes, int]], reason: Reason = "") -> None:
        """Count a read.

        Args:
            outcomes: by block, with how many records could not be looked up.
            reason: why they could not.
        """
        with self._lock:
            self._timed(seconds)
            for block, (of_block, unavailable) in outcomes.items():
                for outcome, count in zip(Outcomes._fields, of_block, strict=True):
                    if count:
                        self._records[block, outcome] += count
                if unavailable:
                    self._records[block, "unavailable"] += unavailable
            if reason:
                self._failures[reason] += 1

    def error(self, seconds: float, unavailable: dict[int, int]) -> bool:
        """Count a read that ended in an exception; whether it is the first."""
        with self._lock:
            self._timed(seconds)
            self._errors += 1
            for block, count in unavailable.items():
                self._records[block, "unavailable"] += count
            return self._errors == 1

    def _timed(self, seconds: float) -> None:
        self._reads += 1
        self._seconds += seconds
        self._histogram[bisect_left(SECONDS, seconds)] += 1

    def records(self, outcome: str) -> int:
        """Of all blocks."""
        with self._lock:
            return sum(count for (_, of), count in self._records.items() if of == outcome)

    def snapshot(self) -> dict[str, float]:
        """All counters at one moment, by name."""
        with self._lock:
            below = [sum(self._histogram[: i + 1]) for i in range(len(self._histogram))]
            edges = (*map(str, SECONDS), "+Inf")
            return {
                "ranker_memory_reads_total": self._reads,
                "ranker_memory_errors_total": self._errors,
                **{f'ranker_memory_failures_total{{reason="{reason}"}}': n for reason, n in self._failures.items()},
                **{
                    f'ranker_memory_records_total{{block="{block}",outcome="{outcome}"}}': n
                    for (block, outcome), n in sorted(self._records.items())
                },
                **{
                    f'ranker_memory_read_seconds_bucket{{le="{edge}"}}': n for edge, n in zip(edges, below, strict=True)
                },
                "ranker_memory_read_seconds_sum": self._seconds,
                "ranker_memory_read_seconds_count": self._reads,
            }
