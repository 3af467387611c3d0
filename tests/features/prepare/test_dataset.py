"""What a dataset holds: the same bytes each time, indices by frequency, vocabularies, splits, labels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from features.dataset import read_arrow
from features.prepare import prepare
from features.schema import PrepareConfig, Split
from tests.features.prepare import logs
from tests.features.prepare.logs import DAY, START


def rich(folder: Path, **changes: Any) -> PrepareConfig:
    """Logs with columns of every kind in every scope."""
    shown = logs.impressions(200, users=9, items=11) | {"device": ["tv", "web", None, "app"] * 50}
    seen = logs.events(300, users=9, items=13) | {"action": ["view", "buy", "view"] * 100}
    items = {
        "item": list(range(100, 120)),
        "tags": [["a", "b"], [], None, ["b", None]] * 5,
        "words": ["red car", "", None, "blue"] * 5,
        "content": [[float(n), 1.0] for n in range(20)],
        "price": [float(n) for n in range(20)],
    }
    users = {"user": list(range(9)), "age": [10.0, 20.0, None] * 3}
    columns = {
        "user": {"age": {"edges": [15, 20]}},
        "item": {
            "tags": {"kind": "bag"},
            "words": {"kind": "bag", "separator": " "},
            "content": {"kind": "vector"},
            "price": {"kind": "dense", "transform": "log1p"},
        },
        "event": {"action": {}},
        "request": {"device": {}},
        "candidate": {"age": {"kind": "dense", "source": "(time - first_seen) / 3.6e6"}},
    }
    source = logs.write(folder, events=seen, impressions=shown, items=items, users=users)
    counters = [{"name": "ctr", "key": ["item"], "of": "impressions", "value": "click"}]
    return logs.config(source, columns=columns, counters=counters, **changes)


def test_the_same_input_gives_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    found = [
        prepare(rich(tmp_path / "in", threads=threads, memory_limit_gb=limit), tmp_path / f"out{number}")
        for number, (threads, limit) in enumerate([(1, 0.5), (1, 0.3), (2, 0.5), (4, 0.5)])
    ]
    assert len({m.content_hash for m in found}) == 1
    trees = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*.arrow")}
        for root in (tmp_path / f"out{n}" for n in range(4))
    ]
    assert all(tree == trees[0] for tree in trees)


def test_the_hash_tells_content_apart(tmp_path: Path) -> None:
    first = prepare(logs.small(tmp_path / "in"), tmp_path / "a")
    rows = logs.impressions()
    rows["click"][0] = 1 - rows["click"][0]
    other = prepare(logs.config(logs.write(tmp_path / "in2", events=logs.events(), impressions=rows)), tmp_path / "b")
    assert first.content_hash != other.content_hash


def test_attributes_are_encoded(tmp_path: Path) -> None:
    dataset = logs.prepared(rich(tmp_path / "in"), tmp_path / "out")
    items = dataset.items()
    assert items.num_rows == dataset.manifest.items == 14
    rows = {row["id"]: row for row in items.to_pylist()}
    tags = {v["value"]: v["index"] for v in read_arrow(dataset.root / "vocabularies" / "item.tags.arrow").to_pylist()}
    assert rows[None]["item.tags"] == []  # row 0
    assert rows[None]["item.content"] == [0.0, 0.0]
    assert rows[100]["item.tags"] == [tags["a"], tags["b"]]
    assert rows[101]["item.tags"] == rows[102]["item.tags"] == []
    assert rows[103]["item.tags"] == [tags["b"], 0]  # a null in a bag is an unknown value
    assert [len(rows[n]["item.words"]) for n in (100, 101, 102, 103)] == [2, 0, 0, 1]
    assert rows[107]["item.content"] == [7.0, 1.0]
    assert rows[100]["item.price"] == 0.0
    assert rows[101]["item.price"] == pytest.approx(0.6931472)
    assert items.schema.field("item.content").type == pa.list_(pa.float32(), 2)
    ages = {user: row["user.age"] for user, row in logs.histories(dataset).items()}
    assert (ages[0], ages[1], ages[2]) == (1, 3, 0)  # below 15; 20 and above; null
    columns = dataset.manifest.columns
    assert (columns["item"]["tags"].size, columns["user"]["age"].size) == (3, 4)
    assert (columns["item"]["content"].dim, columns["candidate"]["ctr_rate"].kind) == (2, "dense")


def test_items_are_indexed_by_frequency_before_the_end_of_training(tmp_path: Path) -> None:
    source = logs.write(
        tmp_path / "in",
        events={
            "user": [1] * 7,
            "item": [7, 7, 8, 7, 5, 5, 9],
            "time": [START + n for n in range(5)] + [START + DAY] * 2,
        },
        impressions={
            "user": [1, 1],
            "item": [8, 6],
            "time": [START + 10, START + DAY],
            "click": [0, 1],
            "split": ["train", "test"],
        },
    )
    dataset = logs.prepared(logs.config(source), tmp_path / "all")
    assert logs.ids(dataset, "item") == {1: 7, 2: 8, 3: 5, 4: 6, 5: 9}  # 6 and 9 occur after training only
    assert (dataset.manifest.known_items, dataset.manifest.splits["test"].unknown_items) == (4, 1)
    frequent = logs.prepared(logs.config(source, item_min_count=2), tmp_path / "frequent")
    assert logs.ids(frequent, "item") == {1: 7, 2: 8, 3: 5, 4: 6, 5: 9}
    assert frequent.manifest.known_items == 3


def test_vocabularies_hold_what_training_has_seen(tmp_path: Path) -> None:
    rows = logs.impressions() | {"device": ["a"] * 5 + ["b"] * 14 + ["rare"] + ["new"] * 10}
    source = logs.write(tmp_path / "in", impressions=rows)
    columns = {"request": {"device": {"min_count": 2}}}
    dataset = logs.prepared(logs.config(source, columns=columns), tmp_path / "out")
    table = read_arrow(dataset.root / "vocabularies" / "request.device.arrow").to_pylist()
    assert table == [{"value": "b", "index": 1}, {"value": "a", "index": 2}]
    assert {r.columns["request.device"] for r in logs.requests(dataset) if r.split == "test"} == {0}


def test_candidates_keep_the_order_of_the_files(tmp_path: Path) -> None:
    source = logs.write(
        tmp_path / "in",
        impressions={
            "user": [1, 1, 1, 1],
            "item": [9, 3, 7, 1],
            "time": [START + 5, START, START + 5, START],
            "request": ["b", "a", "b", "a"],
            "click": [1, 0, 0, 1],
            "split": ["train"] * 4,
        },
    )
    found = logs.requests(logs.prepared(logs.config(source), tmp_path / "out"))
    assert [(r.time, r.items, r.columns["label.click"]) for r in found] == [
        (START, [3, 1], [0.0, 1.0]),
        (START + 5, [9, 7], [1.0, 0.0]),
    ]


def test_several_files_are_one_log(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    logs.write(whole, events=logs.events(), impressions=logs.impressions())
    for name, rows in (("events", logs.events()), ("impressions", logs.impressions())):
        half = len(rows["user"]) // 2
        logs.write(parts / name, a={k: v[:half] for k, v in rows.items()}, b={k: v[half:] for k, v in rows.items()})
    hashes = {
        prepare(
            logs.config({"type": "logs", "events": {"path": str(e)}, "impressions": {"path": str(i)}}),
            tmp_path / f"out-{number}",
        ).content_hash
        for number, (e, i) in enumerate(
            [
                (whole / "events.parquet", whole / "impressions.parquet"),
                (parts / "events", parts / "impressions"),
                (parts / "events" / "*.parquet", parts / "impressions" / "[ab].parquet"),
            ]
        )
    }
    assert len(hashes) == 1


def test_oracles_are_stored_beside_the_labels(tmp_path: Path) -> None:
    rows = logs.impressions() | {"oracle_click": [0.25] * 30}
    dataset = logs.prepared(logs.config(logs.write(tmp_path / "in", impressions=rows)), tmp_path / "out")
    assert dataset.manifest.oracles == ["click"]
    assert {p for r in logs.requests(dataset) for p in r.columns["oracle.click"]} == {0.25}


def test_a_users_partition_is_fixed_for_all_time(tmp_path: Path) -> None:
    """The lower half of the MD5 of the id's text, whatever engine, version or platform."""
    dataset = logs.prepared(logs.small(tmp_path / "in", partitions=4), tmp_path / "out")
    users = logs.ids(dataset, "user")
    for number in range(4):
        for user in dataset.histories(number)["user"].to_pylist():
            digest = hashlib.md5(str(users[user]).encode()).digest()
            assert int.from_bytes(digest[8:], "little") % 4 == number


