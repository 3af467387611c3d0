"""Words as a vector: hashed word n-grams, weighted by TF-IDF, reduced by truncated SVD (latent semantic analysis).

Terms are the lower-cased words of text columns, runs of up to `ngrams` of them within a column, and one term for each
value of a categorical or bag column, ``item.genre=Drama``. A term's column in the matrix is its hash, which needs no
vocabulary and is the same for every dataset. Weights are (1 + log tf) · idf, rows of length 1. Words of scripts that
put no space between them stay whole: split them in the column's source, or use a sentence encoder.

Deerwester et al. 1990; Weinberger et al. 2009 for the hashing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sp
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import HashingVectorizer

from features.dataset import Dataset
from features.semantic_ids.config import TextPart
from features.semantic_ids.content import item_columns, svd
from features.semantic_ids.content.protocol import Floats, Log, Read, State
from features.semantic_ids.errors import SidsError
from features.views import Ints

SAMPLE = 200_000
"""Items that the weights and the SVD are fitted to, at most."""
SAMPLE_TERMS = 50_000_000
"""Distinct terms of them, added up over the items, after which no more items are read: 8 bytes each."""
_CHUNK = 4_096
"""Items whose text is in memory at a time."""


@dataclass(frozen=True)
class Words:
    """A fitted encoder of V buckets. buckets `[V]`: those that occurred, ascending; idf `[V]`; components `[dim, V]`.

    A term that the fit has not seen counts for nothing; an item without any other has nothing in this part.
    """

    config: TextPart
    buckets: npt.NDArray[np.int64]
    idf: Floats
    components: Floats

    @property
    def dim(self) -> int:
        return len(self.components)

    def open(self, dataset: Dataset) -> Read:
        terms = Terms(self.config, dataset)

        def read(rows: Ints) -> Floats:
            parts = [
                svd.project(_weighted(counts[:, self.buckets], self.idf), self.components)
                for counts in terms.chunks(rows)
            ]
            return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

        return read

    def state(self) -> State:
        return {"buckets": self.buckets, "idf": self.idf, "components": self.components}


class Terms:
    """Counts of hashed terms of a dataset's items."""

    def __init__(self, config: TextPart, dataset: Dataset) -> None:
        kinds = {
            name: item_columns.find(dataset, name, ("text", "categorical", "bag"), "text") for name in config.columns
        }
        self.buckets = config.buckets
        self._items = dataset.items()
        self._words = cast(Any, HashingVectorizer)(
            n_features=config.buckets,
            ngram_range=(1, config.ngrams),
            token_pattern=r"\w+",
            alternate_sign=False,  # idf needs counts that only add up
            norm=None,
            dtype=np.float32,
        )
        # a hashed column may have far more rows than items: those that occur are looked at, chunk by chunk
        self._of_value = {
            name: None if info.hashed else self._hashed(name, item_columns.values(dataset, name, info.size))
            for name, info in kinds.items()
            if info.kind != "text"
        }
        self._texts = [name for name, info in kinds.items() if info.kind == "text"]

    def chunks(self, rows: Ints) -> Iterator[sp.csr_matrix]:
        """`[n, buckets]` of the next `n` items."""
        for first in range(0, len(rows), _CHUNK):
            yield self._counts(rows[first : first + _CHUNK])

    def _counts(self, rows: Ints) -> sp.csr_matrix:
        total = sp.csr_matrix((len(rows), self.buckets), dtype=np.float32)
        for name in self._texts:
            total = total + self._words.transform(item_columns.texts(self._items, name, rows))
        for name, bucket in self._of_value.items():
            total = total + self._values(name, bucket, rows)
        return sp.csr_matrix(total)

    def _hashed(self, name: str, values: list[str]) -> Ints:
        """The bucket of each of a column's values, `[values]`."""
        if not values:  # which the hasher refuses
            return np.zeros(0, np.int64)
        hasher = FeatureHasher(self.buckets, input_type="string", alternate_sign=False)
        return hasher.transform([[f"{name}={value}"] for value in values]).indices.astype(np.int64)

    def _values(self, name: str, bucket: Ints | None, rows: Ints) -> sp.csr_matrix:
        column = self._items.column(name).take(pa.array(rows))
        if pa.types.is_integer(column.type):
            ids, ends = column.to_numpy(), np.arange(len(rows) + 1)
        else:
            ids = column.flatten().to_numpy()
            ends = column.offsets.to_numpy().astype(np.int64)
            ends = ends - ends[0]
        if bucket is None:
            distinct, place = np.unique(ids, return_inverse=True)
            of_id = self._hashed(name, [str(value) for value in distinct.tolist()])[place]
        else:
            of_id = bucket[ids]
        counts = sp.csr_matrix(((ids > 0).astype(np.float32), of_id, ends), shape=(len(rows), self.buckets))
        counts.eliminate_zeros()  # id 0 stands for no value
        return counts


def fit(config: TextPart, dataset: Dataset, seed: int, log: Log) -> Words:
    """Learn weights and components from a sample of the items.

    Raises:
        SidsError: a column is missing or of a kind without words, or no item has a word.
    """
    counts = _sample(Terms(config, dataset), dataset.manifest.known_items, seed)
    documents = np.bincount(counts.indices, minlength=config.buckets)
    items = len(counts.indptr) - 1
    buckets = documents.nonzero()[0]
    if not buckets.size:
        raise SidsError(
            f"{dataset.root}: content part text: no item has a word in {', '.join(config.columns)}; fill them, or "
            "remove them from `content`"
        )
    idf = (np.log((1 + items) / (1 + documents[buckets])) + 1).astype(np.float32)
    components, _ = svd.truncated(_weighted(counts[:, buckets], idf), config.dim, seed, log, "text")
    log(f"content part text: terms of {items} items lie in {len(buckets)} of {config.buckets} buckets")
    return Words(config, buckets.astype(np.int64), idf, components)


def load(config: TextPart, state: State) -> Words:
    """The part as it was fitted."""
    return Words(config, state["buckets"], state["idf"], state["components"])


def _sample(terms: Terms, items: int, seed: int) -> sp.csr_matrix:
    """Counts of items drawn at random, those without a term left out."""
    rows = 1 + np.random.default_rng(seed).permutation(items - 1)[:SAMPLE]
    parts = [sp.csr_matrix((0, terms.buckets), dtype=np.float32)]
    read = 0
    for counts in terms.chunks(rows):
        parts.append(counts[counts.getnnz(axis=1) > 0])
        read += counts.nnz
        if read >= SAMPLE_TERMS:
            break
    return sp.csr_matrix(sp.vstack(parts))


def _weighted(counts: sp.csr_matrix, idf: Floats) -> sp.csr_matrix:
    """TF-IDF of counts `[n, V]`, rows of length 1."""
    weights = (1 + np.log(counts.data, dtype=np.float64)) * idf[counts.indices]
    weighted = sp.csr_matrix((weights, counts.indices, counts.indptr), shape=counts.shape)
    weighted.sort_indices()  # sums of a row must not depend on the rows read with it
    squares = np.asarray(weighted.multiply(weighted).sum(axis=1)).reshape(-1)
    weighted.data /= np.repeat(np.sqrt(squares), np.diff(weighted.indptr))
    return sp.csr_matrix(weighted, dtype=np.float32)
