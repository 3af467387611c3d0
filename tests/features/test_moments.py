"""Moments over partitions against NumPy over everything at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from features.dataset import Dataset, partition_dir
from features.moments import dense_moments
from features.schema import Split
from features.selection import Feature
from tests.features.datasets import everything, rewrite, write_dataset


def flat(dataset: Dataset, name: str, splits: tuple[Split, ...]) -> list[float]:
    """All values of a column that count, by loops."""
    scope = name.split(".")[0]
    if scope == "item":
        return [row[name] for row in dataset.items().to_pylist()[1:]]
    found: list[float] = []
    for p, info in enumerate(dataset.manifest.partitions):
        rows = dataset.histories(p).to_pylist()
        if scope in ("request", "candidate"):
            requests = dataset.requests(p).to_pylist()
            rows = [row for split in splits for row in requests[slice(*info.requests[split])]]
        for row in rows:
            found += row[name] if isinstance(row[name], list) else [row[name]]
    return found


@pytest.mark.parametrize("splits", [("train",), ("test", "train")])
def test_moments_equal_numpys(tmp_path: Path, splits: tuple[Split, ...]) -> None:
    dataset = write_dataset(tmp_path, seed=2, partitions=6)
    spec = everything(dataset).spec
    features = (*spec.request_dense, *spec.candidate_dense, *spec.event_dense)
    moments = dense_moments(dataset, features, splits)
    assert list(moments) == ["user.age", "request.load", "item.price", "candidate.score", "event.dwell"]
    for name, (mean, deviation) in moments.items():
        values = flat(dataset, name, splits)
        assert len(values) > 10
        assert mean == pytest.approx(np.mean(values), rel=1e-12)
        assert deviation == pytest.approx(np.std(values), rel=1e-12)


def replaced(dataset: Dataset, values: list[float]) -> tuple[float, float]:
    """Moments of user.age after it has been replaced, value by value."""
    left = iter(values)
    for p in range(len(dataset.manifest.partitions)):
        column = pa.array([next(left) for _ in range(dataset.histories(p).num_rows)], pa.float64())
        rewrite(partition_dir(dataset.root, p) / "histories.arrow", {"user.age": column})
    return dense_moments(dataset, (Feature("user.age", "user", "dense", 0),), ("train",))["user.age"]


def test_a_large_mean_does_not_swallow_the_deviation(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, seed=2, partitions=6)
    mean, deviation = replaced(dataset, [1.7e9 + i % 2 for i in range(100)])
    assert mean == pytest.approx(1.7e9 + 0.5, abs=0.1)
    assert deviation == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1.7e9 / 3])
def test_a_constant_has_deviation_one(tmp_path: Path, constant: float) -> None:
    dataset = write_dataset(tmp_path, seed=2, partitions=6)
    assert replaced(dataset, [constant] * 100) == (pytest.approx(constant), 1.0)


def test_small_numbers_are_not_constant(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, seed=2, partitions=6)
    _, deviation = replaced(dataset, [1e-8 * (i % 2) for i in range(100)])
    assert deviation == pytest.approx(5e-9, rel=0.1)


def test_a_feature_without_values_stands_as_it_is(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, partitions=2, users=0)
    assert dense_moments(dataset, (Feature("request.load", "request", "dense", 0),), ("train",)) == {
        "request.load": (0.0, 1.0)
    }
