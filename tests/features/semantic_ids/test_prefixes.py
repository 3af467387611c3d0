"""Rows of SID prefixes: equal prefixes share a row, others do not unless hashed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.semantic_ids.errors import SidsError
from features.semantic_ids.prefixes import Prefixes


@st.composite
def coded(draw: st.DrawFn) -> tuple[list[int], np.ndarray]:
    """Level sizes and the codes of some items."""
    levels = draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))
    items = draw(st.lists(st.tuples(*(st.integers(0, k - 1) for k in levels)), max_size=30))
    return levels, np.array(items, np.int32).reshape(-1, len(levels))


@given(coded())
@settings(max_examples=60, deadline=None)
def test_with_room_for_all_two_items_share_a_row_just_where_they_share_the_prefix(case: tuple[list[int], np.ndarray]):
    levels, codes = case
    prefixes = Prefixes(levels, buckets=10**6)
    rows = prefixes.rows(codes)
    assert not prefixes.hashed
    assert prefixes.size == 1 + sum(math.prod(levels[: i + 1]) for i in range(len(levels)))
    seen: dict[tuple[int, ...], int] = {}
    for item, of_item in zip(codes.tolist(), rows.tolist(), strict=True):
        for level, row in enumerate(of_item):
            assert seen.setdefault(tuple(item[: level + 1]), row) == row
            assert 1 <= row < prefixes.size
    assert len(set(seen.values())) == len(seen)


@given(coded(), st.integers(2, 40))
@settings(max_examples=60, deadline=None)
def test_hashed_rows_stay_in_the_table_and_equal_prefixes_share_one(case: tuple[list[int], np.ndarray], buckets: int):
    levels, codes = case
    prefixes = Prefixes(levels, buckets)
    rows = prefixes.rows(codes)
    assert prefixes.size <= buckets or not prefixes.hashed
    seen: dict[tuple[int, ...], int] = {}
    for item, of_item in zip(codes.tolist(), rows.tolist(), strict=True):
        for level, row in enumerate(of_item):
            assert seen.setdefault(tuple(item[: level + 1]), row) == row
            assert 1 <= row < prefixes.size


def test_hashing_spreads_prefixes_about_evenly():
    levels = [256, 256, 256]
    codes = np.random.default_rng(0).integers(0, 256, (50_000, 3))
    rows = Prefixes(levels, buckets=1_001).rows(codes)[:, 2]
    counts = np.bincount(rows, minlength=1_001)[1:]
    assert counts.min() > 10  # 50 on average; the least of a thousand Poisson draws is about 29
    assert counts.max() < 110


def test_a_prefix_at_one_level_is_not_the_same_codes_at_another():
    rows = Prefixes([4, 4, 4], buckets=60).rows(np.zeros((1, 3), np.int32))
    assert len(set(rows[0].tolist())) == 3


def test_the_rows_of_a_hashed_table_never_change():
    """Tables trained with them would be read in another order."""
    rows = Prefixes([1024, 1024, 1024], buckets=100_000).rows(np.array([[1, 2, 3], [1023, 0, 512]]))
    assert rows.tolist() == ROWS


ROWS = [[91087, 81528, 73348], [78002, 47311, 7586]]


@given(coded(), st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_grown_codebook_finds_the_rows_of_the_prefixes_it_had(case: tuple[list[int], np.ndarray], more: list[int]):
    """And of those alone."""
    levels, codes = case
    grown = [k + m for k, m in zip(levels, more, strict=False)]
    older, newer = Prefixes(levels, 10**6), Prefixes(grown, 10**6)
    found = newer.rows_in(older, np.arange(newer.size))
    assert np.array_equal(found[newer.rows(codes)], older.rows(codes))
    assert sorted(found[found >= 0].tolist()) == list(range(older.size))
    assert found[0] == 0


def test_hashed_prefixes_keep_their_rows_where_the_hash_is_the_same():
    older, newer = Prefixes([9, 9], 20), Prefixes([9, 12], 20)
    codes = np.array([[3, 4], [8, 8]])
    assert np.array_equal(newer.rows_in(older, newer.rows(codes)), older.rows(codes))
    for other in (Prefixes([9, 12], 30), Prefixes([9, 12], 10**6), Prefixes([9], 20)):
        with pytest.raises(SidsError, match=r"have no rows in a table of \[9, 9\] in 20, hashed; keep path_buckets"):
            other.rows_in(older, np.arange(3))
