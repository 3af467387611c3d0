"""Counters equal a literal count of what was known before each impression."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.features.prepare import logs
from tests.features.prepare.logs import START

_rows = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 10), st.booleans()), max_size=20)


@settings(max_examples=12, deadline=None)
@given(
    _rows,
    _rows,
    st.sampled_from([["item"], ["user"], ["user", "item"]]),
    st.sampled_from(["impressions", "events"]),
    st.sampled_from([None, 1, 4]),
    st.integers(0, 3),
)
def test_counters_equal_brute_force(
    shown: list[tuple[int, int, int, bool]],
    log: list[tuple[int, int, int, bool]],
    key: list[str],
    of: str,
    window: int | None,
    delay: int,
) -> None:
    shown = [(0, 0, 5, True), *shown]
    log = list(dict.fromkeys([(0, 0, 1, True), *log]))

    def columns(rows: list[tuple[int, int, int, bool]]) -> dict[str, Any]:
        return {
            "user": [r[0] for r in rows],
            "item": [r[1] for r in rows],
            "time": [START + r[2] for r in rows],
            "good": [int(r[3]) for r in rows],
        }

    counter = {"name": "c", "key": key, "of": of, "value": "good", "delay_s": delay / 1000, "smoothing": 3}
    if window is not None:
        counter["window_s"] = window / 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        impressions = columns(shown) | {"request": list(range(len(shown))), "split": ["train"] * len(shown)}
        source = logs.write(folder / "in", events=columns(log), impressions=impressions)
        config = logs.config(source, labels={"click": "good"}, counters=[counter], columns={"event": {"good": {}}})
        found = logs.requests(logs.prepared(config, folder / "out"))
    rows = shown if of == "impressions" else log
    end = max(t for _, _, t, _ in shown)
    training = [g for _, _, t, g in rows if of == "impressions" or t <= end]
    prior = sum(training) / len(training)
    expected: list[tuple[Any, ...]] = []
    for user, item, time, _ in shown:
        same = [
            good
            for u, i, t, good in rows
            if ("user" not in key or u == user)
            and ("item" not in key or i == item)
            and t < time - delay
            and (window is None or t >= time - delay - window)
        ]
        rate = (sum(same) + 3 * prior) / (len(same) + 3)
        expected.append((user, item, START + time, pytest.approx(math.log1p(len(same))), pytest.approx(rate)))
    actual = [
        (r.user, r.items[0], r.time, r.columns["candidate.c_count"][0], r.columns["candidate.c_rate"][0]) for r in found
    ]
    assert sorted(actual) == sorted(
        expected, key=lambda row: (*row[:3], float(row[3].expected), float(row[4].expected))
    )


def test_rows_without_a_value_do_not_count(tmp_path: Path) -> None:
    """A conversion rate counts clicks only: its value is null where there was none."""
    source = logs.write(
        tmp_path / "in",
        impressions={
            "user": [1, 2, 3, 4],
            "item": [10] * 4,
            "time": [START, START + 1, START + 2, START + 3],
            "click": [1, 0, 1, 0],
            "buy": [1, 0, 0, 0],
            "split": ["train"] * 4,
        },
    )
    counter = {"name": "cvr", "key": ["item"], "of": "impressions", "value": "CASE WHEN click = 1 THEN buy END"}
    dataset = logs.prepared(logs.config(source, counters=[counter]), tmp_path / "out")
    counts = {r.user: round(math.expm1(r.columns["candidate.cvr_count"][0])) for r in logs.requests(dataset)}
    assert counts == {1: 0, 2: 1, 3: 1, 4: 2}
