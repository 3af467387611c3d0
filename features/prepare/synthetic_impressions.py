"""Candidates shown to generated users, and the probabilities of clicks and conversions on them.

The model and its symbols are stated in :mod:`features.prepare.synthetic`; numbers in brackets are its equations.
Arrays are [U, R, C]: users of a chunk, requests of a user, candidates of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from features.prepare.synthetic_history import (
    BURST_SHARE,
    DEVICES,
    NO_TOPIC,
    Bools,
    Catalogue,
    Floats,
    Ids,
    Ints,
    Rng,
    Users,
    draw_items,
    draw_users,
    old_interests,
    taste_match,
)
from features.schema import SyntheticSource

FROM_INTEREST, FROM_BURST, FROM_POPULAR = 0.4, 0.1, 0.4  # the rest: any item
DEPTH, BREADTH = 2.4, 1.0
QUALITY, POSITION, BURST = 0.7, 0.4, 1.5
DEVICE = np.linspace(-0.3, 0.3, DEVICES, dtype=np.float32)
CV_AFFINITY, CV_PRICE = 0.4, 0.8

PILOT_ROWS = 200_000
QUANTILES = 16


@dataclass(frozen=True)
class Impressions:
    """Candidates of a chunk's requests and the parts of their logits, all [U, R, C]; β₁ and β₂ are not yet in."""

    item: Ids
    affinity: Floats
    click_rest: Floats
    conversion: Floats
    old: Bools
    unclear: Bools  # topic neither a recent interest nor the burst's


@dataclass(frozen=True)
class Calibration:
    """What the pilot sample sets: β₁, β₂, and of (4) π and quantiles of a."""

    click_bias: float
    conversion_bias: float
    old_share: float
    old_affinity: Floats  # [QUANTILES]


def affinity(catalogue: Catalogue, users: Users, user: Ints, interest: Ids, item: Ids) -> Floats:
    """Equation (1) for items of the user's interest; arguments and result [N]."""
    share = users.weight.shape[1] * users.weight[user, interest]
    return DEPTH * np.sqrt(share) + BREADTH * taste_match(catalogue, users, user, interest, item)


def draw_impressions(
    rng: Rng, source: SyntheticSource, catalogue: Catalogue, users: Users, request_burst: Ids
) -> Impressions:
    """Candidates of the requests whose burst topics are given, [U, R]."""
    shape = (*request_burst.shape, source.candidates_per_request)
    user = np.broadcast_to(np.arange(shape[0])[:, None, None], shape)
    burst = np.broadcast_to(request_burst[:, :, None], shape)
    origin = rng.random(shape, np.float32)
    topic = rng.integers(0, source.topics, shape, np.int32)
    interest = rng.integers(0, source.interests_per_user, shape)
    topic = np.where(origin < FROM_INTEREST, users.topics[user, interest], topic)
    from_burst = (origin >= FROM_INTEREST) & (origin < FROM_INTEREST + FROM_BURST) & (burst != NO_TOPIC)
    topic = np.where(from_burst, burst, topic)
    item = draw_items(rng, catalogue, topic)
    of_topic = origin < FROM_INTEREST + FROM_BURST + FROM_POPULAR
    item = np.where(of_topic, item, rng.integers(0, source.items, shape, np.int32))
    item = replace_repeats(rng, item, source.items)

    topic = catalogue.topic[item]
    column = np.full(shape, source.interests_per_user, np.int32)
    for m in range(source.interests_per_user):
        column[topic == users.topics[user, m]] = m
    of_interest = column < source.interests_per_user
    old = column < old_interests(source)
    in_burst = topic == burst
    a = np.zeros(shape, np.float32)
    a[of_interest] = affinity(catalogue, users, user[of_interest], column[of_interest], item[of_interest])
    j = np.arange(shape[2], dtype=np.float32)
    g_h = (DEVICE[users.device] + users.habit)[:, None, None]
    rest = g_h + QUALITY * catalogue.quality[item] - POSITION * np.log1p(j) + BURST * in_burst  # of (2)
    conversion = CV_AFFINITY * a - CV_PRICE * (catalogue.price[item] - users.budget[:, None, None])  # (3)
    return Impressions(
        item=item,
        affinity=a,
        click_rest=rest.astype(np.float32),
        conversion=conversion.astype(np.float32),
        old=old,
        unclear=(old | ~of_interest) & ~in_burst,
    )


def replace_repeats(rng: Rng, item: Ids, items: int) -> Ids:
    """Give repeats inside a request, last axis, another item drawn uniformly, until there are none."""
    rows = item.reshape(-1, item.shape[-1])
    left = np.arange(len(rows))
    while len(left):
        order = np.argsort(rows[left], axis=1, kind="stable")
        ordered = np.take_along_axis(rows[left], order, 1)
        row, repeat = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
        rows[left[row], order[row, repeat + 1]] = rng.integers(0, items, len(row), np.int32)
        left = left[np.unique(row)]
    return rows.reshape(item.shape)


def calibrate(rng: Rng, source: SyntheticSource, catalogue: Catalogue) -> Calibration:
    """Draw a pilot sample, whose requests burst as often as the real ones, and set the constants by it."""
    widest = max(source.topics, source.interests_per_user * source.content_dim) // 4
    count = max(1, PILOT_ROWS // max(source.requests_per_user * source.candidates_per_request, widest))
    users = draw_users(rng, source, count)
    shape = (count, source.requests_per_user)
    burst = np.take_along_axis(users.topics, rng.integers(old_interests(source), source.topics, shape), 1)
    burst = np.where(rng.random(shape) < BURST_SHARE, burst, NO_TOPIC)
    pilot = draw_impressions(rng, source, catalogue, users, burst)
    click = (pilot.click_rest + pilot.affinity).astype(np.float64)
    click_bias = _bias(click, np.ones_like(click), source.click_rate)
    conversion_bias = _bias(pilot.conversion.astype(np.float64), sigmoid(click + click_bias), source.conversion_rate)
    old, levels = pilot.affinity[pilot.old & pilot.unclear], (np.arange(QUANTILES) + 0.5) / QUANTILES
    return Calibration(
        click_bias=click_bias,
        conversion_bias=conversion_bias,
        old_share=float(pilot.old[pilot.unclear].mean()) if pilot.unclear.any() else 0.0,
        old_affinity=np.quantile(old, levels).astype(np.float32) if old.size else np.zeros(QUANTILES, np.float32),
    )


def click_probability(impressions: Impressions, calibration: Calibration) -> tuple[Floats, Floats]:
    """Equations (2) and (4), each [U, R, C]."""
    ell = impressions.click_rest + np.float32(calibration.click_bias)
    full = sigmoid(ell + impressions.affinity)  # (2)
    unclear, pi = impressions.unclear, np.float32(calibration.old_share)
    recent = full.copy()
    expected = sum(sigmoid(ell[unclear] + a) for a in calibration.old_affinity) / np.float32(QUANTILES)
    recent[unclear] = pi * expected + (1 - pi) * sigmoid(ell[unclear])  # (4)
    return full, recent


def conversion_probability(impressions: Impressions, calibration: Calibration) -> Floats:
    """Equation (3), [U, R, C]."""
    return sigmoid(impressions.conversion + np.float32(calibration.conversion_bias))


def sigmoid(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """σ."""
    return 1 / (1 + np.exp(-x))


def _bias(logit: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], rate: float) -> float:
    """β with weighted mean of σ(logit + β) = rate, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(40):
        middle = (low + high) / 2
        if np.average(sigmoid(logit + middle), weights=weight) < rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2
