"""A codebook sees each user's events up to her first request outside training, and none after training's end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.dataset import MANIFEST, Dataset
from features.semantic_ids.errors import SidsError
from features.semantic_ids.training_events import training_histories
from tests.features.prepare import logs


def read(dataset: Dataset, most_events: int = 10**9) -> list[list[Any]]:
    """Raw items of each history row, partition after partition."""
    items = logs.ids(dataset, "item")
    return [
        [items[i] for i in lists.values[first:last].tolist()]
        for lists in training_histories(dataset, most_events)
        for first, last in zip(lists.offsets[:-1], lists.offsets[1:], strict=True)
    ]


def literal(dataset: Dataset) -> list[list[Any]]:
    """Event by event, from the requests' histories and times."""
    requests = logs.requests(dataset)
    train_end = max(r.time for r in requests if r.split == "train")
    found: list[list[Any]] = []
    for user, row in logs.histories(dataset).items():
        seen = [len(r.history) for r in requests if r.user == user and r.split != "train"]
        end = min(seen, default=len(row["item"]))
        found.append([i for i, t in zip(row["item"][:end], row["time"][:end], strict=True) if t <= train_end])
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"split": {"by": "column", "valid_users": 0.4}},
        {"split": {"by": "column", "valid_time": 0.3}},
        {"split": {"by": "time", "valid_from": "2023-11-15T06:00:00", "test_from": "2023-11-15T12:00:00"}},
        {"split": {"by": "time", "test_from": "2023-11-15T06:00:00"}, "history": {"label_delay_s": 20_000}},
        {"split": {"by": "time", "test_from": "2023-11-15T06:00:00"}, "history": {"freeze": "split"}},
        {"split": {"by": "last", "test_last": 1, "valid_last": 1}},
    ],
)
def test_events_of_the_training_period_are_those_of_the_loops(tmp_path: Path, changes: dict[str, Any]) -> None:
    dataset = logs.prepared(logs.small(tmp_path / "in", **changes), tmp_path / "out")
    found = read(dataset)
    assert found == literal(dataset)
    assert 0 < sum(map(len, found)) < dataset.manifest.events


def test_reading_stops_after_the_partition_that_reaches_the_limit(tmp_path: Path) -> None:
    source = logs.write(tmp_path / "in", events=logs.events(users=12), impressions=logs.impressions(users=12))
    dataset = logs.prepared(logs.config(source, partitions=4), tmp_path / "out")
    whole = [lists.values.size for lists in training_histories(dataset, 10**9)]
    assert len(whole) == 4
    assert len(list(training_histories(dataset, int(np.cumsum(whole)[1])))) == 2
    assert len(list(training_histories(dataset, int(np.cumsum(whole)[1]) + 1))) == 3
    assert len(list(training_histories(dataset, 1))) == 1


def test_without_training_requests_there_is_no_training_period(tmp_path: Path) -> None:
    dataset = logs.prepared(logs.small(tmp_path / "in"), tmp_path / "out")
    raw = json.loads((dataset.root / MANIFEST).read_text())
    raw["splits"]["train"]["requests"] = 0
    (dataset.root / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(SidsError, match=r"no training requests.*prepare a training split"):
        read(Dataset(dataset.root))
