"""The events a codebook may learn from: those of the training period, and nothing after it.

A user's training events end where her first request of another split begins, and at the last training request of all
users, whichever comes first. So neither a split by time nor one by each user's last requests lets a later event in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from features.dataset import Dataset
from features.semantic_ids.errors import SidsError
from features.views import Ints, Lists, Partition, ranges


def training_histories(dataset: Dataset, most_events: int) -> Iterator[Lists]:
    """Items of each user's training events, oldest first, one user a row; one piece a partition.

    Users lie in partitions by hash, so that the first partitions are a fair sample.

    Args:
        most_events: stop after the partition that reaches so many.

    Raises:
        SidsError: the dataset has no training requests, which say where training ends.
    """
    manifest = dataset.manifest
    if "train" not in manifest.filled_splits():
        raise SidsError(f"{dataset.root}: no training requests, so no end of training; prepare a training split")
    read = 0
    for number, info in enumerate(manifest.partitions):
        if read >= most_events:
            return
        partition = Partition(dataset, number)
        items = partition.histories.lists("item")
        end = _in_time(partition.event("time"), items.offsets, manifest.splits["train"].last_ms)
        row, history_end = partition.requests.flat("row"), partition.requests.flat("history_end")
        for split, (first, last) in info.requests.items():
            if split != "train":
                np.minimum.at(end, row[first:last], history_end[first:last])
        offsets = np.concatenate([[0], end.cumsum()])
        read += int(offsets[-1])
        yield Lists(items.values[ranges(items.offsets[:-1], end)], offsets)


def _in_time(time: Ints, offsets: Ints, last_ms: int) -> Ints:
    """Events of each row not after `last_ms`, `[rows]`; rows are sorted by time."""
    before = np.concatenate([[0], (time <= last_ms).cumsum()])
    return before[offsets[1:]] - before[offsets[:-1]]