def by_split(dataset: logs.Dataset) -> dict[str, list[tuple[Any, int]]]:
    found: dict[str, list[tuple[Any, int]]] = {}
    for request in logs.requests(dataset):
        found.setdefault(request.split, []).append((request.user, request.time - START))
    return {split: sorted(rows) for split, rows in found.items()}


def times(user_times: list[tuple[int, int]]) -> dict[str, Any]:
    count = len(user_times)
    return {
        "user": [u for u, _ in user_times],
        "item": [1] * count,
        "time": [START + t for _, t in user_times],
        "click": [0] * count,
        "split": ["train"] * count,
    }


def test_split_by_time(tmp_path: Path) -> None:
    """An instant belongs to the split that begins with it; a request is where its first impression is."""
    day = 1_699_920_000_000 - START  # 2023-11-14, before START
    rows = times([(1, day + DAY - 1), (1, day + DAY), (1, day + 2 * DAY)])
    split = {"by": "time", "valid_from": "2023-11-15", "test_from": "2023-11-16T00:00:00"}
    dataset = logs.prepared(logs.config(logs.write(tmp_path / "in", impressions=rows), split=split), tmp_path / "out")
    assert by_split(dataset) == {
        "train": [(1, day + DAY - 1)],
        "valid": [(1, day + DAY)],
        "test": [(1, day + 2 * DAY)],
    }


