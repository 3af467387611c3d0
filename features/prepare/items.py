"""The item table: one row per dense item index, row 0 the reserved item."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from features.dataset import ColumnInfo, write_arrow
from features.prepare.columns import stored
from features.prepare.encode import Vocabularies, encode, hashed_rows, info
from features.prepare.engine import Engine
from features.prepare.hashed import hash_sql
from features.prepare.unknown import IdCounts, count, has_vocabulary
from features.schema import PrepareConfig


class Items(NamedTuple):
    """The columns of the item table; and of those whose vocabulary leaves out rare values, what it lacks of each item's
    ids, by stored name."""

    columns: dict[str, ColumnInfo]
    ids: dict[str, IdCounts]


def write_items(engine: Engine, root: Path, config: PrepareConfig, vocabularies: Vocabularies) -> Items:
    """Write items.arrow: ``id`` (null in row 0), ``item.NAME``, and ``bucket`` where items are hashed. An item without
    attributes has reserved values."""
    hashed = "" if config.item_hash_buckets is None else f", {hash_sql('item')} AS hash"
    rows = engine.table(
        f"""SELECT item AS id{hashed}, a.* FROM (SELECT i, item, index FROM item_index UNION ALL SELECT NULL, NULL, 0)
        LEFT JOIN item_attributes a USING (i) ORDER BY index""",
        "writing the item table",
    )
    columns: dict[str, pa.Array] = {"id": rows.column("id")}
    if config.item_hash_buckets is not None:
        columns["bucket"] = hashed_rows(rows.column("hash").combine_chunks(), config.item_hash_buckets)
    infos: dict[str, ColumnInfo] = {}
    ids: dict[str, IdCounts] = {}
    for name, of_column in config.columns.item.items():
        column = stored("item", name)
        source = rows.column(column)
        if of_column.kind == "text":  # all texts together may be longer than a string column's 2 GiB
            source = source.cast(pa.large_string())
        source = source.combine_chunks()
        filled = source.fill_null(0) if of_column.edges is not None else source
        columns[column] = encode(filled, column, of_column, vocabularies)
        infos[name] = info(columns[column], "item", name, of_column, vocabularies)
        if has_vocabulary(of_column) and of_column.min_count > 1:  # else it has every value
            ids[column] = count(source, columns[column])
    write_arrow(pa.table(columns), root / "items.arrow")
    return Items(infos, ids)
