"""DuckDB as the out-of-core engine: one database file in the staging folder, bounded memory, errors in our words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from features.prepare.errors import PrepareError, nearest

INTEGERS = frozenset(
    {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT"}
)
_MISSING = re.compile(r'[Rr]eferenced column "([^"]+)" (?:was )?not found')


def quote(name: str) -> str:
    """A column name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(value: object) -> str:
    """A string, or a list of strings, as an SQL literal."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(v) for v in value) + "]"  # pyright: ignore[reportUnknownVariableType]
    return "'" + str(value).replace("'", "''") + "'"


def is_integer(kind: str) -> bool:
    """Whether an SQL type is one of the integers."""
    return kind in INTEGERS


def is_float(kind: str) -> bool:
    """Whether an SQL type is a floating or decimal number."""
    return kind in {"FLOAT", "DOUBLE", "REAL"} or kind.startswith("DECIMAL")


def is_number(kind: str) -> bool:
    """Whether an SQL type can stand for a number; truth values count as 0 and 1."""
    return is_integer(kind) or is_float(kind) or kind == "BOOLEAN"


def element(kind: str) -> str | None:
    """Type of a list's elements, None for what is no list: ``element("INTEGER[]") == "INTEGER"``."""
    match = re.fullmatch(r"(.*)\[\d*\]", kind)
    return match.group(1) if match else None


class Engine:
    """A DuckDB connection that spills into `folder` and keeps to `memory_limit_gb` GiB."""

    def __init__(self, folder: Path, memory_limit_gb: float, threads: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._connection = duckdb.connect(
            str(folder / "prepare.duckdb"),
            config={
                "memory_limit": f"{int(memory_limit_gb * 1024)}MiB",
                "threads": threads,
                "temp_directory": str(folder / "spill"),
                "preserve_insertion_order": True,
            },
        )
        self._connection.execute("SET enable_progress_bar = false")

    def close(self) -> None:
        """Release the database file."""
        self._connection.close()

    def run(self, sql: str, about: str) -> None:
        """Execute a statement; `about` says in an error what was being done, to which file."""
        try:
            self._connection.execute(sql)
        except duckdb.Error as error:
            raise _translate(error, about) from error

    def rows(self, sql: str, about: str) -> list[tuple[Any, ...]]:
        """Rows of a small result."""
        try:
            return self._connection.execute(sql).fetchall()
        except duckdb.Error as error:
            raise _translate(error, about) from error

    def row(self, sql: str, about: str) -> tuple[Any, ...]:
        """The only row of a result."""
        return self.rows(sql, about)[0]

    def table(self, sql: str, about: str) -> pa.Table:
        """A result as Arrow, each column in one piece."""
        try:
            return self._connection.sql(sql).to_arrow_table().combine_chunks()
        except duckdb.Error as error:
            raise _translate(error, about) from error

    def types(self, relation: str, about: str) -> dict[str, str]:
        """Column names and SQL types of a view, table or ``(SELECT …)``."""
        return {str(name): str(kind) for name, kind, *_ in self.rows(f"DESCRIBE SELECT * FROM {relation}", about)}

    def bind(self, expression: str, relation: str, about: str, columns: dict[str, str]) -> str:
        """Type of a row-wise SQL expression over `relation`.

        The WHERE clause refuses aggregates and window functions: what looks at other rows could look ahead in time.
        """
        try:
            self._connection.execute(f"EXPLAIN SELECT 1 FROM {relation} WHERE ({expression}) IS NOT NULL")
            described = self._connection.execute(f"DESCRIBE SELECT ({expression}) AS x FROM {relation}").fetchall()
        except duckdb.Error as error:
            missing = _MISSING.search(str(error))
            if missing:
                name = missing.group(1)
                raise PrepareError(f"{about}: no column {name!r}; {nearest(name, columns)}") from error
            raise PrepareError(
                f"{about}: not a valid expression over one row: {expression!r} ({_first_line(error)})"
            ) from error
        return str(described[0][1])


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _translate(error: duckdb.Error, about: str) -> PrepareError:
    text = _first_line(error)
    if isinstance(error, duckdb.OutOfMemoryException) and "No space left" not in text and "disk" not in text.lower():
        return PrepareError(f"{about}: memory_limit_gb is too small for this step ({text}); raise it")
    if "No space left" in text or isinstance(error, duckdb.OutOfMemoryException):
        return PrepareError(f"{about}: disk full ({text}); free space beside the output folder, or choose another")
    if isinstance(error, duckdb.ConversionException | duckdb.OutOfRangeException):
        return PrepareError(
            f"{about}: a value does not fit its column's type ({text}); correct the column or its expression"
        )
    if isinstance(error, duckdb.IOException | duckdb.InvalidInputException | duckdb.SerializationException):
        return PrepareError(f"{about}: unreadable or damaged ({text}); write the file again")
    return PrepareError(f"{about}: {text}")
