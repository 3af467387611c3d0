"""Stored columns as indices and numbers: whole Arrow columns at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.dataset import ColumnInfo
from features.hashing import rows_of
from features.prepare.columns import stored
from features.schema import ColumnConfig, Scope

Vocabularies = Mapping[str, pa.Table]


def encode(column: pa.Array, name: str, config: ColumnConfig, vocabularies: Vocabularies) -> pa.Array:
    """One column as it is written: categorical int32, bag list<int32>, dense float32, vector fixed-size list<float32>,
    text large_string.

    Null and unknown values become index 0; a null bag or text is empty; a null number is `default` or 0.

    Args:
        column: values of the stored type (see :mod:`features.prepare.columns`).
        name: the column's stored name, ``scope.name``.
    """
    match config.kind:
        case "categorical":
            return column.cast(pa.int32()) if config.edges is not None else _rows(column, name, config, vocabularies)
        case "bag":
            offsets = np.concatenate([[0], np.cumsum(_lengths(column))]).astype(np.int32)
            return pa.ListArray.from_arrays(pa.array(offsets), _rows(column.flatten(), name, config, vocabularies))
        case "dense":
            filled = pc.fill_null(column.cast(pa.float32()), 0.0 if config.default is None else config.default)
            values: npt.NDArray[np.float32] = filled.to_numpy(zero_copy_only=False)
            return pa.array(np.log1p(values) if config.transform == "log1p" else values, type=pa.float32())
        case "vector":
            return _vectors(column)
        case "text":
            return pc.fill_null(column.cast(pa.large_string()), "")


def info(column: pa.Array, scope: Scope, name: str, config: ColumnConfig, vocabularies: Vocabularies) -> ColumnInfo:
    """What the manifest says of an encoded column."""
    if config.kind == "vector":
        return ColumnInfo(kind="vector", dim=column.type.list_size)
    return described(scope, name, config, vocabularies)


def described(scope: Scope, name: str, config: ColumnConfig, vocabularies: Vocabularies) -> ColumnInfo:
    """What the manifest says of a column that is no vector."""
    if config.kind in ("dense", "text"):
        return ColumnInfo(kind=config.kind)
    if config.edges is not None:
        return ColumnInfo(kind="categorical", size=len(config.edges) + 2)
    if config.hash_buckets is not None:
        return ColumnInfo(kind=config.kind, size=config.hash_buckets + 1)
    return ColumnInfo(kind=config.kind, size=vocabularies[stored(scope, name)].num_rows + 1)


def hashed_rows(hashes: pa.Array, buckets: int) -> pa.Array:
    """Rows of ids by their hashes, 0 for null."""
    rows = rows_of(pc.fill_null(hashes, 0).to_numpy(zero_copy_only=False).astype(np.uint64), buckets)
    rows[hashes.is_null().to_numpy(zero_copy_only=False)] = 0
    return pa.array(rows)


def _rows(values: pa.Array, name: str, config: ColumnConfig, vocabularies: Vocabularies) -> pa.Array:
    if config.hash_buckets is not None:
        return hashed_rows(values, config.hash_buckets)
    return _look_up(values, vocabularies[name])


def _look_up(values: pa.Array, vocabulary: pa.Table) -> pa.Array:
    """Index in the vocabulary, whose rows are in index order from 1; 0 for the rest."""
    known = vocabulary.column("value").combine_chunks()
    if len(known) == 0:
        return pa.array(np.zeros(len(values), dtype=np.int32))
    options = pc.SetLookupOptions(value_set=known, skip_nulls=True)
    place = pc.fill_null(pc.call_function("index_in", [values], options), -1)
    return pa.array(place.to_numpy(zero_copy_only=False) + np.int32(1))


def _lengths(column: pa.Array) -> npt.NDArray[np.int64]:
    return (
        pc.fill_null(pc.call_function("list_value_length", [column]), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    )


def _vectors(column: pa.Array) -> pa.Array:
    """Lists of one length (or null: zeros) as a fixed-size list."""
    lengths = _lengths(column)
    dim = int(lengths.max()) if len(lengths) else 0
    dense = np.zeros((len(column), dim), dtype=np.float32)
    dense[lengths > 0] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim) if dim else 0
    return pa.FixedSizeListArray.from_arrays(pa.array(dense.reshape(-1)), dim)
