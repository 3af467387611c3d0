"""What a codebook is judged by: one typed object, written as JSON and shown as tables.

Symbols: n items that have content, d width of content vectors, M levels, K_l codes of level l, s items of a sample. A
prefix of length l is an item's first l codes; a leaf is a full semantic ID that items have.

Every agreement stands beside chance, the same share among random pairs: few codes agree with everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table
from rich.text import Text

from features.semantic_ids.quantizers.protocol import Codes, Floats, Quantizer
from features.views import Ints, Lists

DEAD_SHARE = 0.2
"""a level with a larger share of dead codes is warned of"""
AMI_ITEMS = 10_000
"""mutual information is adjusted for chance on so many items: the time grows with codes times categories"""
_BLOCK = 1 << 20
"""events, and distances, that are worked on at a time"""
_UNDEFINED = "–"


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LevelReport(_Figures):
    """One level. `error` is what levels 1 … l leave of the variance of the content vectors: 1 is as bad as their mean;
    null where all vectors are equal."""

    level: int
    codes: int
    used: int
    dead: float
    """share of the codes that no item has"""
    perplexity: float
    """exp of the entropy of the level's codes: so many equally frequent codes would be as hard to guess"""
    largest: float
    """share of the items that have the most frequent code"""
    error: float | None


class LeafReport(_Figures):
    """Items of each full semantic ID that items have. At least 99 % of the leaves hold at most `p99` items."""

    leaves: int
    median: float
    p99: int
    max: int
    unique: float
    """share of the items that are alone in their leaf"""


class PrefixAgreement(_Figures):
    """Shares for prefixes of one length; null where there is no pair to count."""

    length: int
    share: float | None
    chance: float | None
    """the same share among random pairs"""

    @property
    def lift(self) -> float | None:
        """How many times more often than by chance."""
        return self.share / self.chance if self.share is not None and self.chance else None


class NeighbourAgreement(_Figures):
    """`share` of an item's nearest neighbours (L2 between content vectors) that have its prefix."""

    neighbours: int
    items: int
    """among which the neighbours are sought: all items with content, or a sample"""
    items_in_all: int
    prefixes: list[PrefixAgreement]


class ColumnAgreement(_Figures):
    """`share` of the pairs of items of one prefix that have the same category, all such pairs counted."""

    column: str
    items: int
    unknown: int
    """items with category 0, left out"""
    prefixes: list[PrefixAgreement]
    ami: list[float]
    """adjusted mutual information of each prefix and the category: 0 is chance, 1 says one is the other"""
    ami_items: int
    """on how many items"""


class Cooccurrence(_Figures):
    """`share` of the pairs of events, of one user and at most `window` apart, whose different items have the same
    prefix; chance draws two different items, each as often as it has events."""

    window: int
    events: int
    events_without_code: int
    """left out, with the pairs they are in"""
    items_without_code: int
    """different items among these"""
    pairs: int
    prefixes: list[PrefixAgreement]


class SidsReport(_Figures):
    """What is known of one codebook."""

    name: str
    items: int
    """with content"""
    items_without_content: int
    """they have the reserved code"""
    distinct_vectors: int
    duplicates: int
    """items whose content vector another item has too: no code can tell them apart"""
    levels: list[LevelReport]
    leaves: LeafReport
    neighbours: NeighbourAgreement | None
    columns: list[ColumnAgreement]
    cooccurrence: Cooccurrence | None
    warnings: list[str]


