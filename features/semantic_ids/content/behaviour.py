"""Items as the company they keep: PPMI of items and contexts near one another in training histories, reduced by SVD.

    PMI(i, c)  = log P(c | i) − log P_α(c),  P(c | i) = #(i, c) / Σ_c' #(i, c'),  P_α(c) = #(c)^α / Σ_c' #(c')^α
    PPMI(i, c) = max(PMI(i, c) − log k, 0) ≈ U Σ Vᵀ
    vector_i   = PPMI_i · V Σ^(−1/2)           which is U_i Σ^(1/2) for the items fitted to

#(i, c) counts the pairs of item i and context c at most `window` events apart, #(c) is its sum over items. Contexts are
the most frequent items. A row needs its own counts and the contexts' P_α only, so that the items of another dataset, a
later day's for instance, are given vectors in the same space without another fit: contexts are found by raw id.

Levy & Goldberg 2014 (PPMI and its shift k); Levy, Goldberg & Dagan 2015 (the smoothing α, the power of Σ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp

from features.dataset import Dataset
from features.semantic_ids.config import BehaviourPart
from features.semantic_ids.content import svd
from features.semantic_ids.content.cooccurrence import Places, item_counts, pair_counts
from features.semantic_ids.content.protocol import Floats, Log, Read, State
from features.semantic_ids.errors import SidsError
from features.views import Ints


@dataclass(frozen=True)
class Behaviour:
    """A fitted encoder of C contexts. contexts `[C]`: raw ids; smoothed `[C]`: P_α; directions `[dim, C]`: Σ^(−1/2) Vᵀ.

    Items with fewer than `min_count` training events, or no company among the contexts, have nothing in this part.
    """

    config: BehaviourPart
    contexts: npt.NDArray[Any]
    smoothed: npt.NDArray[np.float64]
    directions: Floats

    @property
    def dim(self) -> int:
        return len(self.directions)

    def open(self, dataset: Dataset) -> Read:
        index = _dense_indices(dataset, self.contexts)
        if not (index >= 0).any():
            raise SidsError(
                f"{dataset.root}: none of the {len(index)} items that the behaviour part of the codebook compares with "
                f"occurs in this dataset (ids such as {self.contexts[0].item()!r}); use the catalogue fitted to"
            )
        found = (index >= 0).nonzero()[0]
        columns = np.full(dataset.manifest.items, -1, np.int32)
        columns[index[found]] = found
        rows = matrix_rows(item_counts(dataset, self.config.events), self.config.min_count)
        counted = pair_counts(dataset, self.config.events, self.config.window, rows, columns, len(index))
        matrix = ppmi(counted, self.smoothed, self.config.shift)

        def read(items: Ints) -> Floats:
            place = rows[items]
            vectors = np.zeros((len(items), self.dim), np.float32)
            vectors[place >= 0] = svd.project(matrix[place[place >= 0]], self.directions)
            return vectors

        return read

    def state(self) -> State:
        return {"contexts": self.contexts, "smoothed": self.smoothed, "directions": self.directions}


def fit(config: BehaviourPart, dataset: Dataset, seed: int, log: Log) -> Behaviour:
    """Learn the contexts and the directions from the training histories of `dataset`.

    Raises:
        SidsError: no two items occur together, or none more often than chance.
    """
    counts = item_counts(dataset, config.events)
    rows = matrix_rows(counts, config.min_count)
    order = np.argsort(-counts, kind="stable")
    chosen = order[rows[order] >= 0][: config.contexts]
    columns = np.full(len(counts), -1, np.int32)
    columns[chosen] = np.arange(len(chosen))
    pairs = pair_counts(dataset, config.events, config.window, rows, columns, len(chosen))
    company = np.asarray(pairs.sum(axis=0, dtype=np.int64)).reshape(-1)
    chosen, pairs, company = chosen[company > 0], pairs[:, company > 0], company[company > 0]
    if not company.size:
        raise SidsError(
            f"{dataset.root}: content part behaviour: no two of the {int((rows >= 0).sum())} items with min_count: "
            f"{config.min_count} or more of the {int(counts.sum())} training events read occur at most window: "
            f"{config.window} events apart; lower min_count, raise events, or remove the part"
        )
    smoothed = company**config.smoothing / (company**config.smoothing).sum()
    matrix = ppmi(pairs, smoothed, config.shift)
    if not matrix.nnz:
        raise SidsError(
            f"{dataset.root}: content part behaviour: no two items occur together more often than shift: "
            f"{config.shift} times chance; lower shift, or remove the part"
        )
    v, sigma = svd.truncated(matrix, config.dim, seed, log, "behaviour")
    log(
        f"content part behaviour: {int((rows >= 0).sum())} items and {len(chosen)} contexts from {int(counts.sum())} "
        f"training events, {matrix.nnz} pairs more often together than chance"
    )
    return Behaviour(config, _raw_ids(dataset, chosen), smoothed, (v / np.sqrt(sigma)[:, None]).astype(np.float32))


def load(config: BehaviourPart, state: State) -> Behaviour:
    """The part as it was fitted."""
    return Behaviour(config, state["contexts"], state["smoothed"], state["directions"])


def ppmi(counts: sp.csr_matrix, smoothed: npt.NDArray[np.float64], shift: float) -> sp.csr_matrix:
    """Shifted positive mutual information `[items, C]` of pair counts, given P_α `[C]`."""
    company = np.asarray(counts.sum(axis=1, dtype=np.int64)).reshape(-1)
    share = counts.data / np.repeat(company, np.diff(counts.indptr))  # P(c | i)
    pmi = np.log(share / smoothed[counts.indices]) - np.log(shift)
    matrix = sp.csr_matrix((np.maximum(pmi, 0).astype(np.float32), counts.indices, counts.indptr), shape=counts.shape)
    matrix.eliminate_zeros()
    return matrix


def matrix_rows(counts: Ints, min_count: int) -> Places:
    """A row of the matrix for each item with enough events, -1 for the rest; item 0 stands for no item."""
    enough = counts >= min_count
    enough[0] = False
    return np.where(enough, enough.cumsum(dtype=np.int32) - 1, np.int32(-1))


def _raw_ids(dataset: Dataset, items: Ints) -> npt.NDArray[Any]:
    """Raw ids of dense indices: int64, or text."""
    ids = dataset.items().column("id").take(pa.array(items))
    return ids.to_numpy(zero_copy_only=False).astype(np.int64 if pa.types.is_integer(ids.type) else np.str_)


def _dense_indices(dataset: Dataset, contexts: npt.NDArray[Any]) -> Ints:
    """The dense index of each raw id, -1 for those that the dataset does not have."""
    ids = dataset.items().column("id")
    if pa.types.is_integer(ids.type) != np.issubdtype(contexts.dtype, np.integer):
        return np.full(len(contexts), -1)
    options = pc.SetLookupOptions(value_set=ids, skip_nulls=True)
    place = pc.call_function("index_in", [pa.array(contexts.tolist(), ids.type)], options)
    return pc.fill_null(place, -1).to_numpy(zero_copy_only=False).astype(np.int64)
