"""Dense indices of items and users, and the vocabularies of categorical columns.

Makes ``item_index(i, item, known, index)`` and ``user_index(u, user, part, known, index, row)``: known ones first, so
that an index tells by its size whether training has seen the id. `row` is the user's row in the partition's histories.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from features.prepare.columns import stored
from features.prepare.engine import Engine, quote
from features.prepare.split import KNOWN, Periods
from features.schema import ColumnConfig, ColumnsConfig, Scope


@dataclass(frozen=True)
class Index:
    """Sizes, row 0 included."""

    items: int
    known_items: int
    users: int
    known_users: int


def index_ids(engine: Engine, periods: Periods, item_min_count: int) -> Index:
    """Give every item and user of the logs its dense index, from 1."""
    engine.run(
        f"""CREATE TABLE item_index AS SELECT i, item, known,
        CAST(row_number() OVER (ORDER BY known DESC, CASE WHEN known THEN n END DESC, i) AS INTEGER) AS index FROM (
        SELECT x.i, x.item, coalesce(c.n, 0) AS n, coalesce(c.n, 0) >= {item_min_count} AS known
        FROM items x LEFT JOIN (SELECT i, sum(n) AS n FROM (
            SELECT i, count(*) AS n FROM staged WHERE {KNOWN} GROUP BY i UNION ALL
            SELECT i, count(*) AS n FROM events WHERE time <= {periods.train_end} GROUP BY i)
            GROUP BY i) c USING (i))""",
        "indexing items",
    )
    engine.run(
        f"""CREATE TABLE user_index AS
        SELECT *, CAST(row_number() OVER (PARTITION BY part ORDER BY index) - 1 AS INTEGER) AS row FROM (
        SELECT u, user, part, known, CAST(row_number() OVER (ORDER BY known DESC, u) AS INTEGER) AS index FROM (
        SELECT u, user, part, u IN (SELECT u FROM requests WHERE {KNOWN}) AS known FROM users)) ORDER BY part""",
        "indexing users",
    )
    items, known_items = engine.row("SELECT count(*), count_if(known) FROM item_index", "indexing items")
    users, known_users = engine.row("SELECT count(*), count_if(known) FROM user_index", "indexing users")
    return Index(items + 1, known_items + 1, users + 1, known_users + 1)


def build(engine: Engine, columns: ColumnsConfig, periods: Periods) -> dict[str, pa.Table]:
    """Vocabulary of each categorical (without edges) and bag column that is not hashed: `value`, `index`; most frequent
    first.

    Item attributes are static: all items of the logs count. Other columns count what training has seen.
    """
    rows: dict[Scope, str] = {
        "item": "item_attributes",
        "user": "user_attributes WHERE u IN (SELECT u FROM user_index WHERE known)",
        "event": f"events WHERE time <= {periods.train_end}",
        "request": f"staged WHERE {KNOWN}",
        "candidate": f"staged WHERE {KNOWN}",
    }
    found: dict[str, pa.Table] = {}
    for scope, relation in rows.items():
        configured: dict[str, ColumnConfig] = getattr(columns, scope)
        for name, config in configured.items():
            if config.hash_buckets is not None:
                continue
            if config.kind == "bag" or (config.kind == "categorical" and config.edges is None):
                found[stored(scope, name)] = _vocabulary(engine, stored(scope, name), config, relation)
    return found


def item_lookup(engine: Engine) -> npt.NDArray[np.int32]:
    """Dense index by item number i; number 0 is not used."""
    column = engine.table("SELECT index FROM item_index ORDER BY i", "indexing items").column("index")
    return np.concatenate([np.zeros(1, np.int32), column.to_numpy().astype(np.int32)])


def ids(engine: Engine, kind: str) -> pa.Table:
    """All raw ids of ``item`` or ``user`` with their index, in index order."""
    return engine.table(
        f"SELECT {kind} AS value, index FROM {kind}_index ORDER BY index", f"writing the {kind} vocabulary"
    )


def _vocabulary(engine: Engine, column: str, config: ColumnConfig, relation: str) -> pa.Table:
    value = f"unnest({quote(column)})" if config.kind == "bag" else quote(column)
    return engine.table(
        f"""SELECT v AS value, CAST(row_number() OVER (ORDER BY n DESC, v) AS INTEGER) AS index FROM (
        SELECT v, count(*) AS n FROM (SELECT {value} AS v FROM {relation}) WHERE v IS NOT NULL GROUP BY v
        HAVING count(*) >= {config.min_count}) ORDER BY index""",
        f"vocabulary of {column}",
    )
