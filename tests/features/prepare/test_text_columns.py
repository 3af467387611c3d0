"""Text columns: words of items, stored as they are, read by semantic IDs and by no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from features.dataset import ColumnInfo, Dataset
from features.loader import Loader, LoaderConfig
from features.prepare import PrepareError, prepare
from features.schema import ColumnsConfig
from features.selection import FeatureError, FeaturesConfig, Selection, resolve
from tests.features.prepare import logs

TITLE = {"item": {"title": {"kind": "text"}}}


def with_titles(folder: Path, titles: pa.Array, columns: dict[str, Any]) -> Any:
    """A config over the default logs and an item table with a column `title`; the items are 100, 101, …."""
    table = pa.table({"item": list(range(100, 100 + len(titles))), "title": titles})
    source = logs.write(folder, events=logs.events(), impressions=logs.impressions(), items=table)
    return logs.config(source, columns=columns)


def titles(dataset: Dataset) -> dict[Any, str]:
    """Text by raw id, the reserved row's under None."""
    batch = dataset.items()
    return dict(zip(batch["id"].to_pylist(), batch["item.title"].to_pylist(), strict=True))


def test_text_is_stored_as_it_is_and_what_is_missing_is_empty(tmp_path: Path) -> None:
    given = pa.array(["Ærø  Ø, 日本\n'x'", None, "", "a" * 100_000])
    dataset = logs.prepared(with_titles(tmp_path / "in", given, TITLE), tmp_path / "out")
    # 104 … 106 occur in the logs but not in the item table
    expected = ["Ærø  Ø, 日本\n'x'", "", "", "a" * 100_000, "", "", ""]
    assert titles(dataset) == {None: ""} | dict(zip(range(100, 107), expected, strict=True))
    assert dataset.manifest.columns["item"] == {"title": ColumnInfo(kind="text")}
    assert not (dataset.root / "vocabularies" / "item.title.arrow").exists()


def test_a_list_of_strings_is_joined_with_spaces(tmp_path: Path) -> None:
    given = pa.array([["red", None, "wine"], [], None], pa.list_(pa.string()))
    dataset = logs.prepared(with_titles(tmp_path / "in", given, TITLE), tmp_path / "out")
    assert [titles(dataset)[item] for item in (100, 101, 102)] == ["red wine", "", ""]


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (pa.array([1, 2]), "BIGINT"),
        (pa.array([1.5, 2.0]), "DOUBLE"),
        (pa.array([[1], [2]]), "BIGINT[]"),
        (pa.array([{"a": "x"}, None]), "STRUCT"),
    ],
)
def test_what_is_no_string_is_refused(tmp_path: Path, given: pa.Array, kind: str) -> None:
    with pytest.raises(PrepareError) as error:
        prepare(with_titles(tmp_path / "in", given, TITLE), tmp_path / "out")
    for part in ("items.parquet: columns.item.title", f"type {kind}", "cast it to VARCHAR"):
        assert part in str(error.value)


def test_a_number_can_be_cast(tmp_path: Path) -> None:
    columns = {"item": {"title": {"kind": "text", "source": "CAST(title AS VARCHAR) || ' kr'"}}}
    dataset = logs.prepared(with_titles(tmp_path / "in", pa.array([7, None]), columns), tmp_path / "out")
    assert [titles(dataset)[item] for item in (100, 101)] == ["7 kr", ""]


@pytest.mark.parametrize("scope", ["user", "event", "request", "candidate"])
def test_only_items_have_text(scope: str) -> None:
    with pytest.raises(ValidationError, match=rf"{scope}\.title: .*text.* item"):
        ColumnsConfig.model_validate({scope: {"title": {"kind": "text"}}})


def test_the_same_logs_give_the_same_hash_and_another_text_another(tmp_path: Path) -> None:
    def content_hash(name: str, *words: str) -> str:
        return prepare(with_titles(tmp_path / "in", pa.array(words), TITLE), tmp_path / name).content_hash

    first = content_hash("a", "x", "y")
    assert content_hash("b", "x", "y") == first
    assert content_hash("c", "x", "z") != first


@pytest.mark.parametrize("place", ["candidate", "sequence", "dense"])
def test_no_model_reads_text(tmp_path: Path, place: str) -> None:
    dataset = logs.prepared(with_titles(tmp_path / "in", pa.array(["x"]), TITLE), tmp_path / "out")
    with pytest.raises(FeatureError, match=rf"features.{place}\[0\]: 'item.title' is text of scope item"):
        resolve(FeaturesConfig.model_validate({place: ["item.title"]}), dataset.manifest)


def test_a_dataset_with_text_is_read_as_any_other(tmp_path: Path) -> None:
    columns = {"item": {"title": {"kind": "text"}, "word": {"source": "title"}}}
    dataset = logs.prepared(with_titles(tmp_path / "in", pa.array(["x", "y"]), columns), tmp_path / "out")
    features = FeaturesConfig(candidate=["item", "item.word"])
    loader = Loader(dataset, ("train",), Selection(resolve(features, dataset.manifest), ("click",), 10), LoaderConfig())
    words = [value for batch in loader.batches() for value in batch.candidate["item.word"].values().tolist()]
    assert sorted(set(words)) == [0, 1, 2]
    assert len(words) == dataset.manifest.splits["train"].impressions
