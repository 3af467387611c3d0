"""From a config's columns to SQL that gives each its stored type, checked against the table's columns beforehand.

Stored types: categorical BIGINT or VARCHAR (INTEGER bucket with `edges`), bag BIGINT[] or VARCHAR[], dense FLOAT,
vector FLOAT[], text VARCHAR; with `hash_buckets` UBIGINT and UBIGINT[], the values' hashes.
:mod:`features.prepare.encode` turns them into indices and numbers.
"""

from __future__ import annotations

from collections.abc import Mapping

from features.prepare.engine import Engine, element, is_float, is_integer, is_number, quote
from features.prepare.errors import PrepareError
from features.prepare.hashed import hash_sql
from features.prepare.sources.tables import Table
from features.schema import ColumnConfig, Scope


def stored(scope: Scope, name: str) -> str:
    """A column's name in files and staging tables."""
    return f"{scope}.{name}"


def select(
    engine: Engine,
    table: Table,
    scope: Scope,
    columns: Mapping[str, ColumnConfig],
    extra: Mapping[str, str] | None = None,
) -> list[str]:
    """Items of a SELECT list over `table`'s view; `extra` are further columns (name → type) expressions may use.

    Raises:
        PrepareError: an expression names a missing column or has a type that its kind cannot be made from.
    """
    types = {name: kind for name, kind in table.types.items() if not name.startswith("@")} | dict(extra or {})
    view = table.view
    if extra:
        nulls = ", ".join(f"CAST(NULL AS {kind}) AS {quote(name)}" for name, kind in extra.items())
        view = f"(SELECT *, {nulls} FROM {table.view})"
    selected: list[str] = []
    for name, config in columns.items():
        about = f"{table.path}: columns.{scope}.{name}"
        expression = config.source if config.source is not None else quote(name)
        kind = engine.bind(expression, view, about, types)
        selected.append(f"{_convert(f'({expression})', kind, config, about)} AS {quote(stored(scope, name))}")
    return selected


def number(engine: Engine, table: Table, expression: str, about: str, extra: Mapping[str, str] | None = None) -> str:
    """A numeric expression as SQL, truth values as 0 and 1."""
    types = {name: kind for name, kind in table.types.items() if not name.startswith("@")} | dict(extra or {})
    kind = engine.bind(expression, table.view, about, types)
    if not is_number(kind):
        raise PrepareError(f"{about}: {expression!r} has type {kind}, not a number; compare or cast it")
    return f"CAST(({expression}) AS DOUBLE)"


def _convert(sql: str, kind: str, config: ColumnConfig, about: str) -> str:
    match config.kind:
        case "categorical":
            if config.edges is not None:
                return _bucket(sql, kind, config.edges, about)
            value = _value(sql, kind, about)
            return hash_sql(value) if config.hash_buckets is not None else value
        case "bag":
            values = _bag(sql, kind, config.separator, about)
            return f"list_transform({values}, lambda v: {hash_sql('v')})" if config.hash_buckets is not None else values
        case "dense":
            if not is_number(kind):
                raise PrepareError(
                    f"{about}: type {kind} for a dense column; it needs numbers: cast it, or make it categorical"
                )
            return (
                f"coalesce(CAST({sql} AS FLOAT), CAST({'NULL' if config.default is None else config.default} AS FLOAT))"
            )
        case "vector":
            inner = element(kind)
            if inner is None or not is_number(inner):
                raise PrepareError(f"{about}: type {kind} for a vector column; it needs a list of numbers")
            return f"CAST({sql} AS FLOAT[])"
        case "text":
            return _text(sql, kind, about)


def _value(sql: str, kind: str, about: str) -> str:
    if is_integer(kind) or kind == "BOOLEAN":
        return f"CAST({sql} AS BIGINT)"
    if is_float(kind):
        raise PrepareError(
            f"{about}: type {kind} for a categorical column; give it edges, or cast it to an integer or string"
        )
    if element(kind) is not None or kind.startswith(("STRUCT", "MAP")):
        raise PrepareError(f"{about}: type {kind} for a categorical column; make it a bag, or pick one value")
    return f"CAST({sql} AS VARCHAR)"


