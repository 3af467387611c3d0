"""Generated logs of any size whose click and conversion probabilities are known.

What goes in: a :class:`~features.schema.SyntheticSource`. What comes out: events, impressions, items and users as
Parquet, in the shape of any other logs, plus what no real log has: the probability every label was drawn with. With
it each metric can be shown beside the best attainable one, and beside the best attainable one without the distant
past, so that what a long history is worth is a known number.

The model. K topics, I items, U users; σ is the logistic function; all draws are independent unless said otherwise.

Item i has a topic z_i, a content vector, a quality and a price::

    x_i = c_{z_i} + SPREAD·δ_i                c_k, δ_i ~ N(0, 1_d)
    P(rank r in its topic of n items) = log((r + 1 + s) / (r + s)) / log(1 + n / s)      (Zipf-Mandelbrot, s = SHIFT)
    q_i = ρ·√12·(1/2 − r/n) + √(1 − ρ²)·ε_i   ρ = FAME: the popular are better
    price_i = exp(3 + v_i/2)                  ε_i, v_i ~ N(0, 1)

User u has M interests: distinct topics k_um with weights w_u ~ Dirichlet(2, …, 2) and tastes p_um ~ N(0, 1_d). The
first O = round(old_interest_share · M) are *old*. Her affinity to item i is nought outside them, and inside::

    a_ui = DEPTH·√(M·w_um) + BREADTH·⟨δ_i, p_um⟩/√d           for z_i = k_um                                      (1)

Her history has n_u events, n_u log-normal with mean `events_per_user`, cut at `max_events_per_user`. Sessions have
geometric length. A share BURST_SHARE of them are bursts: one topic of that moment takes most of the session. All other
events are noise (any topic) or come from interest m with probability w_um — of *all* interests while at least
`old_interest_age` events lie between them and the first request, of the recent ones alone from there on. Bursts and
noise avoid her old topics. So old interests leave no trace among the newest events of any request, and in no event at
all of a user whose history is shorter than that. Inside its topic an item is drawn by popularity; where the topic is an
interest twice, and the one nearer to her taste is taken. `action`, 1 … 5, grows with the affinity.

Request k of every user lies in the k-th day after the common START, just after a short session whose burst topic, if
any, is b. Its candidates come from her interests (old and recent alike), b, popular items and any items. With position
j = 0, 1, …, device effect g_u and habit h_u ~ N(0, HABIT²)::

    P(click) = σ(β₁ + g_u + h_u + a_ui + QUALITY·q_i − POSITION·log(1 + j) + BURST·[z_i = b])                       (2)
    P(conversion | click) = σ(β₂ + CV_AFFINITY·a_ui − CV_PRICE·(v_i − y_u))           y_u ~ N(0, 1), her budget     (3)

β₁, β₂ are set on a pilot sample so that the mean rates are `click_rate` and `conversion_rate`. Clicks are not fed back
as events: one on an old interest would bring it back among the newest. Requests split by time, and for all users at the
same instants: the last ~15 % test, the ~10 % before validate.

Kept for evaluation, never to be a feature: `oracle_click` (2), `oracle_conversion` (3), `oracle_click_recent` — the
click probability for one who knows everything but the old interests::

    π·E[σ(ℓ + a)] + (1 − π)·σ(ℓ)     for a topic that is neither recent nor b                                        (4)

ℓ being the logit without affinity, π the share of old interests among such candidates, E over their affinities (by
quantiles of the pilot sample) — items' `cluster`, and `truth/`, the users' interests.

The draws themselves are in :mod:`features.prepare.synthetic_history` and
:mod:`features.prepare.synthetic_impressions`.

Users are generated in chunks of bounded size, each from its own child seed, so that memory does not grow with the logs
and the same configuration gives the same bytes.
"""

# pyarrow ships no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownParameterType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from features.prepare.synthetic_history import (
    Catalogue,
    Events,
    Rng,
    Users,
    draw_catalogue,
    draw_events,
    draw_users,
    old_interests,
)
from features.prepare.synthetic_impressions import (
    Calibration,
    Impressions,
    calibrate,
    click_probability,
    conversion_probability,
    draw_impressions,
)
from features.schema import LogsSource, SyntheticSource, TableSource

