"""The contract itself: events, impressions, items and users in Parquet, columns mapped by the config."""

from __future__ import annotations

from features.prepare.engine import Engine
from features.prepare.sources.tables import Logs, Table, files_of, open_table, parquet_scan
from features.schema import LogsSource, TableSource


def open_logs(engine: Engine, source: LogsSource) -> Logs:
    """Open the tables a config names."""

    def table(view: str, config: TableSource | None, *keys: str) -> Table | None:
        if config is None:
            return None
        scan = parquet_scan(files_of(config.path))
        return open_table(engine, view, scan, str(config.path), config.columns, unit=config.time_unit, keys=keys)

    return Logs(
        events=table("src_events", source.events, "user", "item", "time"),
        impressions=table("src_impressions", source.impressions, "user", "item", "time"),
        items=table("src_items", source.items, "item"),
        users=table("src_users", source.users, "user"),
    )