def test_training_may_start_later(tmp_path: Path) -> None:
    """What came before is no request, but its users, items and values are known, and it is in histories."""
    rows = times([(1, 0), (2, DAY), (3, 2 * DAY), (1, 3 * DAY)])
    rows |= {"item": [7, 8, 9, 6], "place": ["a", "b", "c", "d"]}
    source = logs.write(
        tmp_path / "in", impressions=rows, events={"user": [2, 3], "item": [7, 7], "time": [START, START]}
    )
    split = {
        "by": "time",
        "train_from": "2023-11-15T22:13:20",
        "test_from": "2023-11-16T22:13:20",
    }  # START + DAY, + 2 DAY
    columns = {"candidate": {"place": {}}}
    dataset = logs.prepared(logs.config(source, split=split, columns=columns), tmp_path / "out")
    assert by_split(dataset) == {"train": [(2, DAY)], "test": [(1, 3 * DAY), (3, 2 * DAY)]}
    manifest = dataset.manifest
    assert manifest.dropped["requests before split.train_from"] == 1
    known = {kind: logs.ids(dataset, kind) for kind in ("user", "item")}
    assert {known["user"][i] for i in range(1, manifest.known_users)} == {1, 2}
    assert {known["item"][i] for i in range(1, manifest.known_items)} == {7, 8}
    assert set(logs.ids(dataset, "candidate.place").values()) == {"a", "b"}
    assert {request.user: request.history for request in logs.requests(dataset)}[3] == [(7, START)]
    assert manifest.splits["train"].first_ms == START + DAY


def test_training_may_end_with_the_logs(tmp_path: Path) -> None:
    rows = times([(1, 0), (1, DAY)])
    source = logs.write(tmp_path / "in", impressions=rows)
    split = {"by": "time", "train_from": "2023-11-15T00:00:00"}
    dataset = logs.prepared(logs.config(source, split=split), tmp_path / "out")
    assert by_split(dataset) == {"train": [(1, DAY)]}


def test_split_by_last_requests(tmp_path: Path) -> None:
    rows = times([(1, t) for t in range(5)] + [(2, t) for t in range(2)])
    split = {"by": "last", "valid_last": 1, "test_last": 2}
    dataset = logs.prepared(logs.config(logs.write(tmp_path / "in", impressions=rows), split=split), tmp_path / "out")
    assert by_split(dataset) == {
        "train": [(1, 0), (1, 1)],
        "valid": [(1, 2)],
        "test": [(1, 3), (1, 4), (2, 0), (2, 1)],
    }


