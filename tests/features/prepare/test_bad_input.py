"""Bad input is refused with the file, the column, the value and what to do; nothing is left behind."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from features.prepare import PrepareError, prepare
from features.schema import PrepareConfig, SplitConfig
from tests.features.prepare import logs
from tests.features.prepare.logs import START


def refused(config: PrepareConfig, out: Path, *parts: str) -> None:
    """`prepare` raises with all of `parts` in its message and leaves no file."""
    with pytest.raises(PrepareError) as error:
        prepare(config, out)
    for part in parts:
        assert part in str(error.value), f"{part!r} is not in {str(error.value)!r}"
    assert not out.exists()
    assert not list(out.parent.glob(".*partial*"))


def broken(folder: Path, table: str, column: str, change: Any) -> PrepareConfig:
    """The small logs with one column changed: the first value, or the whole list if `change` is one."""
    tables: dict[str, Any] = {"events": logs.events(), "impressions": logs.impressions()}
    values = tables[table][column]
    tables[table][column] = change if isinstance(change, list) else [change, *values[1:]]
    return logs.config(logs.write(folder / "in", **tables))


def test_missing_file(tmp_path: Path) -> None:
    config = logs.small(tmp_path / "in")
    (tmp_path / "in" / "events.parquet").rename(tmp_path / "in" / "event.parquet")
    refused(config, tmp_path / "out", "events.parquet", "no such file", "did you mean 'event.parquet'?")


def test_missing_folder(tmp_path: Path) -> None:
    config = logs.small(tmp_path / "in")
    shutil.rmtree(tmp_path / "in")
    refused(config, tmp_path / "out", "there is no folder", str(tmp_path / "in"))


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = logs.config({"type": "logs", "impressions": {"path": str(tmp_path / "empty")}})
    refused(config, tmp_path / "out", "has no *.parquet file")


@pytest.mark.parametrize("kind", ["recbole", "ebnerd"])
def test_missing_source_folder(tmp_path: Path, kind: str) -> None:
    config = logs.config({"type": kind, "path": str(tmp_path / "nowhere")})
    refused(config, tmp_path / "out", "nowhere", "no such folder", "source.path")


def test_missing_key_column(tmp_path: Path) -> None:
    rows = logs.events()
    rows["user_id"] = rows.pop("user")
    source = logs.write(tmp_path / "in", events=rows, impressions=logs.impressions())
    refused(logs.config(source), tmp_path / "out", "events.parquet", "no column 'user'", "did you mean 'user_id'?")
    source["events"]["columns"] = {"user": "user_id"}
    logs.prepared(logs.config(source), tmp_path / "good")


def test_missing_column_of_an_expression(tmp_path: Path) -> None:
    config = logs.small(tmp_path / "in", labels={"click": "clicks > 0"})
    refused(config, tmp_path / "out", "labels.click", "no column 'clicks'", "did you mean 'click'?")


def test_missing_configured_column(tmp_path: Path) -> None:
    config = logs.small(tmp_path / "in", columns={"request": {"requests": {}}})
    refused(config, tmp_path / "out", "columns.request.requests", "no column 'requests'", "did you mean 'request'?")


def test_expression_that_looks_at_other_rows(tmp_path: Path) -> None:
    """A window could look ahead in time; counters are the safe way."""
    source = "avg(click) OVER (PARTITION BY item)"
    config = logs.small(tmp_path / "in", columns={"candidate": {"rate": {"kind": "dense", "source": source}}})
    refused(config, tmp_path / "out", "columns.candidate.rate", "over one row")


def test_syntax_error_in_an_expression(tmp_path: Path) -> None:
    refused(logs.small(tmp_path / "in", labels={"click": "click +"}), tmp_path / "out", "labels.click", "'click +'")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"request": {"when": {"kind": "dense", "source": "CAST(item AS VARCHAR)"}}}, "it needs numbers"),
        ({"request": {"where": {"kind": "bag", "source": "CAST(item AS VARCHAR)"}}}, "its separator"),
        ({"request": {"share": {"source": "item / 2.5"}}}, "give it edges"),
        ({"request": {"cut": {"source": "CAST(item AS VARCHAR)", "edges": [1, 2]}}}, "cannot be cut at edges"),
        ({"request": {"list": {"source": "[item]"}}}, "make it a bag"),
    ],
)
def test_column_of_a_wrong_type(tmp_path: Path, column: dict[str, Any], message: str) -> None:
    refused(logs.small(tmp_path / "in", columns=column), tmp_path / "out", "columns.request.", message)


def test_label_of_a_wrong_type(tmp_path: Path) -> None:
    refused(logs.small(tmp_path / "in", labels={"click": "split"}), tmp_path / "out", "labels.click", "VARCHAR")


def test_ids_of_a_wrong_type(tmp_path: Path) -> None:
    config = broken(tmp_path, "events", "item", [float(n) for n in logs.events()["item"]])
    refused(config, tmp_path / "out", "events.parquet", "'item'", "DOUBLE", "integers or strings")


def test_ids_of_two_types(tmp_path: Path) -> None:
    config = broken(tmp_path, "events", "item", [str(n) for n in logs.events()["item"]])
    refused(config, tmp_path / "out", "'item'", "BIGINT", "VARCHAR", "same type")


def test_times_of_a_wrong_type(tmp_path: Path) -> None:
    config = broken(tmp_path, "events", "time", [str(n) for n in logs.events()["time"]])
    refused(config, tmp_path / "out", "events.parquet", "'time'", "VARCHAR", "timestamps or numbers")


def test_truncated_parquet(tmp_path: Path) -> None:
    config = logs.small(tmp_path / "in")
    path = tmp_path / "in" / "events.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    refused(config, tmp_path / "out", str(path), "not a readable Parquet file", "write it again")


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    config = logs.small(tmp_path / "in")
    path = tmp_path / "in" / "events.parquet"
    content = bytearray(path.read_bytes())
    content[4:300] = b"\xff" * 296
    path.write_bytes(bytes(content))
    refused(config, tmp_path / "out", "events.parquet")


@pytest.mark.parametrize("table", ["events", "impressions"])
@pytest.mark.parametrize("key", ["user", "item"])
@pytest.mark.parametrize(("value", "message"), [(None, "ids are null"), (-7, "negative, e.g. -7")])
def test_null_and_negative_ids(tmp_path: Path, table: str, key: str, value: int | None, message: str) -> None:
    config = broken(tmp_path, table, key, value)
    refused(config, tmp_path / "out", f"{table}.parquet", f"'{key}'", "1 of ", message)


def test_empty_string_ids(tmp_path: Path) -> None:
    rows = logs.impressions()
    rows["item"] = ["", *(str(n) for n in rows["item"][1:])]
    refused(logs.config(logs.write(tmp_path / "in", impressions=rows)), tmp_path / "out", "'item'", "empty strings")


@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "nan"), (2.0, "2.0"), (-1.0, "-1.0"), (0.5, "0.5"), (None, "null")]
)
def test_labels_other_than_0_and_1(tmp_path: Path, value: float | None, shown: str) -> None:
    config = broken(tmp_path, "impressions", "click", [value, *map(float, logs.impressions()["click"][1:])])
    refused(config, tmp_path / "out", "impressions.parquet", "labels.click ('click')", "1 of 30", f"e.g. {shown}")


@pytest.mark.parametrize(("unit", "factor"), [("s", 1e-3), ("us", 1e3), ("ns", 1e6)])
def test_times_in_the_wrong_unit(tmp_path: Path, unit: str, factor: float) -> None:
    """The message names the column and the unit that would be right; with that unit it works."""
    tables: dict[str, Any] = {"events": logs.events(), "impressions": logs.impressions()}
    for rows in tables.values():
        rows["time"] = [int(t * factor) for t in rows["time"]]
    source = logs.write(tmp_path / "in", **tables)
    refused(logs.config(source), tmp_path / "out", "events.parquet", "'time'", "40 of 40", f"time_unit: {unit}")
    for table in ("events", "impressions"):
        source[table]["time_unit"] = unit
    logs.prepared(logs.config(source), tmp_path / "good")


def test_one_time_out_of_range(tmp_path: Path) -> None:
    config = broken(tmp_path, "impressions", "time", 0)
    refused(config, tmp_path / "out", "impressions.parquet", "'time'", "1 of 30", "1970-01-01", "time_range")


def test_null_times(tmp_path: Path) -> None:
    refused(broken(tmp_path, "events", "time", None), tmp_path / "out", "'time'", "1 of 40 times are null")


@pytest.mark.parametrize("zone", [None, "UTC"])
def test_timestamps_need_no_unit(tmp_path: Path, zone: str | None) -> None:
    rows = logs.impressions()
    moments = [dt.datetime.fromtimestamp(t / 1000, dt.UTC).replace(tzinfo=None) for t in rows["time"]]
    table = pa.table(rows | {"time": pa.array(moments, pa.timestamp("us", tz=zone))})
    dataset = logs.prepared(logs.config(logs.write(tmp_path / "in", impressions=table)), tmp_path / "out")
    assert dataset.manifest.splits["train"].first_ms == rows["time"][0]


def test_unknown_split_name(tmp_path: Path) -> None:
    config = broken(tmp_path, "impressions", "split", "training")
    refused(config, tmp_path / "out", "'split'", "1 of 30", "'training'", "train, valid or test")


def test_no_split_column(tmp_path: Path) -> None:
    rows = logs.impressions()
    del rows["split"]
    refused(logs.config(logs.write(tmp_path / "in", impressions=rows)), tmp_path / "out", "no split column", "by time")


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ({"by": "time", "test_from": "2000-01-01"}, "train"),
        ({"by": "time", "test_from": "2030-01-01"}, "test"),
        ({"by": "time", "valid_from": "2029-01-01"}, "valid"),
        ({"by": "time", "train_from": "2029-01-01"}, "train"),
        ({"by": "last", "test_last": 1000}, "train"),
        ({"by": "column", "valid_users": 1e-6}, "valid"),
    ],
)
def test_empty_splits(tmp_path: Path, split: dict[str, Any], name: str) -> None:
    rows = logs.impressions()
    rows["split"] = ["train"] * len(rows["split"])
    config = logs.config(logs.write(tmp_path / "in", impressions=rows), split=split)
    refused(config, tmp_path / "out", f"the {name} split is empty", "between 2023-11-14 22:43:20 and", "change `split`")


@pytest.mark.parametrize(
    ("split", "told"),
    [
        (
            {"by": "time", "train_from": "2023-11-15", "valid_from": "2023-11-15"},
            "split.train_from 2023-11-15 is not before split.valid_from 2023-11-15; exchange them",
        ),
        (
            {"by": "time", "train_from": "2023-11-17", "test_from": "2023-11-15"},
            "split.train_from 2023-11-17 is not before split.test_from 2023-11-15",
        ),
    ],
)
def test_periods_in_another_order(tmp_path: Path, split: dict[str, Any], told: str) -> None:
    config = logs.config(logs.write(tmp_path / "in", impressions=logs.impressions()), split=split)
    refused(config, tmp_path / "out", told)


def test_training_starts_later_by_time_alone() -> None:
    with pytest.raises(ValidationError, match="train_from: only a split by time has it, this one is by last"):
        SplitConfig(by="last", test_last=1, train_from="2023-11-15")


def test_no_rows_at_all(tmp_path: Path) -> None:
    table = pa.table(logs.impressions()).slice(0, 0)
    refused(logs.config(logs.write(tmp_path / "in", impressions=table)), tmp_path / "out", "no requests at all")


@pytest.mark.parametrize("key", ["item", "user"])
def test_attributes_given_twice(tmp_path: Path, key: str) -> None:
    attributes = {f"{key}s": {key: [1, 1], "colour": ["red", "blue"]}}
    source = logs.write(tmp_path / "in", impressions=logs.impressions(), **attributes)
    refused(logs.config(source), tmp_path / "out", f"{key}s.parquet", "1 has 2 rows", "one row of attributes")


def test_columns_without_a_table(tmp_path: Path) -> None:
    config = logs.small(tmp_path / "in", columns={"item": {"colour": {}}})
    refused(config, tmp_path / "out", "columns.item", "source.items")


def test_dense_nulls_need_a_default(tmp_path: Path) -> None:
    rows = logs.impressions() | {"price": [None, *([2.0] * 29)]}
    source = logs.write(tmp_path / "in", impressions=rows)
    columns: dict[str, Any] = {"candidate": {"price": {"kind": "dense"}}}
    config = logs.config(source, columns=columns)
    refused(config, tmp_path / "out", "columns.candidate.price", "1 of 30 values are null", "default")
    columns["candidate"]["price"]["default"] = 5.0
    dataset = logs.prepared(logs.config(source, columns=columns), tmp_path / "good")
    assert {p for r in logs.requests(dataset) for p in r.columns["candidate.price"]} == {2.0, 5.0}


@pytest.mark.parametrize(("value", "transform"), [(float("nan"), "none"), (float("inf"), "none"), (-1.0, "log1p")])
def test_dense_values_that_are_no_numbers(tmp_path: Path, value: float, transform: str) -> None:
    rows = logs.impressions() | {"price": [value, *([2.0] * 29)]}
    source = logs.write(tmp_path / "in", impressions=rows)
    columns = {"candidate": {"price": {"kind": "dense", "transform": transform}}}
    refused(logs.config(source, columns=columns), tmp_path / "out", "columns.candidate.price", "1 of 30")


def test_vectors_of_two_lengths(tmp_path: Path) -> None:
    items = {"item": [100, 101], "content": [[1.0, 2.0], [1.0, 2.0, 3.0]]}
    source = logs.write(tmp_path / "in", impressions=logs.impressions(), items=items)
    config = logs.config(source, columns={"item": {"content": {"kind": "vector"}}})
    refused(config, tmp_path / "out", "columns.item.content", "2 to 3 numbers")


def test_impressions_and_derive(tmp_path: Path) -> None:
    refused(logs.small(tmp_path / "in", derive={}), tmp_path / "out", "remove `derive`")


def test_neither_impressions_nor_derive(tmp_path: Path) -> None:
    source = logs.write(tmp_path / "in", events=logs.events())
    refused(logs.config(source), tmp_path / "out", "no impressions", "`derive`")


def test_repeated_ids_in_a_request_stay(tmp_path: Path) -> None:
    """Only events are deduplicated: two impressions of an item are two samples."""
    source = logs.write(
        tmp_path / "in",
        impressions={"user": [1, 1], "item": [5, 5], "time": [START, START], "click": [0, 1], "split": ["train"] * 2},
    )
    (request,) = logs.requests(logs.prepared(logs.config(source), tmp_path / "out"))
    assert request.items == [5, 5]
    assert request.columns["label.click"] == [0.0, 1.0]
