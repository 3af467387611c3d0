"""Each adapter on a miniature of its files, made here; and on the public logs where they are."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.config_file import load_config
from features.dataset import read_arrow
from features.prepare import PrepareError, prepare
from features.schema import PrepareConfig
from tests.features.prepare import logs
from tests.features.prepare.logs import START

CONFIGS = Path(__file__).parents[3] / "configs"


def recbole(folder: Path, newline: str = "\n") -> dict[str, Any]:
    """A quotation mark opens a title, genres are missing once, times are seconds with a fraction."""
    folder.mkdir()
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    titles = ["Plain, one", '"Loved', '"Loved']
    lines += [f"u{n % 2}\t{titles[n % 3]}\t{n % 5 + 1}\t{START // 1000 + n}.5" for n in range(20)]
    (folder / "toy.inter").write_bytes((newline.join(lines) + newline).encode())
    items = [
        "item_id:token\tgenre:token_seq\tyear:float\tplace:float_seq",
        '"Loved\ta b\t1999\t1 2',
        "Plain, one\t\t\t3 4",
    ]
    (folder / "toy.item").write_bytes((newline.join(items) + newline).encode())
    return {"type": "recbole", "path": str(folder), "name": "toy"}


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_recbole(tmp_path: Path, newline: str) -> None:
    config = logs.config(
        recbole(tmp_path / "in", newline),
        derive={"min_history": 3},
        split={"by": "last", "test_last": 2},
        labels={"click": "rating >= 4"},
        columns={
            "item": {
                "genre": {"kind": "bag"},
                "year": {"edges": [1990, 2000]},
                "place": {"kind": "vector"},
            }
        },
    )
    dataset = logs.prepared(config, tmp_path / "out")
    assert dataset.manifest.events == 20
    assert dataset.manifest.splits["train"].requests == 10
    assert dataset.manifest.splits["train"].first_ms == START + 6_500
    rows = {row["id"]: row for row in dataset.items().to_pylist()}
    assert rows['"Loved']["item.genre"] == [1, 2]
    assert rows['"Loved']["item.year"] == 2
    assert rows["Plain, one"] | {"id": None} == {
        "id": None, "item.genre": [], "item.year": 0, "item.place": [3.0, 4.0],
    }  # fmt: skip


def test_recbole_without_types_in_the_header(tmp_path: Path) -> None:
    source = recbole(tmp_path / "in")
    path = tmp_path / "in" / "toy.inter"
    path.write_text(path.read_text().replace("rating:float", "rating"))
    with pytest.raises(PrepareError, match=r"toy\.inter: header field 'rating'.*add its type"):
        prepare(logs.config(source, derive={}), tmp_path / "out")


def test_recbole_with_text_for_a_number(tmp_path: Path) -> None:
    source = recbole(tmp_path / "in")
    path = tmp_path / "in" / "toy.inter"
    path.write_text(path.read_text().replace("\t3\t", "\tthree\t", 1))
    with pytest.raises(PrepareError, match=r"toy\.inter.*three"):
        prepare(logs.config(source, derive={}), tmp_path / "out")


def test_recbole_under_another_name(tmp_path: Path) -> None:
    source = recbole(tmp_path / "in") | {"name": None}
    with pytest.raises(PrepareError, match=r"in\.inter: no such file.*source\.name"):
        prepare(logs.config(source, derive={}), tmp_path / "out")


def ebnerd(folder: Path) -> dict[str, Any]:
    """Two users; the second history file repeats the first; one click is read long, one short."""
    folder.mkdir()
    moment = dt.datetime(2023, 5, 20, 8)
    days = [moment - dt.timedelta(days=n) for n in (9, 8, 7)]
    for part, kept in (("train", 2), ("val", 3)):
        history = {
            "user_id": pa.array([1], pa.uint32()),
            "impression_time_fixed": pa.array([days[:kept]], pa.list_(pa.timestamp("us"))),
            "article_id_fixed": [[7, 8, 9][:kept]],
            "read_time_fixed": [[1.0, 2.0, 40.0][:kept]],
            "scroll_percentage_fixed": [[None, 50.0, 100.0][:kept]],
        }
        pq.write_table(pa.table(history), folder / f"history_{part}.parquet")
        times = [moment if part == "train" else moment + dt.timedelta(days=7)] * 3
        behaviours = {
            "impression_id": pa.array([1, 2, 3], pa.uint32()),
            "user_id": pa.array([1, 12, 12], pa.uint32()),
            "impression_time": pa.array(times, pa.timestamp("us")),
            "device_type": pa.array([1, 2, 2], pa.int8()),
            "article_ids_inview": [[7, 10], [8, 9, 10], [10, 11]],
            "article_ids_clicked": [[10], [8], [11]],
            "next_read_time": [30.0, 29.9, None],
            "read_time": [5.0, 6.0, 7.0],
        }
        pq.write_table(pa.table(behaviours), folder / f"behaviors_{part}.parquet")
    pq.write_table(
        pa.table({"article_id": [7, 8, 99], "article_length": [600, 10, 1]}), folder / "article_length.parquet"
    )
    pq.write_table(pa.table({"article_id": [8, 9], "premium": [1.0, 0.0]}), folder / "premium_articles.parquet")
    return {"type": "ebnerd", "path": str(folder)}


def test_ebnerd(tmp_path: Path) -> None:
    config = logs.config(
        ebnerd(tmp_path / "in"),
        labels={"click": "click", "conversion": "conversion"},
        history={"freeze": "split"},
        columns={
            "item": {"length": {"source": "article_length", "edges": [500]}},
            "event": {"read_time": {"edges": [30]}},
            "request": {"device_type": {}},
        },
    )
    dataset = logs.prepared(config, tmp_path / "out")
    manifest = dataset.manifest
    assert (manifest.events, manifest.dropped["duplicate events"]) == (3, 2)
    assert manifest.dropped["rows of the item table that occur in no log"] == 1
    assert manifest.splits["train"].impressions == 7
    assert manifest.splits["train"].positives == {"click": 3, "conversion": 1}
    first = next(r for r in logs.requests(dataset) if r.user == 1)
    assert first.items == [7, 10]
    assert first.columns["label.click"] == first.columns["label.conversion"] == [0.0, 1.0]
    assert [item for item, _ in first.history] == [7, 8, 9]
    rows = {row["id"]: row["item.length"] for row in dataset.items().to_pylist()}
    assert rows == {None: 0, 7: 2, 8: 1, 9: 0, 10: 0, 11: 0}


def test_ebnerd_training_users(tmp_path: Path) -> None:
    source = ebnerd(tmp_path / "in") | {"train_users": "user_id % 10 < 2"}
    config = logs.config(source, labels={"click": "click"})
    manifest = prepare(config, tmp_path / "out")
    assert (manifest.splits["train"].impressions, manifest.splits["test"].impressions) == (2, 7)
    assert manifest.dropped["training impressions of users outside train_users"] == 5


def ebnerd_as_published(folder: Path) -> dict[str, Any]:
    """The same logs as :func:`ebnerd`, and all that is told of articles."""
    source = ebnerd(folder)
    for part, name in (("train", "train"), ("val", "validation")):
        (folder / name).mkdir()
        for table in ("behaviors", "history"):
            (folder / f"{table}_{part}.parquet").rename(folder / name / f"{table}.parquet")
    (folder / "article_length.parquet").unlink()
    (folder / "premium_articles.parquet").unlink()
    articles = {
        "article_id": pa.array([7, 8, 9, 99], pa.int32()),
        "title": ["An ox", "A hen", "An ox", "A cow"],
        "subtitle": ["ploughs", None, "rests", "is seen by none"],
        "premium": [False, True, False, False],
        "body": ["x" * 600, "x" * 10, None, "x"],
        "published_time": pa.array([dt.datetime(2023, 5, 1)] * 4, pa.timestamp("us")),
        "image_ids": [[1], None, [2, 3], []],
        "topics": [["field"], ["yard", "egg"], ["field"], []],
        "category_str": ["ox", "hen", "ox", "cow"],
        "total_inviews": [1, 2, None, 4],
    }
    pq.write_table(pa.table(articles), folder / "articles.parquet")
    return source


def test_ebnerd_as_published(tmp_path: Path) -> None:
    """The same requests as from the other layout, and articles with their texts."""
    length = {"length": {"source": "article_length", "edges": [500]}}
    here = logs.prepared(logs.config(ebnerd(tmp_path / "a"), columns={"item": length}), tmp_path / "a-out")
    source = ebnerd_as_published(tmp_path / "b")
    settings = [f"source.path={source['path']}", "split.valid_time=0", "counters=[]"]
    config = load_config(CONFIGS / "ebnerd" / "data_published.yaml", PrepareConfig, settings)
    there = logs.prepared(config, tmp_path / "b-out")
    assert here.manifest.dropped == there.manifest.dropped
    assert [r.items for r in logs.requests(here)] == [r.items for r in logs.requests(there)]
    rows = {row["id"]: row for row in there.items().to_pylist()}
    assert [rows[item]["item.title"] for item in (7, 8, 9, 10)] == ["An ox ploughs", "A hen", "An ox rests", ""]
    assert rows[7]["item.category"] == rows[9]["item.category"] not in (0, rows[8]["item.category"])
    assert [len(rows[item]["item.topics"]) for item in (7, 8, 9, 10)] == [1, 2, 1, 0]
    assert [rows[item]["item.length"] for item in (7, 8, 9, 10)] == [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("column", "belongs_to"), [("read_time", "request"), ("next_read_time", "request"), ("total_inviews", "item")]
)
def test_ebnerd_hides_what_happened_afterwards(tmp_path: Path, column: str, belongs_to: str) -> None:
    columns = {belongs_to: {column: {"edges": [1]}}}
    with pytest.raises(PrepareError, match=f"no column '{column}'"):
        prepare(logs.config(ebnerd_as_published(tmp_path / "in"), columns=columns), tmp_path / "out")


def kuairand(folder: Path, csv: bool) -> dict[str, Any]:
    """Ten exposures, one of them twice; a part that others enriched has a column more."""
    folder.mkdir()
    names = ["date", "hourmin", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "profile_stay_time",
             "comment_stay_time", "is_profile_enter", "is_rand", "tab"]  # fmt: skip
    numbers = [*range(9), 8]
    table = {
        "user_id": [n % 2 for n in numbers],
        "video_id": numbers,
        "time_ms": [START + 60_000 * n for n in numbers],
        "is_click": [n % 2 for n in numbers],
        "long_view": [0] * 10,
        "play_time_ms": [1_000 * n for n in numbers],
        "duration_ms": [9_000] * 10,
    } | {name: [0] * 10 for name in names}
    if csv:
        lines = [",".join(table), *(",".join(str(values[n]) for values in table.values()) for n in range(10))]
        (folder / "log_standard_a.csv").write_text("\n".join(lines) + "\n")
    else:
        pq.write_table(pa.table(table | {"watch_ratio": [0.1 * n for n in range(10)]}), folder / "part.parquet")
    test = {name: [values[-1]] for name, values in table.items()} | {"time_ms": [START + 3_600_000]}
    pq.write_table(pa.table(test), folder / "test.parquet")
    (folder / "user_features_x.csv").write_text("user_id,user_active_degree\n0,full_active\n1,\n5,high\n")
    train = "log_standard*.csv" if csv else "part.parquet"
    return {"type": "kuairand", "path": str(folder), "train": [train], "test": ["test.parquet"]}


def test_kuairand_from_csv_and_parquet(tmp_path: Path) -> None:
    hashes: set[str] = set()
    for csv in (True, False):
        config = logs.config(
            kuairand(tmp_path / f"in-{csv}", csv),
            labels={"click": "is_click"},
            history={"label_delay_s": 60},
            columns={"user": {"degree": {"source": "user_active_degree"}}, "event": {"is_click": {}}},
        )
        dataset = logs.prepared(config, tmp_path / f"out-{csv}")
        manifest = dataset.manifest
        assert manifest.dropped["exact duplicate exposures"] == 1
        assert (manifest.events, manifest.splits["train"].impressions) == (10, 9)
        assert [len(r.history) for r in logs.requests(dataset) if r.user == 0 and r.split == "train"] == [0, 1, 2, 3, 4]
        assert {u: row["user.degree"] for u, row in logs.histories(dataset).items()} == {0: 1, 1: 0}
        hashes.add(manifest.content_hash)
    assert len(hashes) == 1


def test_kuairand_ignores_columns_of_a_third_party(tmp_path: Path) -> None:
    columns = {"candidate": {"watch_ratio": {"kind": "dense"}}}
    source = kuairand(tmp_path / "in", csv=False)
    with pytest.raises(PrepareError, match="no column 'watch_ratio'"):
        prepare(logs.config(source, labels={"click": "is_click"}, columns=columns), tmp_path / "out")


def test_synthetic(tmp_path: Path) -> None:
    source = {"type": "synthetic", "users": 20, "items": 100, "events_per_user": 30, "topics": 8}
    config = logs.config(source, labels={"click": "click", "conversion": "conversion"})
    manifest = prepare(config, tmp_path / "out")
    assert {"click", "conversion"} <= set(manifest.oracles)
    assert all(manifest.splits[split].requests for split in manifest.splits)


def public(name: str, ranker_data: Callable[[str], Path], folder: str, **changes: Any) -> PrepareConfig:
    """The config shipped for a public data set; it reads RANKER_DATA, which the fixture has checked."""
    assert ranker_data(folder).parent == Path(os.environ["RANKER_DATA"])
    return load_config(CONFIGS / name / "data.yaml", PrepareConfig, [f"{k}={v}" for k, v in changes.items()])


@pytest.mark.real_data
def test_ml1m_protocol(tmp_path: Path, ranker_data: Callable[[str], Path]) -> None:
    manifest = prepare(public("ml1m", ranker_data, "ml-1m"), tmp_path / "out")
    assert (manifest.events, manifest.users - 1, manifest.items - 1) == (1_000_209, 6_040, 3_706)
    assert (manifest.splits["train"].impressions, manifest.splits["test"].impressions) == (135_597, 56_039)


@pytest.mark.real_data
def test_ebnerd_demo(tmp_path: Path, ranker_data: Callable[[str], Path]) -> None:
    manifest = prepare(public("ebnerd", ranker_data, "ebnerd_demo"), tmp_path / "out")
    splits = manifest.splits
    assert splits["train"].requests + splits["valid"].requests == 24_724
    assert splits["train"].impressions + splits["valid"].impressions == 278_139
    assert (splits["test"].requests, splits["test"].impressions) == (25_356, 304_915)
    assert (manifest.items - 1, splits["test"].users) == (6_915, 1_562)


@pytest.mark.real_data
def test_ebnerd_reference_users(tmp_path: Path, ranker_data: Callable[[str], Path]) -> None:
    changes = {"source.train_users": "user_id % 10 < 6", "split.valid_time": 0, "counters": "[]"}
    manifest = prepare(public("ebnerd", ranker_data, "ebnerd_demo", **changes), tmp_path / "out")
    assert manifest.splits["train"].impressions == 167_847


@pytest.mark.real_data
def test_kuairand_pure(tmp_path: Path, ranker_data: Callable[[str], Path]) -> None:
    manifest = prepare(public("kuairand", ranker_data, "kuairand_pure", counters="[]"), tmp_path / "out")
    assert manifest.dropped["exact duplicate exposures"] == 5_460
    assert sum(info.impressions for info in manifest.splits.values()) == 94_784 + 133_545 - 5_460
    assert (manifest.users - 1, manifest.items - 1) == (25_156, 6_361)
    vocabulary = read_arrow(tmp_path / "out" / "vocabularies" / "item.tag.arrow")
    assert vocabulary.num_rows == manifest.columns["item"]["tag"].size - 1
