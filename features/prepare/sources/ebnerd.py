"""EB-NeRD (https://recsys.eb.dk): lists of in-view and clicked articles, and each reader's history in one row.

Events are the union of both history files (they overlap: the pipeline drops what is there twice). Impressions are the
in-view lists, one row an article; requests are the file's impressions. `click` and `conversion` are columns of ours:
a conversion is a click whose article was read at least `conversion_read_s` seconds. Columns that tell what happened
after the impression (`read_time`, `scroll_percentage`, `next_*`) are not offered to expressions over impressions.
"""

from __future__ import annotations

from pathlib import Path

from features.prepare.engine import Engine, quote
from features.prepare.errors import PrepareError
from features.prepare.sources.tables import Logs, Table, files_of, open_table, parquet_scan
from features.schema import EbnerdSource

_AFTERWARDS = {"read_time", "scroll_percentage", "next_read_time", "next_scroll_percentage"}
_LISTS = {"article_ids_inview", "article_ids_clicked"}
# ordinal of an element = file number · 2^52 + row · 2^22 + place in the list
_PLACE = "(CAST(file_index AS BIGINT) << 52) + (CAST(file_row_number AS BIGINT) << 22) + place"


def open_ebnerd(engine: Engine, source: EbnerdSource) -> Logs:
    """Open behaviours, histories and article attributes."""
    impressions, dropped = _impressions(engine, source)
    return Logs(
        events=_events(engine, source.path),
        impressions=impressions,
        items=_items(engine, source.path),
        dropped=dropped,
    )


def _events(engine: Engine, path: Path) -> Table:
    scan = parquet_scan([f for part in ("train", "val") for f in files_of(path / f"history_{part}.parquet")])
    exploded = f"""(SELECT file_index, file_row_number, user_id, unnest(article_id_fixed) AS article_id,
        unnest(impression_time_fixed) AS impression_time, unnest(read_time_fixed) AS read_time,
        unnest(scroll_percentage_fixed) AS scroll_percentage, unnest(range(len(article_id_fixed))) AS place
        FROM {scan})"""
    names = {"user": "user_id", "item": "article_id", "time": "impression_time"}
    return open_table(engine, "src_events", exploded, str(path / "history_*.parquet"), names, ordinal=_PLACE)


def _impressions(engine: Engine, source: EbnerdSource) -> tuple[Table, dict[str, int]]:
    parts: list[str] = []
    dropped: dict[str, int] = {}
    for index, part in enumerate(("train", "val")):
        file = source.path / f"behaviors_{part}.parquet"
        scan = parquet_scan(files_of(file))
        types = engine.types(scan, str(file))
        missing = sorted(({"user_id", "impression_id", "impression_time", "next_read_time"} | _LISTS) - set(types))
        if missing:
            raise PrepareError(f"{file}: no column {missing[0]!r}; this is not an EB-NeRD behaviours file")
        keep = "true"
        if part == "train" and source.train_users is not None:
            engine.bind(source.train_users, scan, f"{file}: source.train_users", types)
            keep = f"coalesce({source.train_users}, false)"
            sql = f"SELECT coalesce(sum(len(article_ids_inview)), 0)::BIGINT FROM {scan} WHERE NOT {keep}"
            dropped["training impressions of users outside train_users"] = engine.row(sql, str(file))[0]
        context = ", ".join(quote(c) for c in types if c not in _AFTERWARDS | _LISTS | {"article_id"})
        parts.append(
            f"""SELECT *, list_contains(clicked, article_id) AS click,
            click AND coalesce(read_s, 0) >= {source.conversion_read_s} AS conversion FROM (
            SELECT {context}, {index} AS file_index, file_row_number, '{"train" if index == 0 else "test"}' AS split,
            unnest(article_ids_inview) AS article_id, unnest(range(len(article_ids_inview))) AS place,
            article_ids_clicked AS clicked, next_read_time AS read_s FROM {scan} WHERE {keep})"""
        )
    exploded = f"(SELECT * EXCLUDE (clicked, read_s) FROM ({' UNION ALL BY NAME '.join(parts)}))"
    names = {"user": "user_id", "item": "article_id", "time": "impression_time", "request": "impression_id"}
    path = str(source.path / "behaviors_*.parquet")
    return open_table(engine, "src_impressions", exploded, path, names, ordinal=_PLACE), dropped


def _items(engine: Engine, path: Path) -> Table | None:
    tables = [
        p for p in (path / "article_length.parquet", *sorted(path.glob("premium_articles*.parquet"))) if p.is_file()
    ]
    if not tables:
        return None
    union = " UNION ALL BY NAME ".join(f"SELECT * FROM {parquet_scan([str(t)])}" for t in tables)
    columns = [c for c in engine.types(f"({union})", str(path)) if c != "article_id"]
    merged = ", ".join(f"max({quote(c)}) AS {quote(c)}" for c in columns)  # each column comes from one file
    scan = f"(SELECT article_id, {merged} FROM ({union}) GROUP BY article_id)"
    label = ", ".join(str(t) for t in tables)
    return open_table(engine, "src_items", scan, label, {"item": "article_id"}, ordinal="0", keys=("item",))
