"""Words weighted by TF-IDF, by loops, and what items without words get."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.utils import murmurhash3_32

from features.dataset import Dataset
from features.semantic_ids.config import TextPart
from features.semantic_ids.content import text
from features.semantic_ids.errors import SidsError
from tests.features.prepare import logs
from tests.features.semantic_ids.content_logs import Lines, by_id, dataset, everything, histories, silent

ITEMS: dict[int, dict[str, Any]] = {
    100: {"title": "The Sea, the SEA", "genre": "drama", "tags": ["old", "blue"], "price": 3.0},
    101: {"title": "Rødgrød med fløde", "genre": "food", "tags": ["red"], "price": 12.0},
    102: {"title": "Sea food", "genre": None, "tags": ["blue", "blue", "red"], "price": 12.0},
    103: {"title": "", "genre": None, "tags": [], "price": None},
    104: {"title": "1984 — a drama", "genre": "drama", "tags": [], "price": 8.0},
    105: {"title": "…!?", "genre": None, "tags": None, "price": None},
    106: {"title": None, "genre": None, "tags": [], "price": None},
}
COLUMNS = {
    "title": {"kind": "text"},
    "genre": {},
    "tags": {"kind": "bag"},
    "level": {"source": "price", "edges": [5, 10]},
}
ALL = ["item.title", "item.genre", "item.tags", "item.level"]


def catalogue(folder: Path, items: dict[int, dict[str, Any]] = ITEMS) -> Dataset:
    """A dataset of these items."""
    table = pa.Table.from_pylist([{"item": item, **row} for item, row in items.items()])
    return dataset(folder, histories({1: list(items)}), items=table, columns={"item": COLUMNS})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return catalogue(tmp_path_factory.mktemp("catalogue"))


def terms(row: dict[str, Any], columns: list[str], ngrams: int) -> list[str]:
    """The terms of one item."""
    found: list[str] = []
    if "item.title" in columns:
        words = re.findall(r"\w+", (row["title"] or "").lower())
        found += [" ".join(words[i : i + n]) for n in range(1, ngrams + 1) for i in range(len(words) - n + 1)]
    if "item.genre" in columns and row["genre"]:
        found.append(f"item.genre={row['genre']}")
    if "item.tags" in columns:
        found += [f"item.tags={tag}" for tag in row["tags"] or []]
    if "item.level" in columns and row["price"] is not None:
        found.append(f"item.level={1 + (row['price'] >= 5) + (row['price'] >= 10)}")
    return found


def literal(config: TextPart) -> dict[int, dict[int, float]]:
    """TF-IDF of every item by bucket, rows of length 1."""
    counts = {
        item: Counter(
            abs(murmurhash3_32(term, seed=0)) % config.buckets for term in terms(row, config.columns, config.ngrams)
        )
        for item, row in ITEMS.items()
    }
    filled = [c for c in counts.values() if c]
    frequency = Counter(bucket for c in filled for bucket in c)
    found: dict[int, dict[int, float]] = {}
    for item, c in counts.items():
        row = {b: (1 + math.log(n)) * (math.log((1 + len(filled)) / (1 + frequency[b])) + 1) for b, n in c.items()}
        length = math.sqrt(sum(x * x for x in row.values()))
        found[item] = {b: x / length for b, x in row.items()}
    return found


@pytest.mark.parametrize("buckets", [16, 1 << 16])  # with and without terms that share a bucket
@pytest.mark.parametrize(("columns", "ngrams"), [(ALL, 2), (["item.title"], 1), (["item.tags"], 1), (ALL[1:], 3)])
def test_at_full_width_vectors_are_as_near_as_tf_idf_says(
    made: Dataset, buckets: int, columns: list[str], ngrams: int
) -> None:
    config = TextPart(columns=columns, ngrams=ngrams, buckets=buckets)
    part = text.fit(config, made, 0, silent)
    expected = literal(config)
    assert part.buckets.tolist() == sorted({bucket for row in expected.values() for bucket in row})
    found = by_id(part.open(made), made)
    for one, row in expected.items():
        for other, column in expected.items():
            near = sum(x * column.get(bucket, 0.0) for bucket, x in row.items())
            assert float(found[one] @ found[other]) == pytest.approx(near, abs=1e-5)


def test_items_without_a_word_have_nothing(made: Dataset) -> None:
    part = text.fit(TextPart(columns=ALL), made, 0, silent)
    found = by_id(part.open(made), made)
    assert {item for item, vector in found.items() if not vector.any()} == {None, 103, 105, 106}


def test_a_narrow_vector_keeps_the_greatest_directions(made: Dataset) -> None:
    """Against the SVD of the literal matrix: with its two greatest directions only."""
    config = TextPart(columns=ALL, dim=2)
    rows = literal(config)
    buckets = sorted({bucket for row in rows.values() for bucket in row})
    matrix = np.array([[row.get(bucket, 0.0) for bucket in buckets] for row in rows.values()])
    u, sigma, _ = np.linalg.svd(matrix)
    expected = u[:, :2] * sigma[:2]
    part = text.fit(config, made, 0, silent)
    assert part.dim == 2
    found = by_id(part.open(made), made)
    vectors = np.array([found[item] for item in rows])
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)


def test_less_to_tell_than_asked_for_makes_a_shorter_vector_and_a_line_in_the_log(made: Dataset) -> None:
    lines = Lines()
    part = text.fit(TextPart(columns=["item.genre"], dim=64), made, 0, lines)
    assert part.dim == 2
    assert "content part text: 2 numbers instead of 64" in "\n".join(lines)


def test_the_same_seed_gives_the_same_bytes_and_another_the_same_signs(made: Dataset) -> None:
    config = TextPart(columns=ALL, dim=3)
    first, again, other = (text.fit(config, made, seed, silent) for seed in (0, 0, 1))
    assert first.components.tobytes() == again.components.tobytes()
    np.testing.assert_allclose(other.components, first.components, atol=1e-3)


def test_only_so_many_items_are_fitted_to(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text.fit(TextPart(columns=ALL), made, 0, silent)
    monkeypatch.setattr(text, "SAMPLE", 3)
    part = text.fit(TextPart(columns=ALL), made, 0, silent)
    assert part.dim <= 3
    assert set(part.buckets) < set(whole.buckets)
    monkeypatch.setattr(text, "SAMPLE", 100)
    monkeypatch.setattr(text, "SAMPLE_TERMS", 1)
    monkeypatch.setattr(text, "_CHUNK", 2)
    assert text.fit(TextPart(columns=ALL), made, 0, silent).dim <= 2


def test_reading_in_pieces_equals_reading_the_whole(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    read = text.fit(TextPart(columns=ALL), made, 0, silent).open(made)
    whole = everything(read, made)
    monkeypatch.setattr(text, "_CHUNK", 2)
    np.testing.assert_array_equal(everything(read, made), whole)
    np.testing.assert_array_equal(np.concatenate([read(np.array([r])) for r in range(len(whole))]), whole)
    np.testing.assert_array_equal(read(np.array([3, 1, 3])), whole[[3, 1, 3]])
    assert read(np.array([], np.int64)).shape == (0, whole.shape[1])


def test_another_dataset_has_the_same_terms_whatever_its_indices(made: Dataset, tmp_path: Path) -> None:
    """Ids of categorical values differ there; words that the fit has not seen count for nothing."""
    part = text.fit(TextPart(columns=ALL), made, 0, silent)
    here = by_id(part.open(made), made)
    turned = {900 - item: row for item, row in reversed(ITEMS.items())}
    new = {1: {"title": "unheard of", "genre": "new", "tags": ["new"], "price": None}}
    more = {2 + n: ITEMS[104] | {"genre": f"genre {n}", "title": "", "price": None} for n in range(5)}
    there = catalogue(tmp_path, turned | new | more)
    assert there.manifest.columns["item"]["genre"] != made.manifest.columns["item"]["genre"]
    found = by_id(part.open(there), there)
    for item in ITEMS:
        np.testing.assert_array_equal(found[900 - item], here[item])
    assert not found[1].any()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["item.titel"], r"content part text: 'item.titel' is not in the dataset; did you mean 'item.title'\?"),
        (["title"], r"'title' is not in the dataset.*text.*the item table has item.title \(text\), item.genre \(cat"),
        (["item.weight"], r"'item.weight' is dense; did.*kind bag or categorical or text"),
    ],
)
def test_a_column_that_has_no_words_is_refused(tmp_path: Path, columns: list[str], message: str) -> None:
    table = pa.Table.from_pylist([{"item": item, **row} for item, row in ITEMS.items()])
    dense = {"weight": {"kind": "dense", "source": "coalesce(price, 0)"}}
    events = histories({1: list(ITEMS)})
    made = dataset(tmp_path, events, items=table, columns={"item": COLUMNS | dense})
    with pytest.raises(SidsError, match=message):
        text.fit(TextPart(columns=columns), made, 0, silent)


def test_a_catalogue_without_any_word_is_refused(tmp_path: Path) -> None:
    made = catalogue(tmp_path, {103: ITEMS[103], 105: ITEMS[105] | {"price": 1.0}})
    with pytest.raises(SidsError, match=r"out: content part text: no item has a word in item.title; fill them, or rem"):
        text.fit(TextPart(columns=["item.title"]), made, 0, silent)


def test_values_that_are_numbers_are_words_too(tmp_path: Path) -> None:
    table = {"item": [100, 101, 102], "brand": [7, 7, 8]}
    made = dataset(
        tmp_path, histories({1: [100, 101, 102]}), items=table, columns={"item": {"brand": {}, "size": {"source": "1"}}}
    )
    found = by_id(text.fit(TextPart(columns=["item.brand"]), made, 0, silent).open(made), made)
    assert np.array_equal(found[100], found[101])
    assert abs(float(found[100] @ found[102])) < 1e-6
    assert logs.ids(made, "item.brand") == {1: 7, 2: 8}
