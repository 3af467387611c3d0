"""Columns of the item table that content is made of: found by name and kind, or refused with what there is."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.dataset import ColumnInfo, Dataset
from features.errors import did_you_mean
from features.schema import Kind
from features.semantic_ids.errors import SidsError
from features.views import Ints


def find(dataset: Dataset, name: str, kinds: Collection[Kind], part: str) -> ColumnInfo:
    """What the manifest says of the item column `name` (``item.NAME``).

    Args:
        part: the content part that asks, for the message.

    Raises:
        SidsError: no such column, or one of another kind.
    """
    columns = {f"item.{n}": info for n, info in dataset.manifest.columns.get("item", {}).items()}
    if name in columns and columns[name].kind in kinds:
        return columns[name]
    reason = f"is {columns[name].kind}" if name in columns else "is not in the dataset"
    fitting = [n for n, info in columns.items() if info.kind in kinds]
    hint = did_you_mean(name, fitting)
    have = ", ".join(f"{n} ({info.kind})" for n, info in columns.items()) or "no columns"
    raise SidsError(
        f"{dataset.root}: content part {part}: {name!r} {reason}{hint} It needs an item column of kind "
        f"{' or '.join(sorted(kinds))}; the item table has {have}"
    )


def raw_id(dataset: Dataset, row: int) -> object:
    """The raw id of a dense item index."""
    return dataset.items().column("id")[row].as_py()


def texts(items: pa.RecordBatch, name: str, rows: Ints) -> list[str]:
    """A text column of some rows."""
    return pc.fill_null(items.column(name).take(pa.array(rows)), "").to_pylist()


def values(dataset: Dataset, name: str, size: int) -> list[str]:
    """What each id of a categorical or bag column stands for, `[size]`: raw values where there is a vocabulary, ids
    where there is none (values cut at edges). Id 0 stands for nothing."""
    return ["" if value is None else str(value) for value in dataset.values_of(name, np.arange(size))]
