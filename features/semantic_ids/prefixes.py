"""The path of a semantic ID as a bag of its prefixes: (c₁), (c₁, c₂), … each one row of a table of any size.

Items that agree in their first codes share the rows of those prefixes, so that an item that was never seen starts from
what its neighbours have learned. Where the table has a row for every possible prefix each has its own; else they are
hashed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from features.semantic_ids.errors import SidsError

Words = npt.NDArray[np.uint64]


class Prefixes:
    """Rows of prefixes in a table of `buckets` rows at most; row 0 is reserved for items without content.

    >>> Prefixes([2, 2], buckets=100).rows(np.array([[0, 0], [1, 0], [1, 1]]))
    array([[1, 3],
           [2, 5],
           [2, 6]])
    """

    def __init__(self, levels: list[int], buckets: int) -> None:
        self._levels = levels
        counts = [1]
        for codes in levels:
            counts.append(counts[-1] * codes)
        self._offsets = [1 + sum(counts[1 : level + 1]) for level in range(len(levels))]
        every = 1 + sum(counts[1:])
        self.hashed = every > buckets
        self.size = buckets if self.hashed else every
        """rows of the table, including row 0"""

    def rows(self, codes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Codes `[n, M]`, counted from 0, to rows `[n, M]`, prefix by prefix."""
        rows = np.empty(codes.shape, np.int64)
        number = np.zeros(len(codes), np.uint64)
        for level, size in enumerate(self._levels):
            code = codes[:, level].astype(np.uint64)
            if self.hashed:
                number = _mix(number ^ _mix(code + np.uint64(level + 1 << 32)))
                rows[:, level] = 1 + (number % np.uint64(self.size - 1)).astype(np.int64)
            else:
                number = number * np.uint64(size) + code
                rows[:, level] = self._offsets[level] + number.astype(np.int64)
        return rows

    def rows_in(self, older: Prefixes, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The row in a table of an older codebook, which these levels grew from, of each of `rows` here: -1 for a
        prefix with a code that the older one has not. Hashed rows are shared by prefixes old and new.

        Raises:
            SidsError: the tables are not hashed alike: rows of one are no rows of the other.

        >>> Prefixes([2, 3], 100).rows_in(Prefixes([2, 2], 100), np.arange(9))
        array([ 0,  1,  2,  3,  4, -1,  5,  6, -1])
        """
        if len(self._levels) != len(older._levels) or ((self.hashed or older.hashed) and self.size != older.size):
            raise SidsError(
                f"prefixes of {self._levels} in {self.size:,} rows, {'' if self.hashed else 'not '}hashed, have no "
                f"rows in a table of {older._levels} in {older.size:,}, {'' if older.hashed else 'not '}hashed; keep "
                "path_buckets, or start that table anew"
            )
        if self.hashed and older.hashed:
            return rows.copy()
        found = np.where(rows == 0, 0, -1)
        for level, first in enumerate(self._offsets):
            sizes, before = self._levels[: level + 1], older._levels[: level + 1]
            here = (rows >= first) & (rows < first + math.prod(sizes))
            number, old, place, known = rows[here] - first, np.zeros(here.sum(), np.int64), 1, np.ones(here.sum(), bool)
            for size, old_size in zip(reversed(sizes), reversed(before), strict=True):
                number, code = np.divmod(number, size)
                known &= code < old_size
                old += code * place
                place *= old_size
            found[here] = np.where(known, older._offsets[level] + old, -1)
        return found


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser (Steele et al. 2014): neighbouring numbers to unrelated ones; the same on any machine."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
