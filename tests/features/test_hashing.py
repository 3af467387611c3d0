"""The rule by which ids without a vocabulary become rows: pinned, spread evenly, the same in Python, NumPy and SQL."""

from __future__ import annotations

import hashlib

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.hashing import MOST_BUCKETS, hash_of, row_of, rows_of
from features.prepare.hashed import hash_sql

TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
IDS = st.one_of(TEXTS, st.integers(-(2**63), 2**63 - 1))
BUCKETS = st.integers(1, MOST_BUCKETS)


def by_sql(values: list[str] | list[int]) -> list[int]:
    """Hashes as DuckDB makes them."""
    kind = "BIGINT[]" if values and isinstance(values[0], int) else "VARCHAR[]"
    found = duckdb.connect().execute(f"SELECT {hash_sql('v')} FROM (SELECT unnest(?::{kind}) AS v)", [values])
    return [h for (h,) in found.fetchall()]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(42, 1594813871803611071), ("42", 1594813871803611071), (True, hash_of(1)), ("u-17", 9445361063163059323)],
)
def test_hashes_never_change(value: int | str, expected: int) -> None:
    """What a trained table has learned depends on them."""
    assert hash_of(value) == expected


@given(IDS, BUCKETS)
def test_a_row_is_one_of_the_buckets_and_never_the_reserved_one(value: int | str, buckets: int) -> None:
    assert 1 <= row_of(value, buckets) <= buckets
    assert row_of(None, buckets) == 0


@given(IDS, BUCKETS)
def test_a_row_follows_from_the_rule_as_it_is_documented(value: int | str, buckets: int) -> None:
    digest = hashlib.md5(b"#" + str(value).encode("utf-8")).digest()
    h = sum(byte << (8 * place) for place, byte in enumerate(digest[:8]))
    assert row_of(value, buckets) == 1 + h % buckets


@settings(deadline=None, max_examples=25)
@given(st.one_of(st.lists(TEXTS, max_size=30), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30)), BUCKETS)
def test_sql_numpy_and_python_agree(values: list[str] | list[int], buckets: int) -> None:
    hashes = by_sql(values)
    assert hashes == [hash_of(v) for v in values]
    rows = rows_of(np.array(hashes, np.uint64), buckets)
    assert rows.dtype == np.int32
    assert rows.tolist() == [row_of(v, buckets) for v in values]


@pytest.mark.parametrize("ids", [range(100_000), [f"user-{n:08}" for n in range(100_000)], range(0, 10**9, 10_000)])
def test_ids_that_follow_a_pattern_spread_as_random_ones_do(ids: list[str] | range) -> None:
    buckets = 1_000
    counts = np.bincount([row_of(v, buckets) for v in ids], minlength=buckets + 1)[1:]
    expected = len(ids) / buckets
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - (buckets - 1)) < 5 * np.sqrt(2 * (buckets - 1))


def test_rows_tell_nothing_of_a_users_share_in_the_validation_split() -> None:
    """`split.valid_users` draws users by a hash of the same ids: those drawn must have rows that others have too."""
    ids = range(20_000)
    digests = [hashlib.md5(str(n).encode()).digest() for n in ids]
    validates = np.array([int.from_bytes(d[:8], "little") % 1_000_000 < 100_000 for d in digests])
    rows = np.array([row_of(n, 1_000) for n in ids])
    assert 1_500 < validates.sum() < 2_500
    assert np.isin(rows[validates], rows[~validates]).all()
