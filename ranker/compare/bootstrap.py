"""Paired bootstrap over users: is one ranker better than another, or were these users kind to it?

Users are drawn with replacement, as many as there are, and both rankers are measured on the same draw. A user drawn
twice counts twice in every pair of impressions, so a metric of a draw is that metric with the draws of each user as
integer weights: no row is copied, and scores are sorted once. Time is O(impressions) a draw, memory O(impressions).

Where a ranker was trained for several seeds, a draw's metric is the mean over them. So the interval is that of other
users, not of other seeds: whether those tell the difference from zero too, Welch's t-test over the seeds says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from scipy import stats

from ranker.evaluation.metrics import CLIP, Array, Int64s, Predictions, Task, count_pairs

Floats = npt.NDArray[np.float64]
COMPARED = ("auc", "uauc", "logloss")
"""metrics that are compared"""
Measured = dict[tuple[Task, str], Floats]
"""of each task and metric, its value in each draw; NaN where it is undefined"""


def user_draws(users: int, draws: int, seed: int) -> Iterator[Floats]:
    """How often each of so many users is drawn, `[users]`; a draw follows from the seed and its own number alone."""
    for number in range(draws):
        drawn = np.random.default_rng([seed, number]).integers(0, users, users)
        yield np.bincount(drawn, minlength=users).astype(np.float64)


@dataclass(frozen=True)
class RankedScores:
    """One task's impressions, sorted once. P positives, M negatives, U users in all, V of them with both classes.

    positive: `[P]` user of each positive, by score; below, up_to: `[P]` negatives with a smaller score, and with one at
    most as large. negative: `[M]` user of each negative, by score. own_user, own_auc: `[V]`. loss, rows: `[U]` sums by
    user. Weights are float64, which holds counts exactly up to 2^53 and has fast products.
    """

    positive: Int64s
    below: Int64s
    up_to: Int64s
    negative: Int64s
    own_user: Int64s
    own_auc: Floats
    loss: Floats
    rows: Floats

    @staticmethod
    def of(user: Array, label: Array, score: Array, users: int) -> RankedScores:
        """From impressions in any order; `user` within 0 … `users` − 1."""
        positive = label.astype(bool)
        by_score = np.argsort(score, kind="stable")
        positives, negatives = by_score[positive[by_score]], by_score[~positive[by_score]]
        own_user, own_auc = np.zeros(0, np.int64), np.zeros(0)
        if len(user):
            by_user = count_pairs(user, positive, score)[1]
            both = by_user.positives * by_user.negatives > 0
            own_user, own_auc = np.unique(user)[both].astype(np.int64), by_user.auc(both)
        p = np.clip(score.astype(np.float64), CLIP, 1 - CLIP)
        return RankedScores(
            positive=user[positives].astype(np.int64),
            below=np.searchsorted(score[negatives], score[positives], "left").astype(np.int64),
            up_to=np.searchsorted(score[negatives], score[positives], "right").astype(np.int64),
            negative=user[negatives].astype(np.int64),
            own_user=own_user,
            own_auc=own_auc,
            loss=np.bincount(user, -np.log(np.where(positive, p, 1 - p)), users).astype(np.float64),
            rows=np.bincount(user, minlength=users).astype(np.float64),
        )

    @cached_property
    def ties(self) -> bool:
        """Whether a positive and a negative have the same score."""
        return not np.array_equal(self.below, self.up_to)

    def measure(self, weight: Floats) -> tuple[float, float, float]:
        """AUC, UAUC and log loss with each user's impressions counted `weight` `[U]` times."""
        lower = np.zeros(len(self.negative) + 1)  # weight of the first so many negatives
        np.cumsum(weight.take(self.negative), out=lower[1:])
        of_positive = weight.take(self.positive)
        won = of_positive @ lower.take(self.below)
        if self.ties:
            won = (won + of_positive @ lower.take(self.up_to)) / 2
        pairs, own, rows = of_positive.sum() * lower[-1], weight.take(self.own_user), weight @ self.rows
        return (
            float(won / pairs) if pairs else np.nan,
            float(own @ self.own_auc / own.sum()) if own.any() else np.nan,
            float(weight @ self.loss / rows) if rows else np.nan,
        )


