"""The item table: one row per dense item index, row 0 the reserved item."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from features.dataset import ColumnInfo, write_arrow
from features.prepare.columns import stored
from features.prepare.encode import Vocabularies, encode, info
from features.prepare.engine import Engine
from features.schema import ColumnConfig


def write_items(
    engine: Engine, root: Path, configured: dict[str, ColumnConfig], vocabularies: Vocabularies
) -> dict[str, ColumnInfo]:
    """Write items.arrow: ``id`` (null in row 0) and ``item.NAME``. An item without attributes has reserved values."""
    rows = engine.table(
        """SELECT item AS id, a.* FROM (SELECT i, item, index FROM item_index UNION ALL SELECT NULL, NULL, 0)
        LEFT JOIN item_attributes a USING (i) ORDER BY index""",
        "writing the item table",
    )
    columns: dict[str, pa.Array] = {"id": rows.column("id")}
    infos: dict[str, ColumnInfo] = {}
    for name, config in configured.items():
        column = stored("item", name)
        source = rows.column(column)
        if config.kind == "text":  # all texts together may be longer than a string column's 2 GiB
            source = source.cast(pa.large_string())
        source = source.combine_chunks()
        filled = source.fill_null(0) if config.edges is not None else source
        columns[column] = encode(filled, column, config, vocabularies)
        infos[name] = info(columns[column], "item", name, config, vocabularies)
    write_arrow(pa.table(columns), root / "items.arrow")
    return infos
