"""Residual K-means: each level clusters what the levels before left over. Codewords live in the content's space."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import numpy as np

from features.semantic_ids.config import ResidualKMeansConfig
from features.semantic_ids.quantizers import residual
from features.semantic_ids.quantizers.protocol import Codes, Floats, Log, State


@dataclass(frozen=True)
class ResidualKMeans:
    """`centroids[l]` is `[K_l, d]`."""

    centroids: list[Floats]

    def encode(self, vectors: Floats) -> tuple[Codes, Floats]:
        """See :class:`protocol.Quantizer`: the codewords' space is that of the content."""
        return residual.encode(vectors, self.centroids)[0], vectors

    def codewords(self) -> list[Floats]:
        """`[K_l, d]` of each level."""
        return self.centroids

    def decode(self, summed: Floats) -> Floats:
        """The sums themselves."""
        return summed

    def state(self) -> State:
        """The codewords."""
        return {codewords_key(level): codewords for level, codewords in enumerate(self.centroids)}

    @classmethod
    def of_state(cls, levels: list[int], state: State) -> ResidualKMeans:
        """The inverse of :meth:`state`."""
        return cls([state[codewords_key(level)] for level in range(len(levels))])


def codewords_key(level: int) -> str:
    """Name of a level's codewords in a state; levels count from 1, as in the names of the codes' columns."""
    return f"codewords_{level + 1}"


def fit(
    config: ResidualKMeansConfig, levels: list[int], vectors: Floats, seed: int, threads: int, log: Log
) -> ResidualKMeans:
    """Centroids of M levels, from a sample of content vectors `[n, d]`."""
    with residual.faiss_threads(threads):
        return ResidualKMeans(cluster_levels(levels, vectors, config.iterations, config.restarts, seed, log)[0])


def cluster_levels(
    levels: list[int], vectors: Floats, iterations: int, restarts: int, seed: int, log: Log
) -> tuple[list[Floats], Floats]:
    """Centroids of each level `[K_l, d]`, and what they leave over of the vectors `[n, d]`."""
    centroids: list[Floats] = []
    left = vectors
    variance = float(np.square(vectors - vectors.mean(0)).sum())
    for level, codes in enumerate(levels):
        centroids.append(cluster(left, codes, iterations, restarts, seed + level))
        left = residual.encode(left, centroids[-1:])[1]
        error = float(np.square(left).sum()) / variance if variance else 0.0
        log(f"level {level + 1}: {codes:,} centroids, {error:.1%} of the variance left")
    return centroids, left


def cluster(vectors: Floats, codes: int, iterations: int, restarts: int, seed: int) -> Floats:
    """K-means centroids `[codes, d]` of all the given vectors.

    Of no more distinct vectors than codes, each is a centroid; the codes beyond repeat the first one and, as the lower
    of equals is nearest, stay unused.
    """
    distinct = np.unique(vectors, axis=0)
    if len(distinct) <= codes:
        return np.concatenate([distinct, np.repeat(distinct[:1], codes - len(distinct), axis=0)])
    kmeans = faiss.Kmeans(
        vectors.shape[1],
        codes,
        niter=iterations,
        nredo=restarts,
        seed=seed,
        min_points_per_centroid=1,  # else it warns of what the report says better
        max_points_per_centroid=len(vectors),  # else it silently takes 256 a centroid
        init_method=faiss.ClusteringInitMethod_AFK_MC2,  # K-means++ by Markov chains: lower error than random starts
    )
    kmeans.train(np.ascontiguousarray(vectors, np.float32))
    assert kmeans.centroids is not None
    return kmeans.centroids
