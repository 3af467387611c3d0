"""A history holds what happened strictly before the request, less the label delay, and nothing else."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.prepare.partitions import history_ends
from tests.features.prepare import logs
from tests.features.prepare.logs import DAY, START


def test_a_planted_leak_is_excluded(tmp_path: Path) -> None:
    """The click that a label tells of is in the log at the request's very time, and after it: neither is history."""
    before, leak, later = START, START + 5_000, START + 6_000
    source = logs.write(
        tmp_path / "in",
        events={"user": [1, 1, 1], "item": [10, 99, 98], "time": [before, leak, later]},
        impressions={"user": [1], "item": [99], "time": [leak], "click": [1], "split": ["train"]},
    )
    (request,) = logs.requests(logs.prepared(logs.config(source), tmp_path / "out"))
    assert request.history == [(10, before)]
    assert request.items == [99]


@pytest.mark.parametrize(("delay_s", "seen"), [(0, [10, 11]), (1, [10]), (2, [10]), (2.001, []), (60, [])])
def test_a_label_delay_moves_the_end_back(tmp_path: Path, delay_s: float, seen: list[int]) -> None:
    source = logs.write(
        tmp_path / "in",
        events={"user": [1, 1], "item": [10, 11], "time": [START, START + 1_500]},
        impressions={"user": [1], "item": [10], "time": [START + 2_001], "click": [0], "split": ["train"]},
    )
    config = logs.config(source, history={"label_delay_s": delay_s})
    (request,) = logs.requests(logs.prepared(config, tmp_path / "out"))
    assert [item for item, _ in request.history] == seen


def test_frozen_histories_end_where_the_split_begins(tmp_path: Path) -> None:
    source = logs.write(
        tmp_path / "in",
        events={"user": [1] * 4, "item": [10, 11, 12, 13], "time": [START + t for t in (0, 100, 200, 300)]},
        impressions={
            "user": [1, 1, 1, 1],
            "item": [10, 10, 10, 10],
            "time": [START + t for t in (50, 150, 250, 350)],
            "click": [0, 1, 0, 1],
            "split": ["train", "train", "test", "test"],
        },
    )
    frozen = logs.requests(logs.prepared(logs.config(source, history={"freeze": "split"}), tmp_path / "frozen"))
    assert [len(r.history) for r in frozen] == [1, 1, 3, 3]
    free = logs.requests(logs.prepared(logs.config(source), tmp_path / "free"))
    assert [len(r.history) for r in free] == [1, 2, 3, 4]


def test_unsorted_events_are_sorted_and_duplicates_dropped_and_both_counted(tmp_path: Path) -> None:
    source = logs.write(
        tmp_path / "in",
        events={
            "user": [1, 1, 1, 1, 1],
            "item": [12, 10, 11, 10, 10],
            "time": [START + 2, START, START + 1, START, START],
            "action": ["a", "a", "a", "a", "b"],
        },
        impressions={"user": [1], "item": [10], "time": [START + 9], "click": [0], "split": ["train"]},
    )
    config = logs.config(source, columns={"event": {"action": {}}})
    dataset = logs.prepared(config, tmp_path / "out")
    (request,) = logs.requests(dataset)
    assert [item for item, _ in request.history] == [10, 10, 11, 12]  # the action differs: that one is another event
    assert dataset.manifest.dropped == {"duplicate events": 1}
    assert dataset.manifest.counted["breaks in the time order of users' events"] == 2
    assert dataset.manifest.events == 4


def test_users_without_events_and_without_impressions_both_have_a_row(tmp_path: Path) -> None:
    source = logs.write(
        tmp_path / "in",
        events={"user": [1, 1], "item": [10, 11], "time": [START, START + 1]},
        impressions={"user": [2], "item": [10], "time": [START + 9], "click": [0], "split": ["train"]},
    )
    dataset = logs.prepared(logs.config(source), tmp_path / "out")
    assert {user: row["item"] for user, row in logs.histories(dataset).items()} == {1: [10, 11], 2: []}
    assert logs.requests(dataset)[0].history == []
    assert dataset.manifest.counted == {"users without events": 1, "users without impressions": 1}
    assert (dataset.manifest.users, dataset.manifest.known_users) == (3, 2)
    assert logs.ids(dataset, "user") == {1: 2, 2: 1}  # known first


