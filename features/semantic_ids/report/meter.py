"""Usage, errors and leaves of all items' codes, taken in chunk by chunk.

Symbols: :mod:`features.semantic_ids.report`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from features.semantic_ids.quantizers.protocol import Codes, Floats, Quantizer
from features.semantic_ids.report.agreement import prefixes
from features.semantic_ids.report.figures import LeafReport, LevelReport
from features.views import Ints


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
