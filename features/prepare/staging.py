"""The staged tables: ids replaced by small integers, expressions evaluated, only what is needed kept.

- ``users(user, u, part, share)``, ``items(item, i, first_seen)``: distinct ids in id order, u and i from 1;
- ``events(u, part, i, time, ordinal, event.*, counter.*)``: without duplicates, clustered by partition;
- ``impressions(u, part, i, time, ordinal, request, part_of, request.*, candidate.*, label.*, oracle.*, counter.*)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from features.prepare import columns as col
from features.prepare.engine import Engine, quote
from features.prepare.errors import PrepareError
from features.prepare.sources.tables import Logs, Table
from features.schema import PrepareConfig

SHARE_STEPS = 1_000_000
ORACLE = "oracle_"  # columns of impressions with true probabilities
_FIRST_SEEN = {"first_seen": "BIGINT"}


@dataclass(frozen=True)
class Staged:
    """What was found while staging."""

    labels: list[str]
    oracles: list[str]
    duplicates: int
    """events dropped"""
    has_split: bool
    """the source names the split of an impression"""


def stage_ids(engine: Engine, logs: Logs, partitions: int) -> None:
    """Number the distinct users and items of both logs and give each user a partition.

    The partition comes from MD5 of the id's text: the same on every platform and in every version.
    """
    tables = [t for t in (logs.events, logs.impressions) if t is not None]
    users = " UNION ALL ".join(f'SELECT "@user" AS user FROM {t.view}' for t in tables)
    engine.run(
        f"""CREATE TABLE users AS SELECT *, CAST(row_number() OVER (ORDER BY user) AS INTEGER) AS u,
        CAST(md5_number_lower(CAST(user AS VARCHAR)) % {partitions} AS INTEGER) AS part,
        CAST(md5_number_upper(CAST(user AS VARCHAR)) % {SHARE_STEPS} AS INTEGER) AS share
        FROM (SELECT DISTINCT user FROM ({users}))""",
        "numbering users",
    )
    items = " UNION ALL ".join(f'SELECT "@item" AS item, time FROM {t.view}' for t in tables)
    engine.run(
        f"""CREATE TABLE items AS SELECT *, CAST(row_number() OVER (ORDER BY item) AS INTEGER) AS i
        FROM (SELECT item, min(time) AS first_seen FROM ({items}) GROUP BY item)""",
        "numbering items",
    )


def stage_events(engine: Engine, logs: Logs, config: PrepareConfig) -> int:
    """Make the table ``events``; returns how many duplicates were dropped.

    Events are the same when user, item, time and every stored column are; the first in file order stays.
    """
    table = logs.events
    if table is None:
        engine.run(
            "CREATE TABLE events (u INTEGER, part INTEGER, i INTEGER, time BIGINT, ordinal BIGINT, sample BOOLEAN)",
            "staging events",
        )
        return 0
    selected = col.select(engine, table, "event", config.columns.event)
    selected += _counted(engine, table, config, "events")
    if config.derive is not None:
        about = f"{table.path}: derive.samples"
        selected.append(f"{col.number(engine, table, config.derive.samples, about)} <> 0 AS sample")
    engine.run(
        f"""CREATE TABLE events AS SELECT * EXCLUDE (ordinal), min(ordinal) AS ordinal FROM (
            SELECT u.u, u.part, i.i, s.time, s."@ordinal" AS ordinal{_list(selected)}
            FROM {table.view} s JOIN users u ON s."@user" = u.user JOIN items i ON s."@item" = i.item)
        GROUP BY ALL ORDER BY part""",
        f"{table.path}: staging events",
    )
    col.check_dense(engine, "events", "event", config.columns.event, table.path)
    kept = engine.row("SELECT count(*) FROM events", table.path)[0]
    return engine.row(f"SELECT count(*) FROM {table.view}", table.path)[0] - kept


def derive_impressions(engine: Engine, logs: Logs, config: PrepareConfig) -> Table:
    """The view of impressions made from events: each chosen event is a request of its own."""
    derive, events = config.derive, logs.events
    if derive is None or events is None:
        raise PrepareError("no impressions: name them under source.impressions, or make them from events with `derive`")
    last = (
        f"QUALIFY row_number() OVER (PARTITION BY u ORDER BY time DESC, ordinal DESC) <= {derive.last}"
        if derive.last
        else ""
    )
    engine.run(
        f"""CREATE TABLE chosen AS SELECT ordinal FROM (
            SELECT u, time, ordinal, sample, row_number() OVER (PARTITION BY u ORDER BY time, ordinal) - 1 AS before
            FROM events)
        WHERE sample AND before >= {derive.min_history} {last}""",
        f"{events.path}: choosing samples",
    )
    engine.run(
        f"""CREATE VIEW src_derived AS SELECT *, "@ordinal" AS "@request" FROM {events.view}
        WHERE "@ordinal" IN (SELECT ordinal FROM chosen)""",
        events.path,
    )
    names = {k: v for k, v in events.names.items() if k not in ("request", "split")}
    return replace(events, view="src_derived", names=names, types=engine.types("src_derived", events.path))


def stage_impressions(engine: Engine, table: Table, config: PrepareConfig) -> tuple[list[str], list[str]]:
    """Make the table ``impressions``; returns the names of its labels and of its oracles.

    Raises:
        PrepareError: a label is missing or not 0 or 1.
    """
    labels = list(config.labels)
    oracles = [name.removeprefix(ORACLE) for name in table.types if name.startswith(ORACLE)]
    selected = col.select(engine, table, "request", config.columns.request)
    selected += col.select(engine, table, "candidate", config.columns.candidate, _FIRST_SEEN)
    for name, expression in config.labels.items():
        sql = col.number(engine, table, expression, f"{table.path}: labels.{name}")
        selected.append(f"{sql} AS {quote('label.' + name)}")
    for name in oracles:
        sql = col.number(engine, table, ORACLE + name, f"{table.path}: {ORACLE}{name}")
        selected.append(f"CAST({sql} AS FLOAT) AS {quote('oracle.' + name)}")
    selected += _counted(engine, table, config, "impressions")
    request = '"@request"' if "@request" in table.types else "time"
    split = 'CAST("@split" AS TINYINT)' if "@split" in table.types else "CAST(0 AS TINYINT)"
    engine.run(
        f"""CREATE TABLE impressions AS SELECT "@u" AS u, "@part" AS part, "@i" AS i, time, "@ordinal" AS ordinal,
        {request} AS request, {split} AS part_of{_list(selected)} FROM (
            SELECT s.*, i.first_seen, i.i AS "@i", u.u AS "@u", u.part AS "@part" FROM {table.view} s
            JOIN users u ON s."@user" = u.user JOIN items i ON s."@item" = i.item)""",
        f"{table.path}: staging impressions",
    )
    for name in labels:
        _check_label(engine, name, config.labels[name], table)
    col.check_dense(engine, "impressions", "request", config.columns.request, table.path)
    col.check_dense(engine, "impressions", "candidate", config.columns.candidate, table.path)
    return labels, oracles


def stage_attributes(engine: Engine, table: Table | None, config: PrepareConfig, scope: str) -> tuple[int, int]:
    """Make ``item_attributes(i, item.*)`` or ``user_attributes(u, user.*)`` of the ids that occur in the logs.

    Returns:
        rows of the table whose id never occurs, and ids of the logs without a row.
    """
    item = scope == "item"
    configured = config.columns.item if item else config.columns.user
    key, ids = ("i", "items") if item else ("u", "users")
    if table is None:
        if configured:
            raise PrepareError(
                f"columns.{scope}: the source has no table of {scope}s; "
                f"name it under source.{scope}s, or remove the columns"
            )
        engine.run(f"CREATE TABLE {scope}_attributes ({key} INTEGER)", f"staging {scope}s")
        return 0, 0
    selected = col.select(engine, table, "item" if item else "user", configured)
    engine.run(
        f"""CREATE TABLE {scope}_attributes AS SELECT n.{key}{_list(selected)}
        FROM {table.view} s JOIN (SELECT {scope} AS "@id", {key} FROM {ids}) n ON s."@{scope}" = n."@id" """,
        f"{table.path}: staging {scope}s",
    )
    col.check_dense(engine, f"{scope}_attributes", "item" if item else "user", configured, table.path)
    matched = engine.row(f"SELECT count(*) FROM {scope}_attributes", table.path)[0]
    rows, known = engine.row(f"SELECT (SELECT count(*) FROM {table.view}), (SELECT count(*) FROM {ids})", table.path)
    return rows - matched, known - matched


def _check_label(engine: Engine, name: str, expression: str, table: Table) -> None:
    column = quote("label." + name)
    wrong = f"({column} IS NULL OR NOT ({column} = 0 OR {column} = 1))"
    total, bad, first = engine.row(
        f"SELECT count(*), count_if({wrong}), min(ordinal) FILTER ({wrong}) FROM impressions", table.path
    )
    if bad:
        value = engine.row(f"SELECT {column} FROM impressions WHERE ordinal = {first}", table.path)[0]
        raise PrepareError(
            f"{table.path}: labels.{name} ({expression!r}): {bad} of {total} values are neither 0 nor 1, e.g. "
            f"{'null' if value is None else value}; write the label as a condition, or remove those rows"
        )


def _counted(engine: Engine, table: Table, config: PrepareConfig, of: str) -> list[str]:
    """The values that counters over this log add up."""
    selected: list[str] = []
    for counter in config.counters:
        if counter.of == of:
            value = col.number(engine, table, counter.value, f"{table.path}: counters.{counter.name}.value")
            selected.append(f"{value} AS {quote('counter.' + counter.name)}")
    return selected


def _list(selected: list[str]) -> str:
    return "".join(", " + item for item in selected)
