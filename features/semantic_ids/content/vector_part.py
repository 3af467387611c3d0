"""A vector column of the item table as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from features.dataset import Dataset
from features.semantic_ids.config import VectorPart
from features.semantic_ids.content import item_columns
from features.semantic_ids.content.protocol import Floats, Log, Read, State
from features.semantic_ids.errors import SidsError
from features.views import Ints

_CHUNK = 65_536


@dataclass(frozen=True)
class Vectors:
    """Reads the column. An item without a vector, which is stored as zeros, has nothing in this part."""

    column: str
    dim: int

    def open(self, dataset: Dataset) -> Read:
        found = item_columns.find(dataset, self.column, ("vector",), "vector").dim
        if found != self.dim:
            raise SidsError(
                f"{dataset.root}: {self.column} has vectors of {found} numbers, the codebook was fitted to {self.dim}; "
                "fit it again"
            )
        stored = _stored(dataset, self.column, self.dim)
        _check_finite(dataset, self.column, stored)

        def read(rows: Ints) -> Floats:
            return stored[rows]

        return read

    def state(self) -> State:
        return {"dim": np.array(self.dim)}


def fit(config: VectorPart, dataset: Dataset, seed: int, log: Log) -> Vectors:
    """Learns the column's width only.

    Raises:
        SidsError: no such vector column, or no item has a vector in it.
    """
    part = Vectors(config.column, item_columns.find(dataset, config.column, ("vector",), "vector").dim)
    if not part.dim or not _stored(dataset, part.column, part.dim).any():
        raise SidsError(f"{dataset.root}: {config.column} is zero for every item; fill it, or remove it from `content`")
    return part


def load(config: VectorPart, state: State) -> Vectors:
    """The part as it was fitted."""
    return Vectors(config.column, int(state["dim"]))


def _stored(dataset: Dataset, column: str, dim: int) -> Floats:
    """The whole column `[items, dim]`, a view of the mapped file."""
    array = dataset.items().column(column)
    if not pa.types.is_fixed_size_list(array.type) or array.null_count or array.type.list_size != dim:
        raise SidsError(
            f"{dataset.root}: {column} is {array.type} with {array.null_count} nulls, the manifest promises vectors of "
            f"{dim} numbers; run `ranker prepare` again"
        )
    return array.flatten().to_numpy().reshape(-1, dim)


def _check_finite(dataset: Dataset, column: str, stored: Floats) -> None:
    wrong = np.concatenate(
        [
            first + np.flatnonzero(~np.isfinite(stored[first : first + _CHUNK]).all(axis=1))
            for first in range(0, len(stored), _CHUNK)
        ]
    )
    if wrong.size:
        first = item_columns.raw_id(dataset, int(wrong[0]))
        raise SidsError(
            f"{dataset.root}: {column}: the vectors of {wrong.size} of {len(stored)} items hold NaN or infinity, the "
            f"first of item {first!r}; correct them in the source and prepare again"
        )
