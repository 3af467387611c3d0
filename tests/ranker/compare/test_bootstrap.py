"""The paired bootstrap gives what resampling users row by row gives, and is the same for both rankers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from ranker.compare.bootstrap import COMPARED, Difference, difference, difference_of, measure_draws, user_draws
from ranker.evaluation.metrics import Predictions, task_metrics


def impressions(seed: int, users: int = 12, ties: bool = True) -> Predictions:
    """Random ones, of users with none to many; scores are few, so that there are ties, or all distinct."""
    rng = np.random.default_rng(seed)
    user = rng.choice(np.arange(5, 5 + 3 * users, 3), 60)
    click, conversion = (rng.random(60) < 0.5).astype(np.float32), (rng.random(60) < 0.5).astype(np.float32)
    p = rng.integers(1, 8, 60) / 10 if ties else rng.permutation(60) / 100 + 0.01
    return Predictions(
        user=user, item=user, history_length=user, request=user, click=click, conversion=conversion,
        p_ctr=p, p_ctcvr=p * 0.5, p_cvr=p[::-1].copy(),
    )  # fmt: skip


def resampled(predictions: Predictions, weight: np.ndarray) -> Predictions:
    """The literal resample: each draw of a user is a user of its own, with copies of her rows."""
    users = np.unique(predictions.user)
    rows: list[int] = []
    who: list[int] = []
    for u, times in zip(users, weight.astype(int), strict=True):
        for copy in range(times):
            mine = np.flatnonzero(predictions.user == u).tolist()
            rows += mine
            who += [1000 * int(u) + copy] * len(mine)
    chosen = predictions.select(np.array(rows))
    return Predictions(**chosen.columns() | {"user": np.array(who)})


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.booleans())
def test_a_draw_measures_as_a_literal_resample(seed: int, ties: bool):
    predictions = impressions(seed, ties=ties)
    users = len(np.unique(predictions.user))
    found = measure_draws(predictions, 3, seed)
    for number, weight in enumerate(user_draws(users, 3, seed)):
        assert weight.sum() == users
        expected = task_metrics(resampled(predictions, weight))
        for (task, name), values in found.items():
            value = getattr(expected[task], name)
            assert values[number] == pytest.approx(np.nan if value is None else value, nan_ok=True, abs=1e-12)


def test_against_another_implementation():
    predictions = impressions(1)
    weight = next(iter(user_draws(len(np.unique(predictions.user)), 1, 7)))
    copied = resampled(predictions, weight)
    found = measure_draws(predictions, 1, 7)
    assert found["ctr", "auc"][0] == pytest.approx(roc_auc_score(copied.click, copied.p_ctr), abs=1e-12)
    assert found["ctr", "logloss"][0] == pytest.approx(log_loss(copied.click, copied.p_ctr), abs=1e-12)


def test_draws_follow_from_the_seed_and_do_not_depend_on_their_number():
    few, many = list(user_draws(50, 3, 4)), list(user_draws(50, 9, 4))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert not np.array_equal(few[0], few[1])
    assert not np.array_equal(few[0], next(iter(user_draws(50, 1, 5))))


def test_a_ranker_does_not_differ_from_itself():
    draws = measure_draws(impressions(3), 30, 0)["ctr", "auc"]
    found = difference([draws], [draws], 0.0)
    assert found == Difference(0.0, 0.0, 0.0, 30)
    assert not found.excludes_zero


def test_the_same_users_are_drawn_for_both():
    """A ranker whose log loss is worse by a constant for every impression is worse by it in every draw."""
    better = impressions(5, ties=False)
    factor = 0.8
    p = np.where(better.click > 0, better.p_ctr * factor, 1 - (1 - better.p_ctr) * factor)
    worse = Predictions(**better.columns() | {"p_ctr": p})
    theirs, ours = (measure_draws(x, 40, 2)["ctr", "logloss"] for x in (better, worse))
    found = difference([ours], [theirs], -np.log(factor))
    assert found is not None
    assert (found.low, found.high) == pytest.approx([-np.log(factor)] * 2)
    assert found.excludes_zero
    assert np.ptp(ours) > 0.01  # while the metric itself varies


def test_seeds_are_averaged_within_a_draw():
    a, b, base = (measure_draws(impressions(seed), 200, 1)["ctr", "auc"] for seed in (1, 2, 3))
    found = difference([a, b], [base], 0.1)
    each = (a + b) / 2 - base
    assert found is not None
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])))


def test_only_seeds_of_both_are_compared():
    draws = {seed: measure_draws(impressions(seed), 20, 1) for seed in (1, 2, 3)}
    values = {1: 0.6, 2: 0.8, 3: 0.7}
    ours, theirs = {1: draws[1], 2: draws[2]}, {2: draws[3], 3: draws[1]}
    found = difference_of(ours, theirs, ({1: 0.6, 2: 0.8}, {2: 0.7, 3: 0.1}), ("ctr", "auc"))
    assert found is not None
    assert found.value == pytest.approx(0.8 - 0.7)
    assert (found.seeds, found.beyond_seeds, found.real) == (1, None, False)
    assert difference_of({1: draws[1]}, {3: draws[3]}, (values, values), ("ctr", "auc")) is None
    assert difference_of(ours, theirs, ({2: None}, {2: 0.7}), ("ctr", "auc")) is None


@pytest.mark.parametrize(
    ("ours", "beyond"), [([0.70, 0.71, 0.72], False), ([0.75, 0.76, 0.77], True), ([0.60, 0.61, 0.62], True)]
)
def test_a_difference_is_real_where_neither_users_nor_seeds_undo_it(ours: list[float], beyond: bool):
    """Users always say so here: every draw of ours is .3 above."""
    theirs, draws = [0.69, 0.70, 0.71], {("ctr", "auc"): np.linspace(0.6, 0.7, 20)}
    better = {("ctr", "auc"): draws["ctr", "auc"] + 0.3}
    values = (dict(enumerate(ours)), dict(enumerate(theirs)))
    found = difference_of({s: better for s in range(3)}, {s: draws for s in range(3)}, values, ("ctr", "auc"))
    assert found is not None
    assert (found.seeds, found.excludes_zero, found.beyond_seeds, found.real) == (3, True, beyond, beyond)
    one = difference_of({0: draws}, {0: draws}, ({0: 0.7}, {0: 0.7}), ("ctr", "auc"))
    assert one is not None
    assert not one.excludes_zero


def test_seeds_without_deviation_differ_if_they_do():
    draws = {s: {("ctr", "auc"): np.linspace(0.6, 0.7, 20)} for s in (0, 1)}
    for ours, beyond in ((0.7, False), (0.8, True)):
        found = difference_of(draws, draws, ({0: ours, 1: ours}, {0: 0.7, 1: 0.7}), ("ctr", "auc"))
        assert found is not None
        assert found.beyond_seeds is beyond


def test_what_is_defined_in_no_draw_has_no_difference():
    """One class only: no AUC."""
    predictions = impressions(0)
    clicked = Predictions(**predictions.columns() | {"click": np.ones(60, np.float32)})
    draws = measure_draws(clicked, 5, 0)
    assert np.isnan(draws["ctr", "auc"]).all()
    assert difference([draws["ctr", "auc"]], [draws["ctr", "auc"]], 0.0) is None
    assert np.isfinite(draws["ctr", "logloss"]).all()


def test_a_task_without_a_label_is_left_out():
    plain = {k: v for k, v in impressions(0).columns().items() if k not in ("conversion", "p_ctcvr", "p_cvr")}
    assert measure_draws(Predictions(**plain), 2, 0).keys() == {("ctr", name) for name in COMPARED}