SPREAD = 0.5
TEST_SHARE, VALID_SHARE = 0.15, 0.10
CHUNK_ROWS = 500_000
ROW_GROUP = 131_072
FOLDERS = ("events", "impressions", "truth")


def generate(source: SyntheticSource, out: Path, chunk_rows: int = CHUNK_ROWS) -> LogsSource:
    """Write the logs of `source` below `out` and say how to read them.

    Writes events/, impressions/, truth/ (one part a chunk), items.parquet and users.parquet. `chunk_rows` bounds memory
    — a chunk holds about so many events and impressions, but at least one user — and is part of the random stream.

    Raises:
        FileExistsError: `out` holds generated logs already; parts of two runs must not mix.
    """
    for folder in FOLDERS:
        if (out / folder).exists():
            raise FileExistsError(f"{out / folder}: exists already; generate into an empty folder")
    for folder in FOLDERS:
        (out / folder).mkdir(parents=True)
    chunks = list(user_ranges(source, chunk_rows))
    seeds = np.random.SeedSequence(source.seed).spawn(3 + len(chunks))
    catalogue_seed, attributes_seed, pilot_seed, *chunk_seeds = seeds
    catalogue = draw_catalogue(np.random.default_rng(catalogue_seed), source)
    calibration = calibrate(np.random.default_rng(pilot_seed), source, catalogue)
    _write_items(np.random.default_rng(attributes_seed), catalogue, out / "items.parquet")
    with pq.ParquetWriter(out / "users.parquet", _USER_SCHEMA, compression="zstd") as users_file:
        for part, ((first, last), seed) in enumerate(zip(chunks, chunk_seeds, strict=True)):
            rng, name = np.random.default_rng(seed), f"part-{part:05d}.parquet"
            users = draw_users(rng, source, last - first)
            events = draw_events(rng, source, catalogue, users)
            impressions = draw_impressions(rng, source, catalogue, users, events.request_burst)
            labels = draw_labels(rng, impressions, calibration)
            _write_events(events, catalogue, first, out / "events" / name)
            _write_impressions(impressions, labels, events, catalogue, first, out / "impressions" / name)
            _write_truth(source, users, first, out / "truth" / name)
            users_file.write_table(_users_table(rng, users, first), row_group_size=ROW_GROUP)
    return logs_source(out)


def logs_source(out: Path) -> LogsSource:
    """How logs written by :func:`generate` are read."""

    def table(name: str, *columns: str) -> TableSource:
        return TableSource(path=out / name, columns={column: column for column in columns}, time_unit="ms")

    return LogsSource(
        events=table("events", "user", "item", "time"),
        impressions=table("impressions", "user", "item", "time", "request", "split"),
        items=table("items.parquet", "item"),
        users=table("users.parquet", "user"),
    )


