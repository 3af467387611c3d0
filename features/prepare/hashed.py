"""Ids without a vocabulary: :mod:`features.hashing` in SQL, and how many ids met in a row."""

from __future__ import annotations

from collections.abc import Iterator

from features.dataset import HashInfo
from features.hashing import SALT
from features.prepare.engine import Engine, quote
from features.schema import PrepareConfig, Scope

RELATIONS: dict[Scope, str] = {
    "user": "user_attributes",
    "item": "item_attributes",
    "event": "events",
    "request": "staged",
    "candidate": "staged",
}


def hash_sql(value: str) -> str:
    """UBIGINT h of an integer or text in SQL; null of null."""
    return f"md5_number_upper('{SALT}' || CAST({value} AS VARCHAR))"


def count(engine: Engine, config: PrepareConfig) -> dict[str, HashInfo]:
    """Distinct ids and those that share a row, of every hashed column (``SCOPE.NAME``) and of hashed `user` and `item`.

    Columns are staged as hashes, so distinct ids are counted as distinct 64-bit hashes: among 10^9 ids, .03 pairs have
    the same one. The engine counts out of core.
    """
    return {name: _count(engine, name, buckets, hashes) for name, buckets, hashes in _hashed(config)}


def _hashed(config: PrepareConfig) -> Iterator[tuple[str, int, str]]:
    """Name, buckets, and SELECT of the hashes `h` of all that is hashed."""
    for kind in ("user", "item"):
        if (buckets := config.hash_buckets_of(kind)) is not None:
            yield kind, buckets, f"SELECT {hash_sql(kind)} AS h FROM {kind}s"
    for scope, relation in RELATIONS.items():
        for name, column in getattr(config.columns, scope).items():
            if column.hash_buckets is not None:
                stored = f"{scope}.{name}"
                value = f"unnest({quote(stored)})" if column.kind == "bag" else quote(stored)
                yield stored, column.hash_buckets, f"SELECT {value} AS h FROM {relation}"


def _count(engine: Engine, name: str, buckets: int, hashes: str) -> HashInfo:
    ids, sharing = engine.row(
        f"""SELECT coalesce(sum(n), 0), coalesce(sum(n) FILTER (n > 1), 0) FROM (
        SELECT count(*) AS n FROM (SELECT DISTINCT h FROM ({hashes}) WHERE h IS NOT NULL) GROUP BY h % {buckets})""",
        f"counting the hashed ids of {name}",
    )
    return HashInfo(buckets=buckets, ids=int(ids), sharing=int(sharing))
