"""Three quantisers behind one protocol: residual K-means, RQ-VAE (with LETTER's losses), K-means with FSQ."""

from __future__ import annotations

import numpy as np

from features.semantic_ids.config import KMeansFsqConfig, QuantizerConfig, ResidualKMeansConfig
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers import kmeans_fsq, residual_kmeans, rqvae
from features.semantic_ids.quantizers.protocol import Floats, Log, Quantizer, State


def check(config: QuantizerConfig, levels: list[int]) -> None:
    """Refuse, before any work, numbers of codes that the quantiser cannot make.

    Raises:
        SidsError: K-means with FSQ, and the last level's codes are no product of small factors.
    """
    if isinstance(config, KMeansFsqConfig) and config.fsq_levels is None:
        kmeans_fsq.default_fsq_levels(levels[-1])


def fit(
    config: QuantizerConfig,
    levels: list[int],
    vectors: Floats,
    seed: int,
    threads: int,
    log: Log,
    collaborative: Floats | None = None,
) -> Quantizer:
    """Fit to a sample of content vectors `[n, d]`, finite and without rows of zeros, which is the caller's to see to.

    `collaborative` `[n, dc]`: behaviour vectors of the same items, 0 for none; read by RQ-VAE with LETTER alone. The
    same seed gives the same quantiser, on any number of threads. Coding runs on as many as faiss and torch are set to.
    """
    distinct = len(np.unique(vectors, axis=0))
    if distinct < levels[0]:
        raise SidsError(
            f"levels[0]: {levels[0]:,} codes, but the sample of {len(vectors):,} items has only {distinct:,} distinct "
            "content vectors; ask for fewer codes, or give more items or content that tells them apart"
        )
    if isinstance(config, ResidualKMeansConfig):
        return residual_kmeans.fit(config, levels, vectors, seed, threads, log)
    if isinstance(config, KMeansFsqConfig):
        return kmeans_fsq.fit(config, levels, vectors, seed, threads, log)
    return rqvae.fit(config, levels, vectors, seed, log, collaborative)


def load(config: QuantizerConfig, levels: list[int], dim: int, state: State) -> Quantizer:
    """The quantiser of a :meth:`Quantizer.state`, of content vectors of width `dim`."""
    if isinstance(config, ResidualKMeansConfig):
        return residual_kmeans.ResidualKMeans.of_state(levels, state)
    if isinstance(config, KMeansFsqConfig):
        return kmeans_fsq.KMeansFsq.of_state(config, levels, dim, state)
    return rqvae.RqVae.of_state(config, levels, dim, state)
