"""The figures of a codebook against literal loops over items, pairs and events."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from features.semantic_ids.quantizers.protocol import Codes, Floats, State
from features.semantic_ids.report import (
    CodebookMeter,
    SidsReport,
    column_agreement,
    cooccurrence,
    draw_sample,
    make_report,
    neighbour_agreement,
    partial_reconstructions,
    prefixes,
    render,
)
from features.views import Lists


class Sums:
    """A quantiser whose codewords are given and whose space is the vectors' own."""

    def __init__(self, codewords: list[Floats]) -> None:
        self._codewords = codewords

    def encode(self, vectors: Floats) -> tuple[Codes, Floats]:
        raise NotImplementedError

    def codewords(self) -> list[Floats]:
        return self._codewords

    def decode(self, summed: Floats) -> Floats:
        return summed

    def state(self) -> State:
        return {}


def random_codes(seed: int, n: int, levels: list[int]) -> Codes:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, n) for size in levels], 1).astype(np.int32)


def random_vectors(seed: int, n: int, d: int) -> Floats:
    return np.random.default_rng(seed).normal(3, 1, (n, d)).astype(np.float32)


def metered(codes: Codes, levels: list[int], vectors: Floats | None = None, chunk: int = 1000) -> CodebookMeter:
    """A meter fed with random vectors, unless given, that every level reproduces a bit better."""
    vectors = random_vectors(0, len(codes), 3) if vectors is None else vectors
    meter = CodebookMeter(levels)
    for first in range(0, len(codes), chunk):
        some = vectors[first : first + chunk]
        partial = [some * np.float32(0.9 + 0.1 * level / len(levels)) for level in range(1, len(levels) + 1)]
        meter.update(codes[first : first + chunk], some, partial)
    return meter


def report_of(codes: Codes, levels: list[int], vectors: Floats | None = None) -> SidsReport:
    return make_report("sid", metered(codes, levels, vectors), items_without_content=0)


def all_pairs(n: int) -> Iterator[tuple[int, int]]:
    return itertools.combinations(range(n), 2)


def share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


# ------------------------------------------------------------------------------------------------ all items


def test_the_level_figures_are_what_loops_over_items_give():
    levels, n = [4, 9], 60
    codes, vectors = random_codes(1, n, levels), random_vectors(2, n, 3)
    codewords = [random_vectors(3 + level, size, 3) / (level + 1) for level, size in enumerate(levels)]
    meter = CodebookMeter(levels)
    meter.update(codes, vectors, partial_reconstructions(Sums(codewords), codes))

    mean = [sum(float(v[j]) for v in vectors) / n for j in range(3)]
    variance = sum((float(v[j]) - mean[j]) ** 2 for v in vectors for j in range(3))
    for level, found in enumerate(meter.levels()):
        error = 0.0
        for code, vector in zip(codes.tolist(), vectors.tolist(), strict=True):
            for j in range(3):
                made = sum(float(codewords[m][code[m]][j]) for m in range(level + 1))
                error += (vector[j] - made) ** 2
        counts = Counter(codes[:, level].tolist())
        entropy = -sum(count / n * math.log(count / n) for count in counts.values())
        assert found.level == level + 1
        assert found.codes == levels[level]
        assert found.used == len(counts)
        assert found.dead == pytest.approx(1 - len(counts) / levels[level])
        assert found.perplexity == pytest.approx(math.exp(entropy))
        assert found.largest == pytest.approx(max(counts.values()) / n)
        assert found.error == pytest.approx(error / variance, rel=1e-5)


def test_no_codeword_is_as_bad_as_the_mean_when_it_is_the_mean_and_exact_codes_leave_nothing():
    vectors = random_vectors(0, 20, 4)
    meter = CodebookMeter([2, 20])
    codes = np.stack([np.zeros(20), np.arange(20)], 1).astype(np.int32)
    meter.update(codes, vectors, [np.broadcast_to(vectors.mean(0), vectors.shape), vectors])
    first, second = meter.levels()
    assert first.error == pytest.approx(1)
    assert second.error == 0


