"""Rows of tables are those of their raw ids, however two vocabularies number them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import table_rows
from features.dataset import MANIFEST, Dataset, write_arrow
from features.prepare import prepare
from features.selection import Feature, FeatureError
from features.table_rows import NEW, older_rows, refuse_other_meaning, rows_by_id
from tests.features.prepare.logs import config, events, impressions, write

IDS = st.lists(st.integers(-(10**12), 10**12), unique=True, max_size=40)
NAMES = st.lists(st.text(max_size=4), unique=True, max_size=40)


@given(
    st.one_of(st.tuples(IDS, IDS, st.just(pa.int64())), st.tuples(NAMES, NAMES, st.just(pa.string()))),
    st.integers(1, 9),
)
def test_rows_are_found_by_id(vocabularies: tuple[list[Any], list[Any], pa.DataType], chunk: int):
    """Whatever part of the older one is looked up at a time."""
    older, newer, kind = vocabularies
    newer = newer + older[::2][: 3 * chunk]  # random ones have nothing in common
    newer = list(dict.fromkeys(newer))[::-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "_CHUNK", chunk)
        found = rows_by_id(pa.array(older, kind), pa.array(newer, kind))
    assert found.tolist() == [older.index(value) if value in older else NEW for value in newer]


COLUMNS = {"item": {"maker": {}, "size": {"edges": [1, 2, 3]}}}


def day(folder: Path, first: int, items: dict[str, list[Any]] | None = None, **changes: Any) -> Dataset:
    """A dataset of the items ``first … first + 6``."""
    shift = first - 100
    logs = {name: table | {"item": [i + shift for i in table["item"]]} for name, table in
            (("events", events()), ("impressions", impressions()))}  # fmt: skip
    numbers = range(first, first + 7)
    items = items or {
        "item": [*numbers],
        "maker": [f"maker {n % 5}" for n in numbers],
        "size": [n % 4 for n in numbers],
    }
    source = write(folder / "logs", **logs, items=items)
    prepare(config(source, **({"columns": COLUMNS} | changes)), folder / "dataset")
    return Dataset(folder / "dataset")


def feature(name: str, dataset: Dataset) -> Feature:
    scope, _, column = name.partition(".")
    if not column:
        return Feature(name, name, "categorical", getattr(dataset.manifest, f"known_{name}s"))
    info = dataset.manifest.columns[scope][column]
    return Feature(name, scope, info.kind, info.size)


@pytest.mark.parametrize("name", ["item", "user", "item.maker"])
def test_any_part_of_a_table_finds_its_rows(name: str, tmp_path: Path):
    older, newer = day(tmp_path / "1", 100), day(tmp_path / "2", 103)
    was, now = feature(name, older), feature(name, newer)
    before = [None, *older.values_of(name, np.arange(1, was.size)).tolist()]
    after = [None, *newer.values_of(name, np.arange(1, now.size)).tolist()]
    expected = [before.index(value) if value in before else NEW for value in after]
    assert (NEW in expected) == (name == "item")  # users and makers are the same ones, in another order
    for first in range(now.size):
        for end in range(first, now.size + 1):
            found = older_rows(now, older, newer, was.size, first, end)
            assert found.tolist() == expected[first:end]


def test_buckets_are_their_own_rows(tmp_path: Path):
    older, newer = day(tmp_path / "1", 100), day(tmp_path / "2", 103)
    size = feature("item.size", newer)
    assert older_rows(size, older, newer, size.size, 0, size.size).tolist() == list(range(size.size))


def test_ids_of_another_type_are_refused(tmp_path: Path):
    older, newer = day(tmp_path / "1", 100), day(tmp_path / "2", 103, {
        "item": [*range(103, 110)], "maker": [*range(7)], "size": [1] * 7,
    })  # fmt: skip
    maker = feature("item.maker", newer)
    with pytest.raises(FeatureError, match=r"item.maker: ids are string in the older dataset and int64 in the newer"):
        refuse_other_meaning([maker], older, newer)


def test_other_edges_are_refused(tmp_path: Path):
    older, newer = day(tmp_path / "1", 100), day(tmp_path / "2", 103)
    manifest = json.loads((newer.root / MANIFEST).read_text())
    manifest["config"]["columns"]["item"]["size"]["edges"] = [1, 2, 4]
    (newer.root / MANIFEST).write_text(json.dumps(manifest))
    refuse_other_meaning([feature("item.maker", newer)], older, Dataset(newer.root))
    with pytest.raises(FeatureError, match=r"item.size: edges \[1, 2, 4\] in .*, but \[1.0, 2.0, 3.0\] in"):
        refuse_other_meaning([feature("item.size", newer)], older, Dataset(newer.root))


def test_integers_of_any_width_are_the_same_ids(tmp_path: Path):
    assert rows_by_id(pa.array([5, 7], pa.int64()), pa.array([7, 9], pa.int64())).tolist() == [1, NEW]
    older = day(tmp_path / "1", 100, columns={})
    items = pa.table({"value": pa.array([101, 103], pa.int32()), "index": pa.array([1, 2], pa.int32())})
    newer = day(tmp_path / "2", 100, columns={})
    path = newer.root / "vocabularies" / "item.arrow"
    path.unlink()
    write_arrow(items, path)
    rows = older_rows(Feature("item", "item", "categorical", 3), older, newer, older.manifest.known_items, 0, 3)
    assert older.values_of("item", rows)[1:].tolist() == [101, 103]
