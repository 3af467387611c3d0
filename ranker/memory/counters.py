"""What a reader of memories counts, under names that Prometheus takes as they are."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from ranker.memory.decode import Outcomes
from ranker.memory.keys import I64
from ranker.memory.store import Reason

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
"""upper edges of the histogram of reads' times"""
_HOUR, _DAY = 3_600, 86_400
AGES = (_HOUR, 3 * _HOUR, 6 * _HOUR, 12 * _HOUR, _DAY, 2 * _DAY, 3 * _DAY, 7 * _DAY, 14 * _DAY, 30 * _DAY, 90 * _DAY)
"""upper edges of the histogram of records' ages, in seconds"""
_AGES_MS = [1_000 * edge for edge in AGES]


class Read(NamedTuple):
    """What became of a read: outcomes by block, with how many records could not be looked up; why they could not; of
    those found the times whose histories they hold, in milliseconds; the generation that was read."""

    outcomes: dict[int, tuple[Outcomes, int]]
    reason: Reason = ""
    as_of: Sequence[I64] = ()
    generation: str | None = None


class MemoryCounters:
    """Sums since the start, for many threads.

    ranker_memory_reads_total                            reads
    ranker_memory_errors_total                           of them those that ended in an exception of this program
    ranker_memory_failures_total{reason="…"}             of them those that lost records because of the store
    ranker_memory_records_total{block="…",outcome="…"}   records; outcomes as of `Outcomes`, and `unavailable`
    ranker_memory_read_seconds_bucket{le="…"}, _sum, _count
    ranker_memory_age_seconds_bucket{le="…"}, _sum, _count
                                                         records found, by how long before the read the history that
                                                         they hold was cut; 0 where that lies ahead
    ranker_memory_generation_info{generation="…"}        1 for the generation that is read; none where there is none
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads = self._errors = 0
        self._seconds = self._age_seconds = 0.0
        self._records: Counter[tuple[int, str]] = Counter()
        self._failures: Counter[str] = Counter()
        self._histogram = [0] * (len(SECONDS) + 1)
        self._ages = [0] * (len(AGES) + 1)
        self._generation: str | None = None

    def read(self, seconds: float, read: Read) -> None:
        """Count a read that took so long."""
        now_ms = time.time_ns() // 1_000_000
        aged = [_ages_of(times, now_ms) for times in read.as_of if len(times)]
        with self._lock:
            self._timed(seconds)
            for block, (of_block, unavailable) in read.outcomes.items():
                for outcome, count in zip(Outcomes._fields, of_block, strict=True):
                    if count:
                        self._records[block, outcome] += count
                if unavailable:
                    self._records[block, "unavailable"] += unavailable
            if read.reason:
                self._failures[read.reason] += 1
            for counts, age_seconds in aged:
                for bucket, count in counts:
                    self._ages[bucket] += count
                self._age_seconds += age_seconds
            self._generation = read.generation

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
            generation = [] if self._generation is None else [_label(self._generation)]
            return {
                "ranker_memory_reads_total": self._reads,
                "ranker_memory_errors_total": self._errors,
                **{f'ranker_memory_failures_total{{reason="{reason}"}}': n for reason, n in self._failures.items()},
                **{
                    f'ranker_memory_records_total{{block="{block}",outcome="{outcome}"}}': n
                    for (block, outcome), n in sorted(self._records.items())
                },
                **_histogram("ranker_memory_read_seconds", SECONDS, self._histogram, self._seconds),
                **_histogram("ranker_memory_age_seconds", AGES, self._ages, self._age_seconds),
                **{f'ranker_memory_generation_info{{generation="{name}"}}': 1 for name in generation},
            }


def _ages_of(times: I64, now_ms: int) -> tuple[list[tuple[int, int]], float]:
    """How many ages of records fall into which bucket, and their sum in seconds; most often all are of one time."""
    raw = times.tobytes()
    if raw == raw[:8] * len(times):
        age_ms = max(now_ms - int(times[0]), 0)
        return [(bisect_left(_AGES_MS, age_ms), len(times))], len(times) * age_ms / 1_000
    ages_ms = np.maximum(now_ms - times, 0)
    counts = np.bincount(np.searchsorted(_AGES_MS, ages_ms))
    return [(bucket, n) for bucket, n in enumerate(counts.tolist()) if n], float(ages_ms.sum(dtype=np.float64)) / 1_000


def _histogram(name: str, edges: Sequence[float], counts: Sequence[int], total: float) -> dict[str, float]:
    """As Prometheus has it: each bucket with all below it."""
    below = list(accumulate(counts))
    buckets = {f'{name}_bucket{{le="{edge}"}}': n for edge, n in zip((*edges, "+Inf"), below, strict=True)}
    return {**buckets, f"{name}_sum": total, f"{name}_count": below[-1]}


def _label(value: str) -> str:
    """A label's value: what a store says is its name may be anything."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
