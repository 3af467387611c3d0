"""Do items that share codes share more: neighbours, categories, company? Each share stands beside chance.

Symbols: :mod:`features.semantic_ids.report`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from features.semantic_ids.quantizers.protocol import Codes, Floats
from features.semantic_ids.report.figures import ColumnAgreement, Cooccurrence, NeighbourAgreement, PrefixAgreement
from features.views import Ints, Lists

AMI_ITEMS = 10_000
"""mutual information is adjusted for chance on so many items: the time grows with codes times categories"""
_BLOCK = 1 << 20
"""events, and distances, that are worked on at a time"""


def prefixes(codes: Codes) -> Ints:
    """A number for each prefix: rows of `[n, M]` agree in column l if their first l + 1 codes do.

    Rows with a negative code, items that have none, are -1 throughout.

    >>> prefixes(np.array([[3, 1], [3, 2], [-1, -1], [0, 1]], np.int32)).tolist()
    [[1, 1], [1, 2], [-1, -1], [0, 0]]
    """
    out = np.full(codes.shape, -1, np.int64)
    coded = (codes >= 0).all(1)
    number = np.zeros(int(coded.sum()), np.int64)
    for level in range(codes.shape[1]):
        own = codes[coded, level].astype(np.int64)
        _, number = np.unique(number * (own.max(initial=0) + 1) + own, return_inverse=True)
        out[coded, level] = number
    return out


def draw_sample(items: int, most: int, seed: int) -> Ints:
    """`most` of the rows 0 … `items` - 1, or all if there are no more; ascending."""
    if items <= most:
        return np.arange(items)
    return np.sort(np.random.default_rng(seed).choice(items, most, replace=False))


def neighbour_agreement(codes: Codes, vectors: Floats, neighbours: int, items_in_all: int) -> NeighbourAgreement:
    """How many of an item's nearest neighbours share its codes; exact among the rows given.

    Args:
        codes: `[s, M]`.
        vectors: `[s, d]`.
        neighbours: of each item, itself not among them; fewer where there are fewer items.
        items_in_all: from which the s items were drawn.
    """
    numbers, count = prefixes(codes), len(codes)
    k = min(neighbours, count - 1)
    same = np.zeros(codes.shape[1], np.int64)
    for first, near in _nearest(vectors.astype(np.float64), k):
        rows = slice(first, first + len(near))
        same += (numbers[near] == numbers[rows, None]).sum((0, 1))
    return NeighbourAgreement(
        neighbours=max(0, k),
        items=count,
        items_in_all=items_in_all,
        prefixes=_agreements(
            [_ratio(hits, k * count) for hits in same.tolist()],
            [_same_pairs_share(np.bincount(column)) for column in numbers.T],
        ),
    )


def _nearest(vectors: npt.NDArray[np.float64], k: int) -> Iterator[tuple[int, Ints]]:
    """First row of a block and its `[rows, k]` nearest other rows, block by block."""
    if k < 1:
        return
    vectors = vectors - vectors.mean(0)  # the expanded square below loses least near the origin
    squares = np.square(vectors).sum(1)
    step = max(1, 4 * _BLOCK // len(vectors))
    for first in range(0, len(vectors), step):
        block = vectors[first : first + step]
        distances = squares - 2 * block @ vectors.T  # + ‖block‖², the same for a whole row
        distances[np.arange(len(block)), np.arange(first, first + len(block))] = np.inf
        yield first, np.argpartition(distances, k - 1, axis=1)[:, :k]


def column_agreement(column: str, codes: Codes, categories: npt.NDArray[Any], seed: int) -> ColumnAgreement:
    """How far prefixes and the values of a categorical column say the same of an item.

    Args:
        codes: `[n, M]`; rows with a negative code are no items.
        categories: `[n]`; 0 is unknown, such items are left out and counted.
    """
    coded = (codes >= 0).all(1)
    known = coded & (categories != 0)
    numbers, labels = prefixes(codes[known]), np.unique(categories[known], return_inverse=True)[1]
    chance = _same_pairs_share(np.bincount(labels))
    drawn = draw_sample(len(labels), AMI_ITEMS, seed)
    return ColumnAgreement(
        column=column,
        items=len(labels),
        unknown=int(coded.sum() - known.sum()),
        prefixes=_agreements([_share_within(number, labels) for number in numbers.T], [chance] * codes.shape[1]),
        ami=[_ami(number[drawn], labels[drawn]) for number in numbers.T],
        ami_items=len(drawn),
    )


def _share_within(groups: Ints, labels: Ints) -> float | None:
    """Of the pairs of one group, those with the same label: counts of the filled cells of the contingency table."""
    _, cells = np.unique(groups * (labels.max(initial=0) + 1) + labels, return_counts=True)
    return _ratio(_pairs(cells), _pairs(np.bincount(groups)))


def _ami(groups: Ints, labels: Ints) -> float:
    from sklearn.metrics import adjusted_mutual_info_score

    if not len(labels):
        return 0.0
    with warnings.catch_warnings():  # of labels that look continuous because nearly every item has its own
        warnings.simplefilter("ignore", UserWarning)
        return float(adjusted_mutual_info_score(labels, groups))


def cooccurrence(histories: Iterable[Lists], codes: Codes, window: int) -> Cooccurrence:
    """How often items near one another in training histories share codes.

    Args:
        histories: items of each user's events in order, piece by piece
            (:func:`features.semantic_ids.training_events.training_histories`).
        codes: `[items, M]`, a row for each row of the item table, negative where an item has none.
        window: two events are a pair if at most so many apart.
    """
    numbers = prefixes(codes)
    events, pairs = np.zeros(len(codes), np.int64), 0
    same = np.zeros(codes.shape[1], np.int64)
    for items, user in _blocks(histories):
        events += np.bincount(items, minlength=len(codes))
        for apart in range(1, window + 1):
            one, other = items[:-apart], items[apart:]
            counted = (user[:-apart] == user[apart:]) & (one != other) & (codes[one, 0] >= 0) & (codes[other, 0] >= 0)
            one, other = one[counted], other[counted]
            pairs += one.size
            same += (numbers[one] == numbers[other]).sum(0)
    coded = numbers[:, 0] >= 0
    weights = events[coded].astype(np.float64)
    return Cooccurrence(
        window=window,
        events=int(events.sum()),
        events_without_code=int(events[~coded].sum()),
        items_without_code=int((events[~coded] > 0).sum()),
        pairs=pairs,
        prefixes=_agreements(
            [_ratio(hits, pairs) for hits in same.tolist()],
            [_drawn_share(number, weights) for number in numbers[coded].T],
        ),
    )


def _blocks(histories: Iterable[Lists]) -> Iterator[tuple[Ints, Ints]]:
    """Items and the row of each, some whole rows at a time: up to `_BLOCK` events, or one row that has more."""
    for piece in histories:
        first, rows = 0, len(piece.offsets) - 1
        while first < rows:
            fits = int(np.searchsorted(piece.offsets, piece.offsets[first] + _BLOCK, "right")) - 1
            last = max(first + 1, fits)
            lengths = np.diff(piece.offsets[first : last + 1])
            yield piece.values[piece.offsets[first] : piece.offsets[last]], np.repeat(np.arange(last - first), lengths)
            first = last


def _drawn_share(groups: Ints, weights: npt.NDArray[np.float64]) -> float | None:
    """Share of one group among pairs of different items, each drawn in proportion to its weight."""
    total = weights.sum()
    itself = np.square(weights).sum()
    return _ratio(float(np.square(np.bincount(groups, weights)).sum() - itself), float(total * total - itself))


def _pairs(counts: Ints) -> int:
    """Ordered pairs of different members of one group, over groups with so many members."""
    return int((counts * (counts - 1)).sum())


def _same_pairs_share(counts: Ints) -> float | None:
    """Share of one group among all pairs of different items."""
    total = int(counts.sum())
    return _ratio(_pairs(counts), total * (total - 1))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _agreements(shares: list[float | None], chances: list[float | None]) -> list[PrefixAgreement]:
    return [
        PrefixAgreement(length=length, share=share, chance=chance)
        for length, (share, chance) in enumerate(zip(shares, chances, strict=True), start=1)
    ]
