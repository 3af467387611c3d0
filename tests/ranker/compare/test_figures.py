"""Curves are those of the scores, and a figure is an SVG that stands alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import auc, roc_auc_score

from ranker.compare.figures import by_method, calibration_curve, longest_rows, looks, roc_curve, several_lengths, svg
from ranker.compare.plan import Row
from ranker.compare.results import Estimate, Results, RowResult
from ranker.pictures.canvas import new_figure


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9)), min_size=2, max_size=60))
def test_the_area_under_the_curve_is_the_auc(rows: list[tuple[int, int]]):
    """With ties: as with all of a tie or none of it."""
    label, score = np.array([label for label, _ in rows]), np.array([score for _, score in rows]) / 10
    false, true = roc_curve(label, score)
    assert (false[0], true[0]) == (0, 0)
    if 0 < label.sum() < len(label):
        assert (false[-1], true[-1]) == (1, 1)
        assert auc(false, true) == pytest.approx(roc_auc_score(label, score), abs=1e-12)


def test_a_long_curve_is_thinned():
    rng = np.random.default_rng(0)
    label, score = rng.integers(0, 2, 10_000), rng.random(10_000)
    false, true = roc_curve(label, score)
    assert len(false) <= 401
    assert auc(false, true) == pytest.approx(roc_auc_score(label, score), abs=1e-3)


def test_calibration_bins_hold_equally_many():
    score = np.random.default_rng(0).permutation(150) / 150
    p, rate = calibration_curve((score > 0.5).astype(float), score)
    assert len(p) == 15
    np.testing.assert_allclose(p, np.sort(score).reshape(15, 10).mean(1))
    np.testing.assert_allclose(rate, (np.sort(score) > 0.5).reshape(15, 10).mean(1))
    few = calibration_curve(np.array([1.0]), np.array([0.3]))
    assert (few[0].tolist(), few[1].tolist()) == ([0.3], [1.0])


def results_of(*rows: Row) -> Results:
    return Results([RowResult(row, {}, {}, [], {}) for row in rows], {}, [], {}, 0)


def test_of_each_method_the_row_that_reads_most():
    rows = [Row("a", 5), Row("a", 50), Row("b", 0), Row("b", 99), Row("c", None), Row("a", 7, (("k", "1"),))]
    assert [r.row for r in longest_rows(results_of(*rows))] == [rows[1], rows[2], rows[4], rows[5]]


def test_one_length_is_drawn_method_by_method():
    """The best on top; one without an AUC is left out."""
    results = results_of(Row("a", 5), Row("b", 5), Row("c", None), Row("d", 5))
    assert not several_lengths(results)
    assert several_lengths(results_of(Row("a", 5), Row("a", 6), Row("c", None)))
    for result, value in zip(results.rows, (0.7, 0.6, 0.8, None), strict=True):
        result.tasks = {"ctr": {"auc": Estimate(value, 0.01, 3)}}
    axes = by_method(results, "ctr").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["b, L 5", "a, L 5", "c"]
    assert [float(found.lines[0].get_xdata()[0]) for found in axes.containers] == [0.6, 0.7, 0.8]  # type: ignore


def test_methods_look_different():
    found = looks(results_of(*(Row(f"m{i}", n) for i in range(30) for n in (5, 6))))
    assert len(found) == 30
    assert len({tuple(sorted(look.items())) for look in found.values()}) == 30


def test_an_svg_loads_nothing_and_is_the_same_each_time():
    def draw():
        figure = new_figure(2, 2)
        figure.subplots().plot([1, 2], [3, 4])
        return figure

    text = svg("a", draw)
    assert text.startswith("<svg")
    assert text == svg("a", draw)
    assert "<metadata" not in text
    assert re.findall(r'(?:href|src)="(?!#)', text) == []
    ids = {name: set(re.findall(r'clipPath id="(\w+)"', svg(name, draw))) for name in ("a", "b")}
    assert ids["a"]
    assert not ids["a"] & ids["b"]  # two figures of a page do not share what is clipped