def ranked(predictions: Predictions, users: Int64s) -> dict[Task, RankedScores]:
    """Each task of a run's impressions; `users` `[U]`, ascending, are those that are drawn from."""
    place = np.searchsorted(users, predictions.user)
    click, conversion, count = predictions.click, predictions.conversion, len(users)
    found: dict[Task, RankedScores] = {"ctr": RankedScores.of(place, click, predictions.p_ctr, count)}
    if conversion is not None and predictions.p_ctcvr is not None:
        found["ctcvr"] = RankedScores.of(place, click * conversion, predictions.p_ctcvr, count)
    if conversion is not None and predictions.p_cvr is not None:
        on = click.astype(bool)
        found["cvr"] = RankedScores.of(place[on], conversion[on], predictions.p_cvr[on], count)
    return found


def measure_draws(predictions: Predictions, draws: int, seed: int) -> Measured:
    """Every compared metric in every draw of the impressions' users: with one seed, the same users for every run on the
    same impressions."""
    users = np.unique(predictions.user).astype(np.int64)
    tasks = ranked(predictions, users)
    found = {task: np.empty([draws, len(COMPARED)]) for task in tasks}
    for number, weight in enumerate(user_draws(len(users), draws, seed)):
        for task, scores in tasks.items():
            found[task][number] = scores.measure(weight)
    return {(task, name): found[task][:, i] for task in tasks for i, name in enumerate(COMPARED)}


class Difference(NamedTuple):
    """By how much a metric differs from the baseline's: over all users, and the 95 % interval over so many draws, those
    in which it is defined. seeds: that both have; beyond_seeds: whether such a difference is rare (5 %) between as many
    seeds of equal rankers, None where one seed cannot tell."""

    value: float
    low: float
    high: float
    draws: int
    seeds: int = 1
    beyond_seeds: bool | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def real(self) -> bool:
        """Neither other users nor other seeds would undo it."""
        return self.excludes_zero and self.beyond_seeds is True


def difference(ours: Sequence[Floats], theirs: Sequence[Floats], value: float) -> Difference | None:
    """Of two rankers, from their runs' metric in each draw (an array a seed); `value` is the difference over all users.
    None where no draw has it."""
    each = np.mean(ours, axis=0) - np.mean(theirs, axis=0)
    each = each[~np.isnan(each)]
    if not each.size:
        return None
    low, high = np.quantile(each, [0.025, 0.975])
    return Difference(value, float(low), float(high), each.size)


def difference_of(
    ours: Mapping[int, Measured],
    theirs: Mapping[int, Measured],
    values: tuple[Mapping[int, float | None], Mapping[int, float | None]],
    key: tuple[Task, str],
) -> Difference | None:
    """Of the seeds that both have; `values` are both rankers' metric over all users, by seed."""
    seeds = [s for s in ours if s in theirs and key in ours[s] and key in theirs[s]]
    mine, base = ([by_seed[s] for s in seeds] for by_seed in values)
    known = [(a, b) for a, b in zip(mine, base, strict=True) if a is not None and b is not None]
    if not seeds or len(known) < len(seeds):
        return None
    all_mine, all_base = np.array(known).T
    value = float(all_mine.mean() - all_base.mean())
    found = difference([ours[s][key] for s in seeds], [theirs[s][key] for s in seeds], value)
    return found and found._replace(seeds=len(seeds), beyond_seeds=_beyond_seeds(all_mine, all_base))


def _beyond_seeds(ours: Floats, theirs: Floats) -> bool | None:
    """Welch's t-test at 5 %: seeds of two rankers deviate by different amounts, and are no pairs."""
    if len(ours) < 2:
        return None
    if np.ptp(ours) == np.ptp(theirs) == 0:
        return bool(ours[0] != theirs[0])
    _, p = cast("tuple[float, float]", stats.ttest_ind(ours, theirs, equal_var=False))
    return bool(p < 0.05)