def test_equal_vectors_have_no_variance_to_measure_by():
    report = report_of(np.zeros((4, 1), np.int32), [2], np.ones((4, 3), np.float32))
    assert report.levels[0].error is None
    assert report.distinct_vectors == 1
    assert report.duplicates == 4


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), n=st.integers(0, 40), chunk=st.integers(1, 41), mean=st.sampled_from([0, 1_000]))
def test_chunks_make_no_difference(seed: int, n: int, chunk: int, mean: int):
    codes, vectors = random_codes(seed, n, [3, 5]), random_vectors(seed, n, 3) + np.float32(mean)
    whole, parts = metered(codes, [3, 5], vectors), metered(codes, [3, 5], vectors, chunk)
    assert parts.items == whole.items == n
    assert parts.leaves() == whole.leaves()
    assert parts.vectors() == whole.vectors()
    for one, other in zip(parts.levels(), whole.levels(), strict=True):
        assert one.model_dump(exclude={"error"}) == other.model_dump(exclude={"error"})
        assert one.error == (None if other.error is None else pytest.approx(other.error, rel=1e-6))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_leaves_are_counted_as_by_a_dictionary(rows: list[tuple[int, int]]):
    leaves = metered(np.array(rows, np.int32), [4, 4]).leaves()
    sizes = sorted(Counter(rows).values())
    assert leaves.leaves == len(sizes)
    assert leaves.max == sizes[-1]
    assert leaves.median == (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2]) / 2
    assert leaves.p99 == next(s for s in sizes if sum(t <= s for t in sizes) >= 0.99 * len(sizes))
    assert leaves.unique == pytest.approx(sizes.count(1) / len(rows))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, -0.0, 1.0, 2.0])] * 2), min_size=1, max_size=40))
def test_duplicates_are_vectors_equal_as_numbers(rows: list[tuple[float, float]]):
    report = report_of(np.zeros((len(rows), 1), np.int32), [2], np.array(rows, np.float32))
    counts = Counter(rows)  # 0.0 == -0.0 here as well
    assert report.distinct_vectors == len(counts)
    assert report.duplicates == sum(count for count in counts.values() if count > 1)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.one_of(st.just((-1, -1, -1)), st.tuples(*[st.integers(0, 2**20 - 1) | st.integers(0, 2)] * 3)), max_size=30
    )
)
def test_prefix_numbers_agree_where_the_codes_do(rows: list[tuple[int, int, int]]):
    numbers = prefixes(np.array(rows, np.int32).reshape(-1, 3))
    for length in range(1, 4):
        for i, j in all_pairs(len(rows)):
            assert (numbers[i, length - 1] == numbers[j, length - 1]) == (rows[i][:length] == rows[j][:length])
    assert [(row < 0).all() for row in numbers] == [row[0] < 0 for row in rows]


def test_eight_levels_of_a_million_codes_do_not_overflow():
    codes = np.full((3, 8), 2**20 - 1, np.int32)
    codes[2, 7] -= 1
    assert prefixes(codes)[:, 7].tolist() == [1, 1, 0]


# ------------------------------------------------------------------------------------------------ agreement


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), n=st.integers(1, 30), k=st.integers(1, 12))
def test_neighbours_agree_as_often_as_a_loop_over_them_says(seed: int, n: int, k: int):
    codes, vectors = random_codes(seed, n, [2, 2]), random_vectors(seed, n, 3)
    found = neighbour_agreement(codes, vectors, k, items_in_all=50)
    near = [
        (i, j)
        for i in range(n)
        for j in sorted((x for x in range(n) if x != i), key=lambda x: float(np.square(vectors[i] - vectors[x]).sum()))[
            :k
        ]
    ]
    assert (found.neighbours, found.items, found.items_in_all) == (min(k, n - 1), n, 50)
    rows = codes.tolist()
    for prefix in found.prefixes:
        length = prefix.length
        assert prefix.share == pytest.approx(share([rows[i][:length] == rows[j][:length] for i, j in near]))
        assert prefix.chance == pytest.approx(share([rows[i][:length] == rows[j][:length] for i, j in all_pairs(n)]))


