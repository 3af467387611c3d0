"""Which row of an older dataset's table is each row of a newer one's.

Every preparation numbers ids anew, so the same id has another row in each dataset. Ids of a vocabulary are matched by
their raw value, and hashed ones by their hash; buckets by their edges; semantic IDs' codes, and prefixes of codes,
where the codebook is the same, or the old one with more codes. Row 0, the unknown id's, is row 0 in both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from features.dataset import ColumnInfo, Dataset, read_arrow
from features.selection import Feature, FeatureError
from features.semantic_ids.prefixes import Prefixes

Ints = npt.NDArray[np.int64]
NEW = -1
"""the row of what the older dataset does not know"""
_CHUNK = 1 << 20
"""ids of the older vocabulary that are looked up at a time, at least"""


def rows_by_id(older: pa.Array, newer: pa.Array) -> Ints:
    """Where each id of `newer` is in `older`: `[len(newer)]`, NEW where it is not. Ids are distinct in each.

    Memory follows `newer`, which may be part of a vocabulary: the older ids are looked up among them, a chunk at a
    time, not they among the older.

    >>> rows_by_id(pa.array(["a", "b", "c"]), pa.array(["c", "d", "a"])).tolist()
    [2, -1, 0]
    """
    found = np.full(len(newer), NEW, np.int64)
    step = max(_CHUNK, len(newer))
    for first in range(0, len(older), step):
        place = pc.call_function("index_in", [older.slice(first, step)], pc.SetLookupOptions(newer))
        known = place.is_valid().to_numpy(zero_copy_only=False).nonzero()[0]
        found[place.drop_null().to_numpy()] = first + known
    return found


def older_rows(
    feature: Feature,
    older: Dataset,
    newer: Dataset,
    older_size: int,
    first: int,
    end: int,
    grown: frozenset[str] = frozenset(),
) -> Ints:
    """The row in the older table of each of the rows ``first … end - 1`` of the feature's table: NEW where it has none.

    Args:
        older_size: rows of the older table, row 0 included.
        grown: codebooks that have grown since; all others must be the same (:func:`codebook_change`).

    Raises:
        SidsError: prefixes of a codebook that has grown are hashed into another number of rows.
    """
    rows = np.arange(first, end)
    info = _column(newer, feature)
    if info is not None and info.codebook is not None and info.kind == "bag":
        now = newer.manifest.codebooks[info.codebook]
        before = older.manifest.codebooks[info.codebook] if info.codebook in grown else now
        return Prefixes(now.levels, feature.size).rows_in(Prefixes(before.levels, older_size), rows)
    vocabulary = _values(newer, feature)
    if vocabulary is None:  # buckets and codes are numbered by what they are
        return np.where(rows < older_size, rows, NEW)
    before = _values(older, feature)
    assert before is not None
    first_id = max(first, 1)
    ids = vocabulary.slice(first_id - 1, max(end - first_id, 0))
    found = 1 + rows_by_id(*_of_one_type(feature, before.slice(0, older_size - 1), ids))
    found[found == 0] = NEW
    return np.concatenate([rows[rows == 0], found])


def codebook_change(
    name: str, older_hash: str, older: Dataset, newer: Dataset
) -> Literal["same", "grown", "other", "unknown"]:
    """What became of a codebook: *grown* is the old one with more codes at some level, the first ones equal; *unknown*
    where the older dataset no longer has the codes of `older_hash` to compare."""
    now = newer.manifest.codebooks[name]
    if now.content_hash == older_hash:
        return "same"
    before = older.manifest.codebooks.get(name)
    if before is None or before.content_hash != older_hash:
        return "unknown"
    if len(before.levels) != len(now.levels):
        return "other"
    levels = zip(older.codewords(name), newer.codewords(name), strict=True)
    return "grown" if all(np.array_equal(words, more[: len(words)]) for words, more in levels) else "other"


def refuse_other_meaning(features: Iterable[Feature], older: Dataset, newer: Dataset) -> None:
    """Raise FeatureError where a column of the same name holds something else: another kind, other edges, another
    transform, ids of another type."""
    for feature in features:
        before, now = _column(older, feature), _column(newer, feature)
        if now is not None and now.codebook is not None:
            continue
        if (before is None) != (now is None) or (before is not None and now is not None and before.kind != now.kind):
            raise _changed(feature, "kind", before and before.kind, now and now.kind, older, newer)
        for option in ("edges", "transform"):
            was, is_now = (_option(dataset, feature, option) for dataset in (older, newer))
            if was != is_now:
                raise _changed(feature, option, was, is_now, older, newer)
        was, is_now = (_hash_buckets(dataset, feature) for dataset in (older, newer))
        if was != is_now:
            raise _changed(feature, "hash_buckets", was, is_now, older, newer)
        ids = _values(newer, feature)
        before_ids = _values(older, feature)
        if ids is not None and before_ids is not None:
            _of_one_type(feature, before_ids.slice(0, 0), ids.slice(0, 0))


def same_numbers(feature: Feature, older: Dataset, newer: Dataset) -> bool:
    """Whether every value of a feature has the same number in both datasets."""
    info = _column(newer, feature)
    if info is not None and info.codebook is not None:
        hashes = [data.manifest.codebooks.get(info.codebook) for data in (older, newer)]
        return hashes[0] is not None and hashes[1] is not None and hashes[0].content_hash == hashes[1].content_hash
    before, now = (_values(data, feature) for data in (older, newer))
    return (before is None and now is None) or (before is not None and now is not None and before.equals(now))


def _values(dataset: Dataset, feature: Feature) -> pa.Array | None:
    """The raw ids of rows 1, 2, …; None where rows are not numbered by a vocabulary."""
    if _hash_buckets(dataset, feature) is not None:  # hashed items have one, of the item table's rows
        return None
    path = dataset.root / "vocabularies" / f"{feature.name}.arrow"
    return read_arrow(path).column("value") if path.is_file() else None


def _hash_buckets(dataset: Dataset, feature: Feature) -> int | None:
    info = dataset.manifest.hashed(feature.name)
    return None if info is None else info.buckets


def _of_one_type(feature: Feature, *values: pa.Array) -> list[pa.Array]:
    """Ids that can be compared: integers of any width with one another, strings with strings."""
    kinds = [value.type for value in values]
    if kinds[0] == kinds[1]:  # as they lie in the file; else they are copied
        return list(values)
    if all(pa.types.is_integer(kind) for kind in kinds):
        return [value.cast(pa.int64()) for value in values]
    if all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds):
        return [value.cast(pa.large_string()) for value in values]
    raise FeatureError(
        f"{feature.name}: ids are {kinds[0]} in the older dataset and {kinds[1]} in the newer one, so that none is "
        "known by the other; prepare the newer one with ids of the older type"
    )


def _column(dataset: Dataset, feature: Feature) -> ColumnInfo | None:
    """What the manifest says of the feature's column; None for `item` and `user`."""
    return dataset.manifest.columns.get(feature.scope, {}).get(feature.name.removeprefix(f"{feature.scope}."))


def _option(dataset: Dataset, feature: Feature, option: str) -> object:
    """A column's option as it was prepared with; None for columns that are not of `columns`, as of counters."""
    part: Any = dataset.manifest.config
    for key in ("columns", feature.scope, feature.name.removeprefix(f"{feature.scope}."), option):
        part = part.get(key) if isinstance(part, dict) else None
    return part


def _changed(feature: Feature, what: str, was: object, is_now: object, older: Dataset, newer: Dataset) -> FeatureError:
    return FeatureError(
        f"{feature.name}: {what} {is_now} in {newer.root}, but {was} in {older.root}; prepare it as before, or train "
        "from scratch"
    )