def test_no_events_at_all_gives_empty_histories(tmp_path: Path) -> None:
    source = logs.write(tmp_path / "in", impressions=logs.impressions())
    dataset = logs.prepared(logs.config(source), tmp_path / "out")
    assert all(request.history == [] for request in logs.requests(dataset))


_events = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 12)), max_size=30)
_shown = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 12), st.sampled_from(["train", "test"])), min_size=1, max_size=12
)


@settings(max_examples=12, deadline=None)
@given(_events, _shown, st.integers(0, 4), st.sampled_from(["none", "day", "split"]))
def test_histories_equal_brute_force(
    log: list[tuple[int, int, int]], shown: list[tuple[int, int, str]], delay: int, freeze: str
) -> None:
    """Over random small logs full of ties."""
    shown = [(0, 6, "train"), *shown]
    start = (START // DAY + 1) * DAY - 5  # a midnight lies within the log
    tables: dict[str, Any] = {
        "impressions": {
            "user": [u for u, _, _ in shown],
            "item": [5] * len(shown),
            "time": [start + t for _, t, _ in shown],
            "request": list(range(len(shown))),
            "click": [0] * len(shown),
            "split": [s for _, _, s in shown],
        }
    }
    if log:
        columns = zip(*log, strict=True)
        tables["events"] = dict(zip(("user", "item", "time"), map(list, columns), strict=True))
        tables["events"]["time"] = [start + t for t in tables["events"]["time"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = logs.write(folder / "in", **tables)
        config = logs.config(source, history={"label_delay_s": delay / 1000, "freeze": freeze})
        found = logs.requests(logs.prepared(config, folder / "out"))
    firsts = {s: min(t for _, t, other in shown if other == s) for s in {s for _, _, s in shown}}
    unique = sorted(set(log), key=lambda e: (e[2], log.index(e)))
    expected: dict[int, list[tuple[int, int]]] = {}
    for number, (user, time, split) in enumerate(shown):
        midnight = (start + time) // DAY * DAY - start
        until = min(time - delay, {"none": time, "day": midnight, "split": firsts[split]}[freeze])
        expected[number] = [(i, start + t) for u, i, t in unique if u == user and t < until]
    keys = {number: (shown[number][2], shown[number][0], start + shown[number][1]) for number in expected}
    assert len(found) == len(expected)
    assert sorted((r.split, r.user, r.time, r.history) for r in found) == sorted(
        (*keys[number], history) for number, history in expected.items()
    )


def test_requests_are_sorted_by_split_row_time(tmp_path: Path) -> None:
    dataset = logs.prepared(logs.small(tmp_path / "in"), tmp_path / "out")
    for number, partition in enumerate(dataset.manifest.partitions):
        batch = dataset.requests(number)
        for low, high in partition.requests.values():
            keys = list(zip(batch["row"].to_pylist()[low:high], batch["time"].to_pylist()[low:high], strict=True))
            assert keys == sorted(keys)
        assert sum(high - low for low, high in partition.requests.values()) == batch.num_rows


def test_history_ends_with_times_far_apart() -> None:
    """Row and time are combined in one integer without overflow: only the rank of a time enters."""
    row = np.array([0, 0, 1], dtype=np.int64)
    time = np.array([0, 2**62, 5], dtype=np.int64)
    offsets = np.array([0, 2, 3, 3], dtype=np.int64)
    asked = np.array([0, 0, 0, 1, 1, 2], dtype=np.int64)
    until = np.array([0, 1, 2**62 + 1, 5, 6, 9], dtype=np.int64)
    assert history_ends(row, time, offsets, asked, until).tolist() == [0, 1, 2, 0, 1, 0]


def test_histories_frozen_daily_end_at_midnight(tmp_path: Path) -> None:
    """A request sees nothing of its own day (UTC)."""
    midnight = START // DAY * DAY + DAY
    source = logs.write(
        tmp_path / "in",
        events={"user": [1] * 3, "item": [10, 11, 12], "time": [midnight - 1, midnight, midnight + 5]},
        impressions={"user": [1], "item": [10], "time": [midnight + 9], "click": [0], "split": ["train"]},
    )
    (request,) = logs.requests(logs.prepared(logs.config(source, history={"freeze": "day"}), tmp_path / "out"))
    assert [item for item, _ in request.history] == [10]
