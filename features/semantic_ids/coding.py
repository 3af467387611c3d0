"""Code a dataset's items with a codebook, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from features.dataset import Dataset
from features.progress import Progress
from features.semantic_ids.codebook import Codebook
from features.semantic_ids.content.protocol import Read
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers.protocol import Codes, Floats
from features.views import Ints


class Coded(NamedTuple):
    """Some items. rows `[n]`: those with content, ascending; vectors `[n, d]`: their content; codes `[n, M]`, from 0;
    space `[n, dz]`: the vectors where the codewords lie."""

    rows: Ints
    vectors: Floats
    codes: Codes
    space: Floats


def code_items(codebook: Codebook, dataset: Dataset, read: Read | None = None) -> Iterator[Coded]:
    """All items of the dataset in the order of their rows, `chunk` at a time; row 0, the reserved item, has no content.

    Args:
        read: the codebook's content opened on this dataset, where that has been done.

    Raises:
        SidsError: the dataset lacks what the content is made of, or the encoder gave vectors that are not finite.
    """
    read = read or codebook.content.open(dataset)
    chunks = range(0, dataset.manifest.items, codebook.config.chunk)
    with Progress("code items", len(chunks)) as progress:
        for first in chunks:
            yield _code(codebook, dataset, read, first)
            progress.advance()


def _code(codebook: Codebook, dataset: Dataset, read: Read, first: int) -> Coded:
    """The chunk of items from row `first` on."""
    last = min(first + codebook.config.chunk, dataset.manifest.items)
    rows = np.arange(max(first, 1), last)
    vectors = read(rows)
    has_content = vectors.any(axis=1)
    rows, vectors = rows[has_content], vectors[has_content]
    if not np.isfinite(vectors).all():
        bad = rows[~np.isfinite(vectors).all(axis=1)]
        raise SidsError(
            f"{dataset.root}: content vectors of {len(bad):,} items are not finite, the first in row {bad[0]} of "
            "the item table; correct the columns that `content` names"
        )
    codes, space = codebook.quantizer.encode(vectors)
    return Coded(rows, vectors, codes, space)