def test_valid_is_the_latest_share_of_training(tmp_path: Path) -> None:
    rows = times([(user, 10 * user + t) for user in range(10) for t in range(10)])
    source = logs.write(tmp_path / "in", impressions=rows)
    dataset = logs.prepared(logs.config(source, split={"by": "column", "valid_time": 0.25}), tmp_path / "out")
    splits = dataset.manifest.splits
    assert (splits["train"].requests, splits["valid"].requests) == (75, 25)
    assert splits["train"].last_ms < splits["valid"].first_ms


def test_valid_is_a_share_of_users(tmp_path: Path) -> None:
    rows = times([(user, t) for user in range(400) for t in range(2)])
    source = logs.write(tmp_path / "in", impressions=rows)
    dataset = logs.prepared(logs.config(source, split={"by": "column", "valid_users": 0.3}), tmp_path / "out")
    train, valid = ({user for user, _ in by_split(dataset)[name]} for name in ("train", "valid"))
    assert not train & valid
    assert 80 < len(valid) < 160


def test_samples_derived_from_events(tmp_path: Path) -> None:
    """Each user's last 4 events that have 2 before them, file order breaking ties: 3 train and the last one tests."""
    source = logs.write(
        tmp_path / "in",
        events={
            "user": [1] * 8 + [2] * 3 + [3] * 2,
            "item": [*range(10, 18), 20, 21, 22, 30, 31],
            "time": [START + t for t in (0, 1, 2, 3, 4, 4, 4, 5, 0, 0, 0, 0, 1)],
            "rating": [1, 5, 3, 4, 5, 2, 4, 4, 5, 5, 4, 5, 5],
        },
    )
    config = logs.config(
        source,
        derive={"min_history": 2, "last": 4},
        split={"by": "last", "test_last": 1},
        labels={"click": "rating >= 4", "conversion": "rating = 5"},
    )
    found = logs.requests(logs.prepared(config, tmp_path / "out"))
    samples = {(r.items[0]): (r.split, len(r.history), r.columns["label.click"][0]) for r in found}
    assert samples == {
        14: ("train", 4, 1.0),
        15: ("train", 4, 0.0),  # at one time with 14 and 16: neither is in its history
        16: ("train", 4, 1.0),
        17: ("test", 7, 1.0),
        22: ("test", 0, 1.0),
    }


def test_only_events_that_fit_become_samples(tmp_path: Path) -> None:
    rows = {"user": [1] * 4, "item": [1, 2, 3, 4], "time": [START + t for t in range(4)], "kind": ["a", "b", "a", "b"]}
    config = logs.config(
        logs.write(tmp_path / "in", events=rows),
        derive={"samples": "kind = 'b'"},
        labels={"click": "item = 4"},
        split={"by": "last", "test_last": 1},
    )
    found = logs.requests(logs.prepared(config, tmp_path / "out"))
    assert [(r.split, r.items, len(r.history)) for r in found] == [("train", [2], 1), ("test", [4], 3)]


def test_manifest_counts(tmp_path: Path) -> None:
    manifest = prepare(logs.small(tmp_path / "in"), tmp_path / "out")
    rows = logs.impressions()
    wanted: dict[Split, int] = {"train": 20, "valid": 5, "test": 5}
    for split, count in wanted.items():
        info = manifest.splits[split]
        clicks = sum(c for c, s in zip(rows["click"], rows["split"], strict=True) if s == split)
        assert (info.impressions, info.positives) == (count, {"click": clicks})
        assert sum(p.impressions[split] for p in manifest.partitions) == count
        assert sum(p.requests[split][1] - p.requests[split][0] for p in manifest.partitions) == info.requests
    assert sum(p.histories for p in manifest.partitions) == manifest.users - 1
    assert sum(p.events for p in manifest.partitions) == manifest.events == 40


def test_default_partitions_follow_the_size_of_the_logs(tmp_path: Path) -> None:
    source = logs.write(tmp_path / "in", events=logs.events(9_000, users=50), impressions=logs.impressions(1_000))
    config = logs.config(source, partitions=None, rows_per_partition=1_000)
    assert len(prepare(config, tmp_path / "many").partitions) == 10
    assert len(prepare(logs.small(tmp_path / "in2", partitions=None), tmp_path / "few").partitions) == 8


@pytest.mark.parametrize("scope", ["event", "candidate"])
def test_lists_within_lists_are_refused(scope: str) -> None:
    with pytest.raises(ValidationError, match="make it an item column"):
        logs.config({"type": "synthetic"}, columns={scope: {"x": {"kind": "bag"}}})
