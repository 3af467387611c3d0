"""``ranker sids fit``: from a dataset's items to a codebook folder, with the report that it is judged by.

The quantiser is fitted to a sample of the items that training knows; items that are new since are coded like any other,
without a new fit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from features import provenance
from features.dataset import Dataset
from features.publish import staging
from features.semantic_ids import quantizers
from features.semantic_ids.codebook import Codebook
from features.semantic_ids.coding import code_items
from features.semantic_ids.config import RqVaeConfig, SidsConfig
from features.semantic_ids.content import Content
from features.semantic_ids.content.protocol import Read
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers.protocol import Floats
from features.semantic_ids.report import SidsReport
from features.semantic_ids.report.judge import check_columns, judge
from features.views import Ints

PACKAGES = ("numpy", "torch", "faiss-cpu", "scikit-learn", "vector-quantize-pytorch")


def fit(config: SidsConfig, dataset: Dataset, out: Path, log: Callable[[str], None]) -> tuple[Codebook, SidsReport]:
    """Fit a codebook and write it to the folder `out`, which appears whole or not at all.

    Raises:
        SidsError: the dataset lacks what the content is made of, or has too few items with content for the codes.
        UserError: `out` exists or cannot be written.
    """
    check_columns(config.report, dataset)
    quantizers.check(config.quantizer, config.levels)
    with staging(out) as (folder, _):
        log(f"content of {dataset.manifest.items - 1:,} items")
        content = Content.fit(config.content, dataset, config.seed, log)
        read = content.open(dataset)
        rows, vectors = _sample(config, dataset, read)
        log(f"fitting {config.quantizer.type} to {len(rows):,} items × {content.dim}")
        quantizer = quantizers.fit(
            config.quantizer,
            config.levels,
            vectors,
            config.seed,
            config.threads,
            log,
            collaborative=_collaborative(config, dataset, content, rows),
        )
        codebook = Codebook.of(config, content, quantizer)
        report = judge(codebook, dataset, code_items(codebook, dataset, read), folder)
        codebook.write(folder, dataset, len(rows), provenance.versions(PACKAGES), provenance.git_commit())
    return codebook, report


def _sample(config: SidsConfig, dataset: Dataset, read: Read) -> tuple[Ints, Floats]:
    """At most `sample` items that training knows and that have content: rows `[n]`, vectors `[n, d]`.

    Raises:
        SidsError: no item has content, or some content is not finite.
    """
    known = 1 + np.random.default_rng(config.seed).permutation(dataset.manifest.known_items - 1)
    rows, vectors, wanted = list[Ints](), list[Floats](), config.sample
    for first in range(0, len(known), config.chunk):
        some = known[first : first + config.chunk]
        found = read(some)
        has_content = np.flatnonzero(found.any(axis=1))[:wanted]
        rows.append(some[has_content])
        vectors.append(found[has_content])
        wanted -= len(has_content)
        if wanted == 0:
            break
    if wanted == config.sample:
        raise SidsError(
            f"{dataset.root}: none of {len(known):,} items has content; check the columns that `content` names, or "
            "lower min_count of its behaviour part"
        )
    together = np.concatenate(vectors)
    if not np.isfinite(together).all():
        raise SidsError(f"{dataset.root}: content vectors are not finite; correct the columns that `content` names")
    return np.concatenate(rows), together


def _collaborative(config: SidsConfig, dataset: Dataset, content: Content, rows: Ints) -> Floats | None:
    """Behaviour vectors of the sample, where a loss wants them."""
    quantizer = config.quantizer
    if not isinstance(quantizer, RqVaeConfig) or quantizer.letter.collaborative == 0:
        return None
    read = content.collaborative(dataset)
    assert read is not None  # the config asks for a behaviour part
    return read(rows)
