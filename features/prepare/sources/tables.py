"""What every adapter gives: tables whose key columns bear one set of names, whatever the files call them.

A :class:`Table` is a view with the file's own columns (expressions in a config are written over those) and
``"@user"``, ``"@item"`` (BIGINT or VARCHAR), ``"@ordinal"`` (BIGINT, unique, in file order), ``time`` (BIGINT, ms);
impressions may also have ``"@request"`` and ``"@split"`` (0 train, 1 valid, 2 test).
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.prepare.engine import Engine, is_float, is_integer, literal, quote
from features.prepare.errors import PrepareError, nearest
from features.schema import TimeUnit

MS_PER_UNIT: dict[TimeUnit, float] = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
FILE_BITS = 40  # ordinal = file number · 2^40 + row number


@dataclass(frozen=True)
class Table:
    """One log or attribute table, opened as a view."""

    view: str
    path: str
    """what errors call it"""
    names: Mapping[str, str]
    """our key name → the file's column"""
    types: Mapping[str, str]
    """column → SQL type"""
    time_unit: TimeUnit = "ms"

    def about(self, key: str) -> str:
        """File and column of a key, for messages."""
        return f"{self.path}: column {self.names.get(key, key)!r}"


@dataclass(frozen=True)
class Logs:
    """All tables of a source; `dropped` counts rows the adapter left out, by reason."""

    events: Table | None = None
    impressions: Table | None = None
    items: Table | None = None
    users: Table | None = None
    dropped: dict[str, int] = field(default_factory=lambda: {})


def files_of(path: Path, suffix: str = ".parquet") -> list[str]:
    """The files a path, folder or glob stands for, sorted.

    Raises:
        PrepareError: there are none.
    """
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob(f"*{suffix}") if p.is_file() and not p.name.startswith((".", "_")))
        if not found:
            raise PrepareError(f"{path}: the folder has no *{suffix} file; check the path")
        return found
    if path.is_file():
        return [str(path)]
    found = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = f"{path.parent} — {nearest(path.name, siblings)}" if siblings else f"there is no folder {path.parent}"
        raise PrepareError(f"{path}: no such file; {hint}")
    return found


def parquet_scan(files: list[str]) -> str:
    """SQL that reads Parquet files, after their footers were found whole."""
    for name in files:
        try:
            pq.read_metadata(name)
        except (OSError, pa.ArrowInvalid, pa.ArrowException) as error:
            raise PrepareError(
                f"{name}: not a readable Parquet file, truncated perhaps ({error}); write it again"
            ) from error
    return f"read_parquet({literal(files)}, union_by_name = true)"


ORDINAL = f"(CAST(file_index AS BIGINT) << {FILE_BITS}) + file_row_number"


def id_sql(column: str, kind: str, about: str) -> str:
    """SQL that normalises an id column to BIGINT or VARCHAR."""
    if is_integer(kind):
        return f"CAST({column} AS BIGINT)"
    if kind in {"VARCHAR", "UUID"} or kind.startswith("ENUM"):
        return f"CAST({column} AS VARCHAR)"
    raise PrepareError(f"{about} has type {kind}; ids are integers or strings: write it as one of those")


def time_sql(column: str, kind: str, unit: TimeUnit, about: str) -> str:
    """SQL that gives milliseconds. Out of range input stays out of range rather than overflowing."""
    if kind.startswith("TIMESTAMP") or kind == "DATE":
        return f"epoch_ms({column})" if "ZONE" in kind else f"epoch_ms(CAST({column} AS TIMESTAMP))"
    if is_integer(kind):
        match unit:
            case "s":
                return f"CAST(least(greatest({column}, -9000000000000000), 9000000000000000) AS BIGINT) * 1000"
            case "ms":
                return f"CAST({column} AS BIGINT)"
            case "us":
                return f"CAST({column} AS BIGINT) // 1000"
            case "ns":
                return f"CAST({column} AS BIGINT) // 1000000"
    if is_float(kind):
        return f"CAST(round(least(greatest(CAST({column} AS DOUBLE), -9e15), 9e15) * {MS_PER_UNIT[unit]}) AS BIGINT)"
    raise PrepareError(f"{about} has type {kind}; times are timestamps or numbers: write it as one of those")


def open_table(
    engine: Engine,
    view: str,
    scan: str,
    path: str,
    names: Mapping[str, str],
    *,
    unit: TimeUnit = "ms",
    ordinal: str = ORDINAL,
    keys: tuple[str, ...] = ("user", "item", "time"),
) -> Table:
    """Make the view of a table from SQL that reads it.

    Args:
        scan: a table function or ``(SELECT …)``.
        names: our key name → column; keys not named go by their own name. `request` and `split` are optional.
        ordinal: SQL of the row's place in the files.

    Raises:
        PrepareError: a key column is missing or of a wrong type.
    """
    types = engine.types(scan, path)
    optional = tuple(k for k in ("request", "split") if k in names or (k in types and "time" in keys))
    named = {key: names.get(key, key) for key in (*keys, *optional)}
    for key, column in named.items():
        if column not in types:
            raise PrepareError(
                f"{path}: no column {column!r} for {key!r}; {nearest(column, types)}; name it under `columns`"
            )
    selected: list[str] = [f"{ordinal} AS {quote('@ordinal')}"]
    for key, column in named.items():
        about, kind, source = f"{path}: column {column!r}", types[column], quote(column)
        if key == "time":
            selected.append(f"{time_sql(source, kind, unit, about)} AS time")
        elif key == "split":
            selected.append(f"{_split_sql(source)} AS {quote('@split')}")
        else:
            selected.append(f"{id_sql(source, kind, about)} AS {quote('@' + key)}")
    own = [quote(c) for c in types if not (c == "time" and "time" in named)]
    engine.run(f"CREATE VIEW {view} AS SELECT {', '.join([*selected, *own])} FROM {scan}", path)
    return Table(view, path, named, engine.types(view, path), unit)


def _split_sql(column: str) -> str:
    """0, 1, 2 for the names splits go by; anything else becomes NULL and is reported by the validation."""
    return (
        f"CASE lower(CAST({column} AS VARCHAR)) WHEN 'train' THEN 0 WHEN 'valid' THEN 1 WHEN 'val' THEN 1 "
        f"WHEN 'validation' THEN 1 WHEN 'dev' THEN 1 WHEN 'test' THEN 2 END"
    )