def test_neighbours_are_found_block_by_block(monkeypatch: pytest.MonkeyPatch):
    codes, vectors = random_codes(0, 50, [4]), random_vectors(0, 50, 3)
    whole = neighbour_agreement(codes, vectors, 5, 50)
    monkeypatch.setattr("features.semantic_ids.report.agreement._BLOCK", 100)  # 8 rows a block
    assert neighbour_agreement(codes, vectors, 5, 50) == whole


@settings(deadline=None, max_examples=20)
@given(
    st.lists(
        st.tuples(st.sampled_from([(0, 0), (0, 1), (1, 0), (1, 1), (-1, -1)]), st.integers(0, 3)),
        min_size=1,
        max_size=25,
    )
)
def test_columns_agree_as_often_as_a_loop_over_pairs_says(rows: list[tuple[tuple[int, int], int]]):
    codes, categories = np.array([c for c, _ in rows], np.int32), np.array([c for _, c in rows], np.int32)
    found = column_agreement("item.category", codes, categories, seed=0)
    known = [(code, category) for code, category in rows if category != 0 and code[0] >= 0]
    assert found.items == found.ami_items == len(known)
    assert found.unknown == sum(category == 0 and code[0] >= 0 for code, category in rows)
    pairs = [(known[i], known[j]) for i, j in all_pairs(len(known))]
    for prefix in found.prefixes:
        length = prefix.length
        inside = [(a, b) for a, b in pairs if a[0][:length] == b[0][:length]]
        assert prefix.share == pytest.approx(share([a[1] == b[1] for a, b in inside]))
        assert prefix.chance == pytest.approx(share([a[1] == b[1] for a, b in pairs]))
        if prefix.share is not None and prefix.chance:
            assert prefix.lift == pytest.approx(prefix.share / prefix.chance)


def test_codes_that_are_the_categories_agree_perfectly():
    categories = np.repeat(np.arange(1, 6), 20)
    codes = np.stack([7 - categories, np.tile(np.arange(4), 25)], 1).astype(np.int32)
    found = column_agreement("item.category", codes, categories, seed=0)
    assert found.prefixes[0].share == 1
    assert found.ami[0] == pytest.approx(1)
    assert found.ami[1] < 0.9  # the second code says what is not in the category


def test_random_codes_agree_as_chance_does():
    codes, categories = random_codes(0, 4_000, [8, 8]), np.random.default_rng(1).integers(1, 6, 4_000)
    found = column_agreement("item.category", codes, categories, seed=0)
    near = neighbour_agreement(codes, random_vectors(2, 4_000, 4), 10, 4_000)
    for prefix in found.prefixes:
        assert prefix.lift == pytest.approx(1, abs=0.03)
    assert found.ami == pytest.approx([0, 0], abs=0.01)
    assert near.prefixes[0].share == pytest.approx(near.prefixes[0].chance, abs=0.01)


