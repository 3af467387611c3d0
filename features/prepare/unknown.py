"""How many ids a vocabulary lacks, row by row of the tables they come from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.schema import ColumnConfig

Ints = npt.NDArray[np.int64]


class IdCounts(NamedTuple):
    """Of each row: ids outside the vocabulary, and all ids. Null is no id. `[rows]`"""

    unknown: Ints
    ids: Ints

    def of(self, rows: npt.NDArray[np.integer]) -> IdCounts:
        """Those of some rows."""
        return IdCounts(self.unknown[rows], self.ids[rows])

    def summed(self, bounds: Ints) -> IdCounts:
        """Sums over the rows ``bounds[i]:bounds[i + 1]``."""
        return IdCounts(_sums(self.unknown, bounds), _sums(self.ids, bounds))

    def total(self, rows: slice) -> tuple[int, int]:
        """Sums over some rows."""
        return int(self.unknown[rows].sum()), int(self.ids[rows].sum())


def has_vocabulary(config: ColumnConfig) -> bool:
    """Whether a column's values are looked up, and may be missing there."""
    return config.kind in ("categorical", "bag") and config.edges is None and config.hash_buckets is None


def count(values: pa.Array, encoded: pa.Array) -> IdCounts:
    """From a column's values and what :func:`features.prepare.encode.encode` made of them."""
    if not pa.types.is_list(encoded.type):
        return _count(values, encoded)
    return _count(values.flatten(), encoded.flatten()).summed(encoded.offsets.to_numpy().astype(np.int64))


def above(ids: npt.NDArray[np.integer], known: int) -> IdCounts:
    """Of dense indices, of which `known` and larger ones are unknown."""
    return IdCounts((ids >= known).astype(np.int64), np.ones(len(ids), np.int64))


def _count(values: pa.Array, encoded: pa.Array) -> IdCounts:
    is_id = values.is_valid().to_numpy(zero_copy_only=False)
    missed = is_id & (encoded.to_numpy() == 0)
    return IdCounts(missed.astype(np.int64), is_id.astype(np.int64))


def _sums(counts: Ints, bounds: Ints) -> Ints:
    until = np.concatenate([[0], np.cumsum(counts)])[bounds]
    return until[1:] - until[:-1]
