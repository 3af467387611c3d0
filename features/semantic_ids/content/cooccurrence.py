"""How often items lie near one another in the histories of the training period, counted in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from features.dataset import Dataset
from features.semantic_ids.training_events import training_histories
from features.views import Ints, Lists

PAIRS = 1 << 22
"""Pairs held at a time before they are added up, about 50 bytes each."""
Places = npt.NDArray[np.int32]


def item_counts(dataset: Dataset, events: int) -> Ints:
    """Training events of each dense item index, `[items]`.

    Args:
        events: about so many events are read, see :func:`training_histories`.
    """
    counts = np.zeros(dataset.manifest.items, np.int64)
    for histories in training_histories(dataset, events):
        counts += np.bincount(histories.values, minlength=len(counts))
    return counts


def pair_counts(
    dataset: Dataset, events: int, window: int, rows: Places, columns: Places, contexts: int
) -> sp.csr_matrix:
    """How often an item and a context are two events of one user at most `window` apart, either one first.

    An item is no company to itself: pairs of the same item do not count.

    Args:
        rows: row of each dense item index, or -1 for items that are not counted, `[items]`.
        columns: column of each dense item index, below `contexts`, or -1 for items that are no context, `[items]`.

    Returns:
        `[1 + rows.max(), contexts]` counts, int32.
    """
    total = sp.csr_matrix((int(rows.max()) + 1, contexts), dtype=np.int32)
    for histories in training_histories(dataset, events):
        for one, other in near(histories, window):
            row, column = rows[one], columns[other]
            counted = (row >= 0) & (column >= 0) & (one != other)
            ones = np.ones(int(counted.sum()), np.int32)
            total = total + sp.csr_matrix((ones, (row[counted], column[counted])), shape=total.shape)
    return sp.csr_matrix(total)


def near(histories: Lists, window: int) -> Iterator[tuple[Ints, Ints]]:
    """Both orders of all pairs of items at most `window` events apart in one history, at most PAIRS at a time."""
    items = histories.values
    history = np.repeat(np.arange(len(histories.offsets) - 1), np.diff(histories.offsets))
    step = max(1, PAIRS // (2 * window))
    for first in range(0, items.size, step):
        last = min(first + step, items.size)
        one: list[Ints] = []
        other: list[Ints] = []
        for apart in range(1, window + 1):
            end = min(last, items.size - apart)
            if end <= first:
                break
            left, right = slice(first, end), slice(first + apart, end + apart)
            together = history[left] == history[right]
            if not together.any():
                break  # no history in reach is longer
            one.append(items[left][together])
            other.append(items[right][together])
        if one:
            before, after = np.concatenate(one), np.concatenate(other)
            yield np.concatenate([before, after]), np.concatenate([after, before])
