"""EB-NeRD (https://recsys.eb.dk): lists of in-view and clicked articles, and each reader's history in one row.

A folder as published has ``train/`` and ``validation/`` with ``behaviors.parquet`` and ``history.parquet``, and
``articles.parquet`` beside them; one folder of ``behaviors_{train,val}.parquet``, ``history_{train,val}.parquet`` and,
if any, ``article_length.parquet`` and ``premium_articles*.parquet`` is read as well.

Events are the union of both history files (they overlap: the pipeline drops what is there twice). Impressions are the
in-view lists, one row an article; requests are the file's impressions. `click` and `conversion` are columns of ours:
a conversion is a click whose article was read at least `conversion_read_s` seconds. Columns that tell what happened
after the impression (`read_time`, `scroll_percentage`, `next_*`) are not offered to expressions over impressions, nor
are an article's totals (`total_*`), which count what came after it was shown.
"""

from __future__ import annotations

from pathlib import Path

from features.prepare.engine import Engine, quote
from features.prepare.errors import PrepareError
from features.prepare.sources.tables import Logs, Table, files_of, open_table, parquet_scan
from features.schema import EbnerdSource

_AFTERWARDS = {"read_time", "scroll_percentage", "next_read_time", "next_scroll_percentage"}
_TOTALS = {"total_inviews", "total_pageviews", "total_read_time"}
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


def _file(path: Path, name: str, part: str) -> Path:
    """The file of a part, in either layout."""
    published = path / {"train": "train", "val": "validation"}[part] / f"{name}.parquet"
    return published if published.exists() else path / f"{name}_{part}.parquet"


def _events(engine: Engine, path: Path) -> Table:
    files = [_file(path, "history", part) for part in ("train", "val")]
    scan = parquet_scan([found for file in files for found in files_of(file)])
    exploded = f"""(SELECT file_index, file_row_number, user_id, unnest(article_id_fixed) AS article_id,
        unnest(impression_time_fixed) AS impression_time, unnest(read_time_fixed) AS read_time,
        unnest(scroll_percentage_fixed) AS scroll_percentage, unnest(range(len(article_id_fixed))) AS place
        FROM {scan})"""
    names = {"user": "user_id", "item": "article_id", "time": "impression_time"}
    return open_table(engine, "src_events", exploded, _named(files), names, ordinal=_PLACE)


def _impressions(engine: Engine, source: EbnerdSource) -> tuple[Table, dict[str, int]]:
    parts: list[str] = []
    dropped: dict[str, int] = {}
    files = [_file(source.path, "behaviors", part) for part in ("train", "val")]
    for index, (part, file) in enumerate(zip(("train", "val"), files, strict=True)):
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
    return open_table(engine, "src_impressions", exploded, _named(files), names, ordinal=_PLACE), dropped


def _named(files: list[Path]) -> str:
    """What errors call files that are read as one."""
    return ", ".join(map(str, files))


def _items(engine: Engine, path: Path) -> Table | None:
    possible = (
        path / "articles.parquet",
        path / "article_length.parquet",
        *sorted(path.glob("premium_articles*.parquet")),
    )
    tables = [p for p in possible if p.is_file()]
    if not tables:
        return None
    union = " UNION ALL BY NAME ".join(f"SELECT * FROM {parquet_scan([str(t)])}" for t in tables)
    columns = [c for c in engine.types(f"({union})", str(path)) if c not in _TOTALS | {"article_id"}]
    merged = ", ".join(f"max({quote(c)}) AS {quote(c)}" for c in columns)  # each column comes from one file
    scan = f"(SELECT article_id, {merged} FROM ({union}) GROUP BY article_id)"
    return open_table(engine, "src_items", scan, _named(tables), {"item": "article_id"}, ordinal="0", keys=("item",))
