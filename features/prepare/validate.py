"""Checks of the values in the key columns, in one scan a table: null and negative ids, times that cannot be."""

from __future__ import annotations

from features.instants import instant_ms, iso
from features.prepare.engine import Engine, is_integer, quote
from features.prepare.errors import PrepareError
from features.prepare.sources.tables import MS_PER_UNIT, Logs, Table
from features.schema import TimeUnit


def validate(engine: Engine, logs: Logs, time_range: tuple[str, str]) -> int:
    """Check every table; returns the number of events and impressions.

    Raises:
        PrepareError: names the file, the column, an example, and the remedy.
    """
    earliest, latest = (instant_ms(text, "time_range") for text in time_range)
    rows = 0
    for table in (logs.events, logs.impressions):
        if table is not None:
            rows += _validate_ids(engine, table, [k for k in ("user", "item", "request", "split") if k in table.names])
            _validate_times(engine, table, earliest, latest)
    for table, key in ((logs.items, "item"), (logs.users, "user")):
        if table is not None:
            _validate_ids(engine, table, [key])
            _validate_unique(engine, table, key)
    _validate_same_kind(logs)
    return rows


def _validate_ids(engine: Engine, table: Table, keys: list[str]) -> int:
    checks = ["count(*)"]
    for key in keys:
        column = quote("@" + key)
        checks.append(f"count_if({column} IS NULL)")
        if is_integer(table.types["@" + key]):
            checks += [f"count_if({column} < 0)", f"min({column})"]
        else:
            checks += [f"count_if({column} = '')", "NULL"]
    found = engine.row(f"SELECT {', '.join(checks)} FROM {table.view}", table.path)
    total = found[0]
    for position, key in enumerate(keys):
        null, negative, example = found[1 + 3 * position : 4 + 3 * position]
        about = table.about(key)
        if null and key == "split":
            source = f"CAST({quote(table.names[key])} AS VARCHAR)"
            sql = f'SELECT DISTINCT {source} AS v FROM {table.view} WHERE "@split" IS NULL ORDER BY v LIMIT 3'
            names = ", ".join(repr(v[0]) for v in engine.rows(sql, table.path))
            raise PrepareError(f"{about}: {null} of {total} rows hold {names}; a split is train, valid or test")
        if null:
            raise PrepareError(f"{about}: {null} of {total} ids are null; remove those rows or give them an id")
        if negative:
            kind = f"negative, e.g. {example}" if example is not None else "empty strings"
            raise PrepareError(
                f"{about}: {negative} of {total} ids are {kind}; remove those rows or map them to valid ids"
            )
    return total


def _validate_times(engine: Engine, table: Table, earliest: int, latest: int) -> None:
    wrong = f"time < {earliest} OR time >= {latest}"
    total, null, outside, example, low, high = engine.row(
        f"""SELECT count(*), count_if(time IS NULL), count_if({wrong}), arg_min(time, "@ordinal") FILTER ({wrong}),
        min(time), max(time)
        FROM {table.view}""",
        table.path,
    )
    about = table.about("time")
    if null:
        raise PrepareError(f"{about}: {null} of {total} times are null; remove those rows")
    if not outside:
        return
    raw = example / MS_PER_UNIT[table.time_unit]
    fitting: list[TimeUnit] = [
        unit for unit, scale in MS_PER_UNIT.items() if earliest <= raw * scale < latest and unit != table.time_unit
    ]
    if fitting:
        unit = fitting[0]
        likely = f"{raw:.0f} read as {unit} is {iso(round(raw * MS_PER_UNIT[unit]))}: set time_unit: {unit}"
    else:
        likely = "correct those rows, or widen time_range"
    raise PrepareError(
        f"{about}: {outside} of {total} times lie outside time_range {iso(earliest)} … {iso(latest)}, "
        f"e.g. {iso(example)} (all: {iso(low)} … {iso(high)}); {likely}"
    )


def _validate_unique(engine: Engine, table: Table, key: str) -> None:
    column = quote("@" + key)
    repeated = engine.rows(
        f"SELECT {column}, count(*) FROM {table.view} GROUP BY {column} HAVING count(*) > 1 ORDER BY ALL LIMIT 1",
        table.path,
    )
    if repeated:
        value, count = repeated[0]
        raise PrepareError(f"{table.about(key)}: {value!r} has {count} rows; give each {key} one row of attributes")


def _validate_same_kind(logs: Logs) -> None:
    """Ids must be integers in all tables or strings in all, or they would never meet."""
    for key in ("user", "item"):
        tables = [
            t for t in (logs.events, logs.impressions, logs.items, logs.users) if t is not None and "@" + key in t.types
        ]
        for table in tables[1:]:
            first, kind = tables[0].types["@" + key], table.types["@" + key]
            if first != kind:
                raise PrepareError(
                    f"{table.about(key)} holds {kind} but {tables[0].about(key)} holds {first}; "
                    "write both as the same type"
                )