class CodebookMeter:
    """Figures of all items, fed chunk by chunk. Keeps of each item its codes and a hash of its vector: 4M + 8 bytes.

    Args:
        levels: K_l of each level.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        self._sizes = list(levels)
        self._codes: list[Codes] = []
        self._hashes: list[Ints] = []
        self._items = 0
        self._mean: npt.NDArray[np.float64] | None = None
        self._variance = 0.0
        self._errors = np.zeros(len(self._sizes))

    def update(self, codes: Codes, vectors: Floats, partial: Iterable[Floats]) -> None:
        """Take in more items.

        Args:
            codes: `[c, M]`, counted from 0.
            vectors: their content, `[c, d]`.
            partial: what levels 1 … l make of them, M arrays `[c, d]` (:func:`partial_reconstructions`).
        """
        if not len(codes):
            return
        self._codes.append(codes.astype(np.int32))
        self._hashes.append(_row_hashes(vectors))
        self._add_variance(vectors.astype(np.float64))
        for level, approximation in zip(range(len(self._sizes)), partial, strict=True):
            self._errors[level] += np.square(vectors - approximation, dtype=np.float64).sum()

    def _add_variance(self, vectors: npt.NDArray[np.float64]) -> None:
        """Sums about a running mean (Chan et al. 1979, eq. 2.1): sums of squares would cancel where means are large."""
        count, total = len(vectors), self._items + len(vectors)
        mean = vectors.mean(0)
        delta = mean - (self._mean if self._mean is not None else mean)
        self._variance += np.square(vectors - mean).sum() + np.square(delta).sum() * self._items * count / total
        self._mean = mean - delta * self._items / total
        self._items = total

    @property
    def items(self) -> int:
        """Items taken in."""
        return self._items

    def counts(self) -> list[Ints]:
        """Items of each code, `[K_l]` of each level."""
        codes = self.codes()
        return [np.bincount(codes[:, level], minlength=size) for level, size in enumerate(self._sizes)]

    def codes(self) -> Codes:
        """Of the items in the order they came, `[n, M]`."""
        return np.concatenate([np.empty((0, len(self._sizes)), np.int32), *self._codes])

    def leaf_sizes(self) -> Ints:
        """Items of each leaf, `[leaves]`."""
        return np.bincount(prefixes(self.codes())[:, -1]) if self._items else np.zeros(0, np.int64)

    def levels(self) -> list[LevelReport]:
        """Figures of each level."""
        return [
            _level(level, counts, error / self._variance if self._variance > 0 else None)
            for level, (counts, error) in enumerate(zip(self.counts(), self._errors.tolist(), strict=True), start=1)
        ]

    def leaves(self) -> LeafReport:
        """Figures of the full semantic IDs."""
        sizes = self.leaf_sizes()
        if not sizes.size:
            return LeafReport(leaves=0, median=0, p99=0, max=0, unique=0)
        return LeafReport(
            leaves=sizes.size,
            median=float(np.median(sizes)),
            p99=int(np.percentile(sizes, 99, method="inverted_cdf")),
            max=int(sizes.max()),
            unique=float((sizes == 1).sum() / self._items),
        )

    def vectors(self) -> tuple[int, int]:
        """Distinct content vectors, and items whose vector another item has too."""
        hashes = np.concatenate([np.empty(0, np.int64), *self._hashes])
        _, counts = np.unique(hashes, return_counts=True)
        return counts.size, int(counts[counts > 1].sum())


def _level(level: int, counts: Ints, error: float | None) -> LevelReport:
    used = counts[counts > 0]
    shares = used / max(1, used.sum())
    return LevelReport(
        level=level,
        codes=counts.size,
        used=used.size,
        dead=1 - used.size / counts.size,
        perplexity=float(np.exp(-(shares * np.log(shares)).sum())) if used.size else 0.0,
        largest=float(shares.max()) if used.size else 0.0,
        error=error,
    )


def _row_hashes(vectors: Floats) -> Ints:
    """64 bits of each row; Python's hash of bytes, which no two of 10⁷ rows share by accident (chance 3 in 10⁶)."""
    rows = np.ascontiguousarray(vectors + np.float32(0), np.float32)  # -0 becomes 0: equal numbers, equal bytes
    return np.fromiter(map(hash, rows.view(np.dtype((np.void, rows.shape[1] * 4))).ravel().tolist()), np.int64)


def partial_reconstructions(quantizer: Quantizer, codes: Codes) -> Iterator[Floats]:
    """What levels 1, 1 … 2, up to all, make of items with `codes` `[c, M]`: M arrays `[c, d]`, one at a time."""
    words = quantizer.codewords()
    summed = np.zeros((len(codes), words[0].shape[1]), np.float32)
    for level, codewords in enumerate(words):
        summed = summed + codewords[codes[:, level]]
        yield quantizer.decode(summed)


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


def make_report(
    name: str,
    meter: CodebookMeter,
    items_without_content: int,
    neighbours: NeighbourAgreement | None = None,
    columns: Sequence[ColumnAgreement] = (),
    cooccurrence: Cooccurrence | None = None,
) -> SidsReport:
    """The figures in one object, with what is wrong about them."""
    distinct, duplicates = meter.vectors()
    report = SidsReport(
        name=name,
        items=meter.items,
        items_without_content=items_without_content,
        distinct_vectors=distinct,
        duplicates=duplicates,
        levels=meter.levels(),
        leaves=meter.leaves(),
        neighbours=neighbours,
        columns=list(columns),
        cooccurrence=cooccurrence,
        warnings=[],
    )
    return report.model_copy(update={"warnings": list(_warnings(report))})


def _warnings(report: SidsReport) -> Iterator[str]:
    """Plain sentences: what is wrong, its figure, what to change."""
    without, items = report.items_without_content, report.items
    if without > items:
        yield f"{without:,} of {without + items:,} items have no content and share the reserved code: add content parts"
    if report.duplicates > 0.2 * items:
        yield (
            f"{report.duplicates:,} of {items:,} items have the same content vector as another, so that no code can "
            "tell them apart: add a content part in which they differ"
        )
    before = 1.0
    for level in report.levels:
        yield from _level_warnings(level, before, report)
        before = before if level.error is None else level.error
    combinations = float(np.prod([float(level.codes) for level in report.levels]))
    if items and report.leaves.unique < 0.5 and combinations >= 10 * items and report.duplicates < 0.5 * items:
        yield (
            f"only {report.leaves.unique:.1%} of the items have a semantic ID of their own although there are "
            f"{combinations:.3g} for {items:,} items: look at the levels' perplexity; where it is low, other content, "
            "more restarts (K-means) or more steps (RQ-VAE) spread the items better"
        )