def test_mutual_information_is_measured_on_a_drawn_sample_of_many_items(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("features.semantic_ids.report.agreement.AMI_ITEMS", 50)
    codes = random_codes(0, 200, [3])
    found = column_agreement("item.category", codes, codes[:, 0] + 1, seed=0)
    assert (found.items, found.ami_items) == (200, 50)
    assert found.ami == pytest.approx([1])


def test_a_sample_is_all_items_or_so_many_different_ones():
    assert draw_sample(5, 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    drawn = draw_sample(100, 30, seed=1)
    assert len(set(drawn.tolist())) == 30
    assert drawn.tolist() == sorted(drawn.tolist()) == draw_sample(100, 30, seed=1).tolist()
    assert drawn.tolist() != draw_sample(100, 30, seed=2).tolist()


# ------------------------------------------------------------------------------------------------ co-occurrence

HISTORIES = st.lists(st.lists(st.lists(st.integers(0, 6), max_size=9), max_size=4), max_size=3)
TABLE = [(-1, -1), (0, 0), (0, 0), (0, 1), (1, 0), (-1, -1), (1, 1)]


def lists(rows: list[list[int]]) -> Lists:
    offsets = np.cumsum([0, *map(len, rows)])
    return Lists(np.array([item for row in rows for item in row], np.int32), offsets)


@settings(deadline=None, max_examples=60)
@given(pieces=HISTORIES, window=st.integers(1, 4))
def test_cooccurrence_is_what_a_loop_over_events_gives(pieces: list[list[list[int]]], window: int):
    found = cooccurrence(map(lists, pieces), np.array(TABLE, np.int32), window)
    rows = [row for piece in pieces for row in piece]
    events = [item for row in rows for item in row]
    left_out = [item for item in events if TABLE[item][0] < 0]
    assert (found.window, found.events) == (window, len(events))
    assert (found.events_without_code, found.items_without_code) == (len(left_out), len(set(left_out)))
    pairs = [
        (row[i], row[j])
        for row in rows
        for i, j in all_pairs(len(row))
        if j - i <= window and row[i] != row[j] and TABLE[row[i]][0] >= 0 and TABLE[row[j]][0] >= 0
    ]
    coded = [item for item in events if TABLE[item][0] >= 0]
    drawn = [(a, b) for a, b in itertools.combinations(coded, 2) if a != b]
    assert found.pairs == len(pairs)
    for prefix in found.prefixes:
        length = prefix.length
        assert prefix.share == pytest.approx(share([TABLE[a][:length] == TABLE[b][:length] for a, b in pairs]))
        assert prefix.chance == pytest.approx(share([TABLE[a][:length] == TABLE[b][:length] for a, b in drawn]))


@settings(deadline=None, max_examples=30)
@given(pieces=HISTORIES, block=st.integers(1, 12))
def test_cooccurrence_is_the_same_in_small_blocks(pieces: list[list[list[int]]], block: int):
    codes = np.array(TABLE, np.int32)
    whole = cooccurrence(map(lists, pieces), codes, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("features.semantic_ids.report.agreement._BLOCK", block)
        assert cooccurrence(map(lists, pieces), codes, 2) == whole


# ------------------------------------------------------------------------------------------------ warnings


def with_dead(dead: int) -> Codes:
    """200 items, of a level with 100 codes."""
    return np.tile(np.arange(100 - dead), 10)[:200, None].astype(np.int32)


def test_more_than_a_fifth_of_dead_codes_is_warned_of_with_what_to_change():
    assert report_of(with_dead(20), [100]).warnings == []
    (warning,) = report_of(with_dead(21), [100]).warnings
    assert warning.startswith("level 1: 21.0% of its 100 codes are dead")
    assert "fewer codes at this level (levels), more items, other content" in warning
    assert "rqvae, a larger dead_below" in warning


def test_more_codes_than_different_vectors_is_said():
    (warning,) = report_of(np.arange(30, dtype=np.int32)[:, None], [100]).warnings
    assert "70.0% of its 100 codes are dead" in warning
    assert "only 30 different content vectors" in warning


def test_a_level_that_leaves_the_error_where_it_was_is_warned_of():
    vectors = random_vectors(0, 100, 3)
    codes = np.stack([np.arange(100) % 4] * 3, 1).astype(np.int32)
    meter = CodebookMeter([4, 4, 4])
    centred = vectors - vectors.mean(0)
    meter.update(codes, vectors, [vectors - np.float32(left) * centred for left in (0.5, 0.4999, 0.4)])
    warnings = [w for w in make_report("sid", meter, 0).warnings if "error" in w]
    assert [w[:8] for w in warnings] == ["level 2:"]
    assert "an error of 0.2499 of the variance, 0.2500 without it" in warnings[0]


def test_duplicates_missing_content_and_a_collapsed_level_are_warned_of():
    vectors = np.repeat(random_vectors(0, 50, 3), 2, axis=0)
    codes = np.minimum(np.arange(100), 3)[:, None].astype(np.int32)
    warnings = make_report("sid", metered(codes, [4], vectors), items_without_content=101).warnings
    assert len(warnings) == 3
    assert "101 of 201 items have no content" in warnings[0]
    assert "100 of 100 items have the same content vector" in warnings[1]
    assert "level 1: one code holds 97.0% of the items" in warnings[2]


def test_shared_semantic_ids_are_warned_of_only_where_the_codes_leave_room():
    codes = np.stack([np.arange(64) % 16] * 2, 1).astype(np.int32)  # 16 of 256 leaves, 4 items each
    assert report_of(codes, [16, 16]).warnings == []
    few = codes[:20]
    warnings = report_of(few, [16, 16]).warnings
    assert report_of(few, [16, 16]).leaves.unique > 0.5
    assert warnings == []
    (warning,) = report_of(np.concatenate([codes[:12]] * 2), [15, 16]).warnings[-1:]
    assert "only 0.0% of the items have a semantic ID of their own although there are 240 for 24 items" in warning


def test_no_items_make_a_report_all_the_same():
    report = report_of(np.empty((0, 2), np.int32), [4, 4], np.empty((0, 3), np.float32))
    assert report.items == report.leaves.leaves == report.distinct_vectors == 0
    assert all("dead" in warning for warning in report.warnings)
    assert len(report.warnings) == 2


# ------------------------------------------------------------------------------------------------ JSON, tables


@pytest.fixture(scope="module")
def full() -> SidsReport:
    codes = random_codes(0, 3_000, [8, 64])
    return make_report(
        "sid",
        metered(codes, [8, 64]),
        items_without_content=7,
        neighbours=neighbour_agreement(codes[:100], random_vectors(0, 100, 3), 10, 3_000),
        columns=[column_agreement("item.genre", codes, codes[:, 0], seed=0)],
        cooccurrence=cooccurrence([lists([[0, 1, 2], [3, 4]])], np.vstack([[[-1, -1]], codes]).astype(np.int32), 2),
    )


def test_the_report_is_read_back_from_its_json(full: SidsReport):
    text = full.model_dump_json()
    assert SidsReport.model_validate_json(text) == full
    assert json.loads(text)["items_without_content"] == 7


def test_the_tables_hold_the_figures(full: SidsReport, capsys: pytest.CaptureFixture[str]):
    warned = full.model_copy(update={"warnings": ["level 2: something is wrong"]})
    console = Console(width=120)
    for part in render(warned):
        console.print(part)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "sid: 3,000 items with content, 7 without; 3,000 different vectors, 0 items share theirs" in text
    for level in full.levels:
        assert f"{level.perplexity:,.1f}" in text
        assert f"{level.largest:.1%}" in text
        assert f"{level.error:.4f}" in text
    assert f"{full.leaves.leaves:,} leaves" in text
    assert "10 nearest neighbours, sought among 100 of 3,000 items" in text
    assert full.neighbours is not None
    assert f"{full.neighbours.prefixes[0].share:.4f}" in text
    column = full.columns[0]
    assert f"item.genre: same value within a prefix; {column.items:,} items, {column.unknown:,} unknown" in text
    assert f"{column.prefixes[0].lift:.2f}" in text
    assert "5 training events, 2 pairs, 1 events of 1 items without code left out" in text
    assert "Warning: level 2: something is wrong" in text
