"""The order of an epoch: a pure function of (seed, epoch), so that a position is (epoch, step) and resuming is exact.

In each partition the groups of a user's consecutive requests are permuted and cut into batches; the batches of a
shard's partitions are permuted among one another. Users are spread over partitions by hash, so that the batches of one
partition are a random sample of users.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from features.views import Array, Ints, ranges


class Draw(IntEnum):
    """What random numbers are drawn for; each purpose has a stream of its own."""

    BATCHES = 0
    REQUESTS = 1
    IDS = 2


def generator(seed: int, epoch: int, draw: Draw, index: int, step: int = 0) -> np.random.Generator:
    """The stream of one purpose, of one shard or partition."""
    return np.random.default_rng((seed, epoch, draw, index, step))


class Slot(NamedTuple):
    """One batch: number `batch` of the `batches` of `partition`."""

    partition: int
    batch: int
    batches: int

    def of(self, order: Ints) -> Ints:
        """The batch's share of the partition's requests."""
        return order[order.size * self.batch // self.batches : order.size * (self.batch + 1) // self.batches]


def batch_count(requests: int, size: int) -> int:
    """Batches of at most `size` into which a partition's requests are cut evenly."""
    return -(-requests // size)


def schedule(partitions: Sequence[int], batches: Sequence[int], rng: np.random.Generator | None) -> Ints:
    """The batches of one shard in order, `[steps, 3]`, a row a :class:`Slot`; in file order without `rng`."""
    each = np.asarray(batches, np.int64)
    slots = np.empty((each.sum(), 3), np.int64)
    slots[:, 0] = np.repeat(np.asarray(partitions, np.int64), each)
    slots[:, 1] = ranges(np.zeros_like(each), each)
    slots[:, 2] = np.repeat(each, each)
    return slots if rng is None else slots[rng.permutation(len(slots))]


def shuffled(requests: Ints, row: Array, group: int, rng: np.random.Generator) -> Ints:
    """`requests` permuted, up to `group` neighbours of one history row staying together.

    Args:
        row: `[R]` history row of each of `requests`.
    """
    new_row = np.flatnonzero(np.diff(row, prepend=-1))
    in_row = np.arange(requests.size) - np.repeat(new_row, np.diff(new_row, append=requests.size))
    first = np.flatnonzero(in_row % group == 0)
    lengths = np.diff(first, append=requests.size)
    order = rng.permutation(first.size)
    return requests[ranges(first[order], lengths[order])]
