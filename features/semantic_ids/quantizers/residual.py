"""Residual coding, which all quantisers share: from vectors and codewords to codes.

    r_0 = z;   k_l = argmin_j ‖r_{l−1} − c_{l,j}‖;   r_l = r_{l−1} − c_{l,k_l}

Greedy, level by level: the first codes of an item are the same whatever levels follow, so that they can be a prefix.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import faiss
import numpy as np

from features.semantic_ids.quantizers.protocol import Codes, Floats

_EXACT_CELLS = 1 << 22  # vectors × codewords × width of one float64 recount


def encode(vectors: Floats, codebooks: Sequence[Floats]) -> tuple[Codes, Floats]:
    """Codes `[n, M]` of `[n, dz]` vectors and what the M codewords `[K_l, dz]` leave over `[n, dz]`."""
    codes = np.empty((len(vectors), len(codebooks)), np.int32)
    residual = np.array(vectors, np.float32, order="C")
    for level, codewords in enumerate(codebooks):
        codes[:, level] = nearest(residual, codewords)
        residual -= codewords[codes[:, level]]
    return codes, residual


def nearest(vectors: Floats, codewords: Floats) -> Codes:
    """The nearest codeword `[n]` by L2; the lowest of several equally near.

    Float32 products round differently in differently sized batches, so where two codewords are about equally near they
    are compared again in float64: an item's code does not depend on the items it is coded with.
    """
    distinct, first = _distinct_in_order(codewords)
    if len(vectors) == 0 or len(distinct) == 1:
        return np.zeros(len(vectors), np.int32)
    index = faiss.IndexFlatL2(distinct.shape[1])
    index.add(distinct)
    distances, found = index.search(np.ascontiguousarray(vectors, np.float32), 2)
    best = found[:, 0]
    scale = np.einsum("nd,nd->n", vectors, vectors) + np.einsum("kd,kd->k", distinct, distinct).max()
    rounding = np.finfo(np.float32).eps * (distinct.shape[1] + 4) * scale
    close = np.flatnonzero(distances[:, 1] - distances[:, 0] <= rounding)
    best[close] = _nearest_float64(vectors[close], distinct)
    return first[best].astype(np.int32)


def _distinct_in_order(codewords: Floats) -> tuple[Floats, np.ndarray]:
    """Codewords without repetition, and the lowest code of each, rising."""
    _, first = np.unique(codewords, axis=0, return_index=True)
    first = np.sort(first)
    return np.ascontiguousarray(codewords[first], np.float32), first


def _nearest_float64(vectors: Floats, codewords: Floats) -> np.ndarray:
    """The nearest codeword `[n]`, from differences and not from products; the lowest of equals."""
    best = np.empty(len(vectors), np.int64)
    rows = max(1, _EXACT_CELLS // codewords.size)
    for begin in range(0, len(vectors), rows):
        part = slice(begin, begin + rows)
        difference = vectors[part, None].astype(np.float64) - codewords
        best[part] = np.einsum("nkd,nkd->nk", difference, difference).argmin(1)
    return best


@contextmanager
def faiss_threads(threads: int) -> Generator[None]:
    """Within, faiss uses so many threads; after, as many as before."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