def user_ranges(source: SyntheticSource, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Chunks [first, last) of users, sized so that none of their arrays is expected to exceed `chunk_rows` rows."""
    widest = max(
        source.events_per_user,
        source.requests_per_user * source.candidates_per_request,
        source.interests_per_user * source.content_dim,
        source.topics,
    )
    users = max(1, chunk_rows // widest)
    for first in range(0, source.users, users):
        yield first, min(first + users, source.users)


def split_of_request(requests: int) -> npt.NDArray[np.str_]:
    """Split of a user's k-th request, [R]."""
    test, valid = max(1, round(TEST_SHARE * requests)), max(1, round(VALID_SHARE * requests))
    return np.repeat(["train", "valid", "test"], [requests - test - valid, valid, test])


def draw_labels(rng: Rng, impressions: Impressions, calibration: Calibration) -> dict[str, npt.NDArray[Any]]:
    """Label columns and the probabilities they are drawn with, each [U, R, C]."""
    shape = impressions.item.shape
    click_p, click_recent_p = click_probability(impressions, calibration)
    conversion_p = conversion_probability(impressions, calibration)
    click = rng.random(shape, np.float32) < click_p
    conversion = click & (rng.random(shape, np.float32) < conversion_p)
    return {
        "click": click.astype(np.int8),
        "conversion": conversion.astype(np.int8),
        "oracle_click": click_p,
        "oracle_conversion": conversion_p,
        "oracle_click_recent": click_recent_p,
    }


_USER_SCHEMA = pa.schema([("user", pa.int64()), ("device", pa.int32()), ("budget_level", pa.int32())])


def _write(columns: Mapping[str, Any], path: Path) -> None:
    # The general encodings cost a third of the whole time; these are small and quick for what the columns hold.
    delta = {"request", "item", "time"} & set(columns)
    repeated = {"user", "position", "split", "click", "conversion", "action", "cluster", "category"} & set(columns)
    encodings: dict[str, Any] = {
        "use_dictionary": sorted(repeated),
        "column_encoding": dict.fromkeys(sorted(delta), "DELTA_BINARY_PACKED"),
    }
    table = pa.table(dict(columns))
    pq.write_table(table, path, row_group_size=ROW_GROUP, compression="zstd", compression_level=1, **encodings)


def _write_items(rng: Rng, catalogue: Catalogue, path: Path) -> None:
    """Items by id. `category` is four clusters in one, and wrong for a tenth of the items."""
    order = np.argsort(catalogue.id)
    cluster = catalogue.topic[order]
    coarse = (len(catalogue.size) + 3) // 4
    wrong = rng.random(len(order)) < 0.1
    content = catalogue.centre[cluster] + np.float32(SPREAD) * catalogue.delta[order]
    ends = np.arange(len(order) + 1, dtype=np.int32) * content.shape[1]
    columns = {
        "item": catalogue.id[order],
        "cluster": cluster,
        "category": np.where(wrong, rng.integers(0, coarse, len(order)), cluster // 4).astype(np.int32),
        "content": pa.ListArray.from_arrays(pa.array(ends), pa.array(content.ravel())),
        "price": np.exp(3 + catalogue.price[order] / 2),
    }
    _write(columns, path)


def _users_table(rng: Rng, users: Users, first: int) -> pa.Table:
    """Users' attributes; `budget_level` is a noisy fifth of the budget."""
    noisy = users.budget + 0.5 * rng.standard_normal(len(users.budget), np.float32)
    level = np.digitize(noisy, [-0.94, -0.28, 0.28, 0.94]).astype(np.int32)
    ids = np.arange(first, first + len(level))
    return pa.table({"user": ids, "device": users.device, "budget_level": level}, schema=_USER_SCHEMA)


def _write_events(events: Events, catalogue: Catalogue, first: int, path: Path) -> None:
    user, item = first + events.user, catalogue.id[events.item]
    _write({"user": user, "item": item, "time": events.time, "action": events.action}, path)


def _write_impressions(
    impressions: Impressions,
    labels: dict[str, npt.NDArray[Any]],
    events: Events,
    catalogue: Catalogue,
    first: int,
    path: Path,
) -> None:
    shape = users, requests, candidates = impressions.item.shape
    user = np.arange(first, first + users)[:, None, None]
    columns = {
        "request": user * requests + np.arange(requests)[:, None],
        "user": user,
        "item": catalogue.id[impressions.item],
        "time": events.request_time[:, :, None],
        "position": np.arange(candidates, dtype=np.int32),
        "split": split_of_request(requests)[:, None],
        **labels,
    }
    _write({name: np.broadcast_to(values, shape).ravel() for name, values in columns.items()}, path)


def _write_truth(source: SyntheticSource, users: Users, first: int, path: Path) -> None:
    """Users' interests, one row each."""
    shape = users.weight.shape
    columns = {
        "user": np.arange(first, first + shape[0])[:, None],
        "cluster": users.topics[:, : shape[1]],
        "weight": users.weight,
        "old": np.arange(shape[1]) < old_interests(source),
    }
    _write({name: np.broadcast_to(values, shape).ravel() for name, values in columns.items()}, path)
