"""The request that a picture shows: which one, its history and candidates as the ranker embeds them, its item ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from features.batch import RequestBatch, names
from features.dataset import Dataset
from features.schema import Split
from features.selection import FeatureSpec
from features.views import Array, Ints, Partition, item_file
from ranker.longseq import History, Target
from ranker.model import Ranker, plain_of

EVENTS = 1_000
"""the length of history that is looked for: long, and each event still has a place of its own in a picture"""
GROUPS = 4
"""the groups (semantic IDs) of candidates that are looked for"""


class Shown(NamedTuple):
    """Request `number` of a split, alone in a batch.

    history, target: as :meth:`ranker.model.Dense.sequences` makes them.
    codes: names of the codes' columns; the reserved 0 is "none" in all of them.
    user: its id; item: `[N]` ids of the candidates; clicked: `[N]`.
    """

    dataset: Dataset
    split: Split
    number: int
    history: History
    target: Target
    codes: list[str]
    user: object
    item: list[object]
    clicked: list[bool]

    @property
    def title(self) -> str:
        """What every picture says of its request."""
        return f"request {self.number:,} of {self.split}, user {self.user}"

    def values(self, column: int, codes: Tensor) -> list[str]:
        """What codes of a column stand for."""
        return [str(value) for value in self.dataset.values_of(self.codes[column], codes.numpy())]


def choose(dataset: Dataset, split: Split, feature: str) -> int:
    """The request to show where none is named: of those whose candidates are of GROUPS groups or more (or of as many
    as any are of), the first whose history is nearest to EVENTS in length.

    Args:
        feature: the candidates' group, `item` or a column of the item table.
    """
    parts = list(_counts(dataset, split, feature))
    groups, events = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    several = groups >= min(GROUPS, int(groups.max(initial=0)))
    return int(np.where(several, np.abs(events - EVENTS), np.iinfo(np.int64).max).argmin())


def _counts(dataset: Dataset, split: Split, feature: str) -> Iterator[tuple[Ints, Ints]]:
    """Groups of the candidates and events of the history of each request of a split, partition by partition."""
    group = None if feature == "item" else item_file(dataset).flat(feature)
    for index, info in enumerate(dataset.manifest.partitions):
        begin, end = info.requests.get(split, (0, 0))
        requests = Partition(dataset, index).requests
        item, candidates = requests.lists("items").rows(np.arange(begin, end))
        of_item = item if group is None else group[item]
        yield _distinct(of_item, candidates), requests.flat("history_end")[begin:end].astype(np.int64)


def _distinct(values: Array, lengths: Ints) -> Ints:
    """How many distinct values each of the lists of these lengths has.

    >>> _distinct(np.array([3, 5, 3, 7]), np.array([3, 0, 1])).tolist()
    [2, 0, 1]
    """
    of_list = np.repeat(np.arange(lengths.size), lengths)
    pairs = np.unique(np.stack([of_list, values.astype(np.int64)]), axis=1)
    return np.bincount(pairs[0], minlength=lengths.size)


@torch.no_grad()
def show(ranker: Ranker, batch: RequestBatch, spec: FeatureSpec, dataset: Dataset, split: Split, number: int) -> Shown:
    """Embed a batch of one request."""
    embedded = ranker.tables(batch.request, batch.candidate, batch.sequence)
    history, target = ranker.dense.sequences(embedded, plain_of(batch))
    return Shown(
        dataset, split, number, history, target, names(spec.codes),
        user=dataset.values_of("user", batch.user.numpy())[0],
        item=dataset.values_of("item", batch.item.numpy()).tolist(),
        clicked=(batch.labels[:, 0] > 0).tolist(),
    )  # fmt: skip