def _bucket(sql: str, kind: str, edges: list[float], about: str) -> str:
    """Null and NaN are 0, else 1 + the number of edges at or below the value."""
    if not is_number(kind):
        raise PrepareError(f"{about}: type {kind} cannot be cut at edges; it needs numbers")
    value = f"CAST({sql} AS DOUBLE)"
    steps = " + ".join(f"CAST({value} >= {float(edge)!r} AS INTEGER)" for edge in edges) or "0"
    return f"CASE WHEN {value} IS NULL OR isnan({value}) THEN 0 ELSE 1 + {steps} END"


def _bag(sql: str, kind: str, separator: str | None, about: str) -> str:
    inner = element(kind)
    if inner is None:
        if kind != "VARCHAR" or separator is None:
            raise PrepareError(f"{about}: type {kind} for a bag; it needs a list, or a string and its separator")
        parts = f"string_split({sql}, '{separator.replace(chr(39), chr(39) * 2)}')"
        return f"list_filter(list_transform({parts}, lambda x: trim(x)), lambda x: x <> '')"
    if is_integer(inner) or inner == "BOOLEAN":
        return f"CAST({sql} AS BIGINT[])"
    if is_float(inner) or element(inner) is not None:
        raise PrepareError(f"{about}: type {kind} for a bag; its values must be integers or strings")
    return f"CAST({sql} AS VARCHAR[])"


def _text(sql: str, kind: str, about: str) -> str:
    """A string, or a list of them joined with spaces; null is the empty string."""
    if element(kind) == "VARCHAR":
        sql = f"array_to_string({sql}, ' ')"
    elif kind != "VARCHAR" and not kind.startswith("ENUM"):
        raise PrepareError(
            f"{about}: type {kind} for a text column; it needs a string or a list of strings: cast it to VARCHAR"
        )
    return f"coalesce(CAST({sql} AS VARCHAR), '')"


def check_dense(engine: Engine, relation: str, scope: Scope, columns: Mapping[str, ColumnConfig], about: str) -> None:
    """Refuse dense and vector values that are not finite, nulls without a default, vectors of changing length.

    Raises:
        PrepareError: with the column, the count and what to do.
    """
    numeric = {name: c for name, c in columns.items() if c.kind in ("dense", "vector")}
    if not numeric:
        return
    checks: list[str] = []
    for name, config in numeric.items():
        column = quote(stored(scope, name))
        if config.kind == "dense":
            low = -1.0 if config.transform == "log1p" else float("-inf")
            floor = f" OR {column} <= {low!r}" if config.transform == "log1p" else ""
            checks += [f"count_if({column} IS NULL)", f"count_if(NOT isfinite({column}){floor})", "0", "0"]
        else:
            checks += [
                "0", f"count_if(list_bool_or(list_transform({column}, lambda x: x IS NULL OR NOT isfinite(x))))",
                f"min(len({column}))", f"max(len({column}))",
            ]  # fmt: skip
    found = engine.row(f"SELECT count(*), {', '.join(checks)} FROM {relation}", about)
    for position, (name, config) in enumerate(numeric.items()):
        null, wrong, shortest, longest = found[1 + 4 * position : 5 + 4 * position]
        where = f"{about}: columns.{scope}.{name}"
        if null:
            raise PrepareError(f"{where}: {null} of {found[0]} values are null; set `default`, or fill them")
        if wrong:
            allowed = "greater than -1 (log1p)" if config.transform == "log1p" else "finite"
            raise PrepareError(
                f"{where}: {wrong} of {found[0]} values are not {allowed}; correct them in the source expression"
            )
        if shortest != longest:
            raise PrepareError(f"{where}: vectors of {shortest} to {longest} numbers; all must have the same length")
