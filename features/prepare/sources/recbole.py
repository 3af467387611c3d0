"""RecBole's atomic files, tab separated with ``name:type`` headers: https://recbole.io/docs/user_guide/data/atomic_files.html

Values are never quoted: a quotation mark in a title is part of it.
"""

from __future__ import annotations

from pathlib import Path

from features.prepare.engine import Engine, literal, quote
from features.prepare.errors import PrepareError
from features.prepare.sources.tables import Logs, Table, open_table
from features.schema import RecBoleSource

_SQL = {
    "token": "nullif({0}, '')",
    "float": "CAST(nullif({0}, '') AS DOUBLE)",
    "token_seq": "list_filter(string_split({0}, ' '), lambda x: x <> '')",
    "float_seq": "CAST(list_filter(string_split({0}, ' '), lambda x: x <> '') AS DOUBLE[])",
}


def open_recbole(engine: Engine, source: RecBoleSource) -> Logs:
    """Load NAME.inter as events and, where they exist, NAME.item and NAME.user as attributes."""
    stem = source.name or source.path.name

    def table(kind: str, view: str, names: dict[str, str]) -> Table | None:
        path = source.path / f"{stem}.{kind}"
        if not path.is_file():
            return None
        _load(engine, path, f"raw_{kind}")
        unit = source.time_unit
        return open_table(engine, view, f"raw_{kind}", str(path), names, unit=unit, ordinal="row", keys=tuple(names))

    events = table("inter", "src_events", {"user": "user_id", "item": "item_id", "time": source.time})
    if events is None:
        raise PrepareError(
            f"{source.path / stem}.inter: no such file; check source.path, or set source.name to the files' stem"
        )
    items = table("item", "src_items", {"item": "item_id"})
    return Logs(events=events, items=items, users=table("user", "src_users", {"user": "user_id"}))


def _load(engine: Engine, path: Path, table: str) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline().rstrip("\r\n").split("\t")
    except (OSError, UnicodeDecodeError) as error:
        raise PrepareError(f"{path}: unreadable ({error}); atomic files are UTF-8 text") from error
    fields: dict[str, str] = {}
    for field in header:
        name, _, kind = field.partition(":")
        if kind not in _SQL:
            raise PrepareError(
                f"{path}: header field {field!r} is not NAME:TYPE with a type of {', '.join(_SQL)}; add its type"
            )
        fields[name] = kind
    raw = "{" + ", ".join(f"{literal(name)}: 'VARCHAR'" for name in fields) + "}"
    columns = ", ".join(f"{_SQL[kind].format(quote(name))} AS {quote(name)}" for name, kind in fields.items())
    engine.run(
        f"""CREATE TABLE {table} AS SELECT row_number() OVER () AS row, {columns} FROM read_csv({literal(str(path))},
        delim = '\t', header = true, quote = '', escape = '', auto_detect = false, columns = {raw})""",
        str(path),
    )
