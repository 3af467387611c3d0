"""Draws beside a run's predictions: equal to those drawn anew, and never those of other predictions."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from features.errors import UserError
from ranker.compare import stored_draws
from ranker.compare.bootstrap import Measured, measure_draws
from ranker.compare.stored_draws import FILE, draws_of
from ranker.evaluation.stored_predictions import write_predictions
from tests.ranker.compare.test_bootstrap import impressions


def same(one: Measured, other: Measured) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(x, other[key], equal_nan=True) for key, x in one.items())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_predictions(impressions(1), tmp_path / "predictions.parquet")
    return tmp_path


def test_they_are_those_drawn_anew_and_drawn_once(run: Path, monkeypatch: pytest.MonkeyPatch):
    first = draws_of(run, 20, 3)
    assert same(first, measure_draws(impressions(1), 20, 3))
    assert sorted(file.name for file in run.iterdir()) == [FILE, "predictions.parquet"]
    monkeypatch.setattr(stored_draws, "measure_draws", None)
    assert same(draws_of(run, 20, 3), first)


@pytest.mark.parametrize(("draws", "seed"), [(21, 3), (20, 4)])
def test_other_draws_are_drawn(run: Path, draws: int, seed: int):
    draws_of(run, 20, 3)
    assert same(draws_of(run, draws, seed), measure_draws(impressions(1), draws, seed))


def test_new_predictions_are_measured(run: Path):
    """Of the same size too."""
    draws_of(run, 20, 3)
    path = run / "predictions.parquet"
    before = path.stat()
    write_predictions(impressions(2), path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert same(draws_of(run, 20, 3), measure_draws(impressions(2), 20, 3))


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_a_file_that_cannot_be_read_is_made_again(run: Path, content: bytes):
    (run / FILE).write_bytes(content)
    expected = measure_draws(impressions(1), 20, 3)
    assert same(draws_of(run, 20, 3), expected)
    assert same(draws_of(run, 20, 3), expected)


def test_without_predictions_it_says_how_to_write_them(tmp_path: Path):
    with pytest.raises(UserError, match=r"ranker evaluate .* --predictions"):
        draws_of(tmp_path, 20, 3)
