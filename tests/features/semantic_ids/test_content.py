"""Parts of a content vector side by side: their lengths, what is missing, and what state they are made again from."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from features.dataset import Dataset, read_arrow
from features.semantic_ids.config import BehaviourPart, SidsConfig, TextPart, VectorPart
from features.semantic_ids.content import Content, vector_part
from features.semantic_ids.errors import SidsError
from tests.features.datasets import rewrite
from tests.features.semantic_ids.content_logs import by_id, dataset, everything, histories, silent
from tests.features.semantic_ids.test_content_behaviour import drawn

NO_VECTOR, NO_WORDS, NOTHING = 103, 104, 199
COLUMNS = {"image": {"kind": "vector"}, "title": {"kind": "text"}, "price": {"kind": "dense", "default": 0}}
PARTS = [
    VectorPart(column="item.image", weight=2.0),
    TextPart(columns=["item.title"], dim=3, weight=0.5),
    BehaviourPart(dim=4, weight=3.0),
]


def catalogue(folder: Path) -> Dataset:
    """Items 100 … 111 with company; one lacks a vector, one words, and item 199 lacks both and company too."""
    items = [*range(100, 112), NOTHING]
    image = np.random.default_rng(0).normal(size=(len(items), 5)).round(2) * 40
    table = pa.table(
        {
            "item": items,
            "image": [None if i in (NO_VECTOR, NOTHING) else row.tolist() for i, row in zip(items, image, strict=True)],
            "title": [None if i in (NO_WORDS, NOTHING) else f"number {i % 5} of {i}" for i in items],
            "price": [float(i) for i in items],
        }
    )
    return dataset(folder, histories(drawn() | {99: [NOTHING]}), items=table, columns={"item": COLUMNS})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return catalogue(tmp_path_factory.mktemp("catalogue"))


def test_each_part_has_its_own_length(made: Dataset) -> None:
    content = Content.fit(PARTS, made, 0, silent)
    found = by_id(content.open(made), made)
    assert content.dim == 5 + 3 + 4
    for item, vector in found.items():
        lengths = [float(np.linalg.norm(part)) for part in np.split(vector, [5, 8])]
        expected = [
            0.0 if item in (None, NO_VECTOR, NOTHING) else 2.0,
            0.0 if item in (None, NO_WORDS, NOTHING) else 0.5,
            0.0 if item in (None, NOTHING) else 3.0,
        ]
        assert lengths == pytest.approx(expected, abs=1e-6), item


def test_a_part_keeps_its_direction(made: Dataset) -> None:
    items = made.items()
    stored = dict(zip(items["id"].to_pylist(), items["item.image"].to_pylist(), strict=True))
    found = by_id(Content.fit(PARTS, made, 0, silent).open(made), made)
    for item in (100, 107):
        np.testing.assert_allclose(
            found[item][:5], 2 * np.array(stored[item]) / np.linalg.norm(stored[item]), atol=1e-6
        )


def test_numbers_of_any_size_have_a_direction(made: Dataset, tmp_path: Path) -> None:
    copy = catalogue(tmp_path)
    image = np.full((copy.manifest.items, 5), 1e30, np.float32)
    image[3] = 1e-30
    rewrite(copy.root / "items.arrow", {"item.image": pa.FixedSizeListArray.from_arrays(pa.array(image.ravel()), 5)})
    found = everything(Content.fit(PARTS[:1], copy, 0, silent).open(copy), copy)
    np.testing.assert_allclose(found, 2 / np.sqrt(5), rtol=1e-6)


def test_reading_in_pieces_equals_reading_the_whole(made: Dataset) -> None:
    read = Content.fit(PARTS, made, 0, silent).open(made)
    pieces = [read(rows) for rows in np.array_split(np.arange(made.manifest.items), 4)]
    np.testing.assert_array_equal(np.concatenate(pieces), everything(read, made))


def test_content_is_made_again_from_its_state(made: Dataset) -> None:
    """Through a file that holds plain arrays only."""
    content = Content.fit(PARTS, made, 0, silent)
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **content.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        again = Content.load(PARTS, dict(state))
    assert again.dim == content.dim
    assert {name.split(".")[0] for name in content.state()} == {"0", "1", "2"}
    np.testing.assert_array_equal(everything(again.open(made), made), everything(content.open(made), made))


def test_the_state_of_other_parts_is_refused(made: Dataset) -> None:
    state = Content.fit(PARTS, made, 0, silent).state()
    with pytest.raises(SidsError, match=r"content\[0\] \(behaviour\): .*no 'contexts' .* only dim; fit the codebook"):
        Content.load(PARTS[::-1], state)
    with pytest.raises(SidsError, match=r"content\[3\] \(text\): .*no 'buckets' .* only nothing"):
        Content.load([*PARTS, PARTS[1]], state)


def test_the_same_seed_gives_the_same_vectors(made: Dataset) -> None:
    first, again = (everything(Content.fit(PARTS, made, 7, silent).open(made), made) for _ in range(2))
    assert first.tobytes() == again.tobytes()


def test_behaviour_can_be_read_alone(made: Dataset) -> None:
    content = Content.fit(PARTS, made, 0, silent)
    read = content.collaborative(made)
    assert read is not None
    np.testing.assert_allclose(everything(read, made) * 3.0, everything(content.open(made), made)[:, 8:], atol=1e-6)
    assert Content.fit(PARTS[:2], made, 0, silent).collaborative(made) is None


def test_parts_come_from_a_config(made: Dataset) -> None:
    raw: dict[str, Any] = {
        "content": [{"type": "vector", "column": "item.image"}, {"type": "behaviour", "dim": 2}],
        "levels": [4],
    }
    assert Content.fit(SidsConfig.model_validate(raw).content, made, 0, silent).dim == 7


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("item.imag", r"content part vector: 'item.imag' is not in the dataset; did you mean 'item.image'\?"),
        (
            "item.title",
            r"'item.title' is text.*kind vector; the item table has item.image \(vector\), item.title \(text",
        ),
    ],
)
def test_what_is_no_vector_is_refused(made: Dataset, column: str, message: str) -> None:
    with pytest.raises(SidsError, match=message):
        Content.fit([VectorPart(column=column)], made, 0, silent)


def test_without_item_columns_the_message_says_so(tmp_path: Path) -> None:
    bare = dataset(tmp_path, histories({1: [1, 2]}))
    with pytest.raises(SidsError, match=r"the item table has no columns"):
        Content.fit(PARTS[:1], bare, 0, silent)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_vectors_that_are_not_finite_are_refused(tmp_path: Path, wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prepare` lets none in; other writers might."""
    monkeypatch.setattr(vector_part, "_CHUNK", 4)
    made = catalogue(tmp_path)
    content = Content.fit(PARTS[:1], made, 0, silent)
    items = read_arrow(made.root / "items.arrow")
    image = items["item.image"].flatten().to_numpy().reshape(-1, 5).copy()
    image[6, 2] = image[9, :] = wrong
    rewrite(made.root / "items.arrow", {"item.image": pa.FixedSizeListArray.from_arrays(pa.array(image.ravel()), 5)})
    first = items["id"][6].as_py()
    with pytest.raises(SidsError, match=rf"out: item.image: the vectors of 2 of 14 items hold NaN .* item {first};"):
        content.open(Dataset(made.root))


def test_vectors_of_another_width_are_refused(made: Dataset, tmp_path: Path) -> None:
    content = Content.fit(PARTS[:1], made, 0, silent)
    table = {"item": [100, 101], "image": [[1.0, 2.0], [3.0, 4.0]]}
    other = dataset(tmp_path, histories({1: [100, 101]}), items=table, columns={"item": {"image": {"kind": "vector"}}})
    with pytest.raises(
        SidsError, match=r"item.image has vectors of 2 numbers, the codebook was fitted to 5; fit it ag"
    ):
        content.open(other)


def test_a_column_of_zeros_is_refused(tmp_path: Path) -> None:
    table = {"item": [100, 101], "image": [[0.0, 0.0], None]}
    made = dataset(tmp_path, histories({1: [100, 101]}), items=table, columns={"item": {"image": {"kind": "vector"}}})
    with pytest.raises(SidsError, match=r"item.image is zero for every item; fill it"):
        Content.fit(PARTS[:1], made, 0, silent)