def _level_warnings(level: LevelReport, before: float, report: SidsReport) -> Iterator[str]:
    """`before`: the error after the levels before it."""
    if level.codes - level.used > DEAD_SHARE * level.codes:
        few = level.codes > report.distinct_vectors
        why = f", and there are only {report.distinct_vectors:,} different content vectors" if few else ""
        yield (
            f"level {level.level}: {level.dead:.1%} of its {level.codes:,} codes are dead, no item has them{why}: "
            "fewer codes at this level (levels), more items, other content, or, for rqvae, a larger dead_below"
        )
    if level.largest > 0.5 and level.codes > 2:
        yield (
            f"level {level.level}: one code holds {level.largest:.1%} of the items: other content, or other weights of "
            "its parts, would spread them"
        )
    if level.error is not None and level.error > 0.99 * before:
        yield (
            f"level {level.level}: it leaves an error of {level.error:.4f} of the variance, {before:.4f} without it: "
            "leave this level out, or give it more codes; for rqvae, more steps"
        )


def render(report: SidsReport) -> list[Table | Text]:
    """The report as lines and tables for a console; in a log, which has no colours, they are plain text."""
    parts: list[Table | Text] = [
        _title(
            f"{report.name}: {report.items:,} items with content, {report.items_without_content:,} without; "
            f"{report.distinct_vectors:,} different vectors, {report.duplicates:,} items share theirs"
        ),
        _level_table(report.levels),
        Text(_leaf_line(report.leaves)),
    ]
    if (near := report.neighbours) is not None:
        among = "all items" if near.items == near.items_in_all else f"{near.items:,} of {near.items_in_all:,} items"
        parts.append(_title(f"{near.neighbours} nearest neighbours, sought among {among}: same prefix"))
        parts.append(_prefix_table(near.prefixes))
    for found in report.columns:
        sample = f"; AMI on {found.ami_items:,} of them" if found.ami_items < found.items else ""
        unknown = f", {found.unknown:,} unknown" if found.unknown else ""
        parts.append(_title(f"{found.column}: same value within a prefix; {found.items:,} items{unknown}{sample}"))
        parts.append(_prefix_table(found.prefixes, found.ami))
    if (near := report.cooccurrence) is not None:
        title = (
            f"events at most {near.window} apart: same prefix; {near.events:,} training events, {near.pairs:,} pairs"
        )
        if near.events_without_code:
            title += f", {near.events_without_code:,} events of {near.items_without_code:,} items without code left out"
        parts.append(_title(title))
        parts.append(_prefix_table(near.prefixes))
    parts += [Text(f"Warning: {text}", style="yellow") for text in report.warnings]
    return parts


def _title(text: str) -> Text:
    """Above a table, not its own title, which would be broken to the table's width."""
    return Text("\n" + text, style="bold")


def _level_table(levels: list[LevelReport]) -> Table:
    table = _table(["level", "codes", "used", "dead", "perplexity", "largest", "error"])
    for level in levels:
        table.add_row(
            str(level.level),
            f"{level.codes:,}",
            f"{level.used:,}",
            f"{level.dead:.1%}",
            f"{level.perplexity:,.1f}",
            f"{level.largest:.1%}",
            _cell(level.error),
        )
    return table


def _leaf_line(leaves: LeafReport) -> str:
    return (
        "largest: share of items with the commonest code; error: share of the variance left after this level\n"
        f"{leaves.leaves:,} leaves; items per leaf: median {leaves.median:g}, p99 {leaves.p99:,}, max {leaves.max:,}; "
        f"{leaves.unique:.1%} of the items are alone in theirs"
    )


def _prefix_table(prefixes: list[PrefixAgreement], ami: list[float] | None = None) -> Table:
    table = _table(["prefix", "share", "by chance", "lift", *(["AMI"] if ami is not None else [])])
    for row, prefix in enumerate(prefixes):
        lift = _UNDEFINED if prefix.lift is None else f"{prefix.lift:,.2f}"
        cells = [str(prefix.length), _cell(prefix.share), _cell(prefix.chance), lift]
        table.add_row(*cells, *([_cell(ami[row])] if ami is not None else []))
    return table


def _table(columns: list[str]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _cell(value: float | None) -> str:
    if value is None:
        return _UNDEFINED
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"
