"""KuaiRand (https://kuairand.com): every exposure of a video and what the user did, from original CSV or Parquet parts.

Only the columns of the original ``log_standard*.csv`` are read; parts that others have enriched may bring derived ones.
Exact duplicates are dropped and counted. Each exposure is an impression, and an event for the requests after it.
"""

from __future__ import annotations

from pathlib import Path

from features.prepare.engine import Engine, literal
from features.prepare.errors import PrepareError, nearest
from features.prepare.sources.tables import Logs, Table, files_of, open_table, parquet_scan
from features.schema import KuaiRandSource

_COLUMNS = (
    "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment", "is_forward",
    "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter",
    "is_rand", "tab",
)  # fmt: skip


def open_kuairand(engine: Engine, source: KuaiRandSource) -> Logs:
    """Load the exposures of the train and test files, without duplicates, and the feature tables."""
    files = [
        (f, split)
        for split, names in (("train", source.train), ("test", source.test))
        for n in names
        for f in files_of(source.path / n)
    ]
    columns = ", ".join(_COLUMNS)
    ordinal = "(CAST({0} AS BIGINT) << 40) + row_number() OVER () AS row"
    for number, (file, split) in enumerate(files):
        scan = parquet_scan([file]) if file.endswith(".parquet") else f"read_csv({literal(file)}, header = true)"
        types = engine.types(scan, file)
        missing = [c for c in _COLUMNS if c not in types]
        if missing:
            raise PrepareError(f"{file}: no column {missing[0]!r}; {nearest(missing[0], types)}")
        typed = ", ".join(f"CAST({c} AS BIGINT) AS {c}" for c in _COLUMNS)
        sql = f"SELECT {typed}, '{split}' AS split, {ordinal.format(number)} FROM {scan}"
        engine.run(f"{'CREATE TABLE raw_all AS' if number == 0 else 'INSERT INTO raw_all'} {sql}", file)
    path = ", ".join(str(source.path / n) for n in (*source.train, *source.test))
    engine.run(
        f"CREATE TABLE raw AS SELECT {columns}, arg_min(split, row) AS split, min(row) AS row "
        f"FROM raw_all GROUP BY {columns} ORDER BY min(row)",
        path,
    )
    dropped = engine.row("SELECT (SELECT count(*) FROM raw_all) - (SELECT count(*) FROM raw)", path)[0]
    engine.run("DROP TABLE raw_all", path)
    names = {"user": "user_id", "item": "video_id", "time": "time_ms"}
    return Logs(
        events=open_table(engine, "src_events", f"(SELECT {columns}, row FROM raw)", path, names, ordinal="row"),
        impressions=open_table(engine, "src_impressions", "raw", path, {**names, "split": "split"}, ordinal="row"),
        items=_features(engine, source.path, "video_features_basic*.csv", "items", {"item": "video_id"}),
        users=_features(engine, source.path, "user_features*.csv", "users", {"user": "user_id"}),
        dropped={"exact duplicate exposures": dropped},
    )


def _features(engine: Engine, folder: Path, pattern: str, name: str, names: dict[str, str]) -> Table | None:
    if not list(folder.glob(pattern)):
        return None
    files = files_of(folder / pattern)
    path = str(folder / pattern)
    scan = f"read_csv({literal(files)}, header = true, union_by_name = true, sample_size = -1)"
    engine.run(f"CREATE TABLE raw_{name} AS SELECT * FROM {scan}", path)
    return open_table(engine, f"src_{name}", f"raw_{name}", path, names, ordinal="0", keys=tuple(names))
