"""Generated items, users and the histories of these users.

The model and its symbols are stated in :mod:`features.prepare.synthetic`; numbers in brackets are its equations.
Everything here works on one chunk of users at a time, in whole arrays: U users, N events, R requests a user, I items,
K topics, M interests a user of which the first O are old, content of d floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.schema import SyntheticSource

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Rng = np.random.Generator

# Items and users
FAME = 0.5
SHIFT = 5.0
LENGTH_SIGMA = 0.8
DEVICES = 3
HABIT = 0.3
# Events
SESSION_LENGTH = 8
MAX_SESSION = 50
BURST_SHARE = 0.2
BURST_FIDELITY = 0.8
NOISE_SHARE = 0.2
EVENT_GAP_MS = (5_000, 40_000)
SESSION_GAP_MS = 8 * 3_600_000
LONGEST_SPAN_MS = 10 * 365 * 86_400_000
# Requests
START_MS = 1_704_067_200_000  # 2024-01-01 UTC
DAY_MS = 86_400_000
LATEST_SESSION_MS = 20 * 3_600_000
REQUEST_DELAY_MS = 60_000
NO_TOPIC = -1


@dataclass(frozen=True)
class Catalogue:
    """Items, sorted by (topic, popularity rank); `id` is what the logs call them."""

    id: Ids  # [I]
    topic: Ids  # [I]
    first: Ids  # [K], first item of a topic
    size: Ids  # [K]
    centre: Floats  # [K, d]
    delta: Floats  # [I, d]
    quality: Floats  # [I]
    price: Floats  # [I], v_i


@dataclass(frozen=True)
class Users:
    """A chunk of users."""

    topics: Ids  # [U, K], every topic once: columns [0, O) old interests, [O, M) recent ones, [M, K) the others
    weight: Floats  # [U, M]
    taste: Floats  # [U, M, d]
    device: Ids  # [U]
    habit: Floats  # [U]
    budget: Floats  # [U]
    events: Ints  # [U]


@dataclass(frozen=True)
class Layout:
    """Where the events of a chunk lie. A user's last ones are the sessions right before her requests."""

    user: Ints  # [N]
    session: Ints  # [N], runs over the chunk
    starts: Bools  # [N], first event of a session
    newest: Bools  # [N], too new for an old interest
    in_window: Bools  # [N], of a session before a request
    window_begin: Ints  # [U], flat index of the user's first event there
    request_first: Ints  # [U, R], flat index of the first event of a request's session
    request_events: Ints  # [U, R], length of that session


@dataclass(frozen=True)
class Events:
    """Histories of a chunk, by (user, time), and what its requests need to know of them."""

    user: Ints  # [N], row in the chunk
    item: Ids  # [N], row in the catalogue
    time: Ints  # [N], ms
    action: Ids  # [N]
    request_time: Ints  # [U, R], ms
    request_burst: Ids  # [U, R], topic or NO_TOPIC


def old_interests(source: SyntheticSource) -> int:
    """O."""
    return round(source.old_interest_share * source.interests_per_user)


def draw_catalogue(rng: Rng, source: SyntheticSource) -> Catalogue:
    """Items in random topics, none of which is empty."""
    d, topics, items = source.content_dim, source.topics, source.items
    topic = np.sort(np.concatenate([np.arange(topics), rng.integers(0, topics, items - topics)])).astype(np.int32)
    size = np.bincount(topic, minlength=topics).astype(np.int32)
    first = (np.cumsum(size) - size).astype(np.int32)
    fame = np.sqrt(12) * (0.5 - (np.arange(items) - first[topic]) / size[topic])
    quality = FAME * fame + np.sqrt(1 - FAME**2) * rng.standard_normal(items)
    return Catalogue(
        id=rng.permutation(items).astype(np.int32),
        topic=topic,
        first=first,
        size=size,
        centre=rng.standard_normal((topics, d), np.float32),
        delta=rng.standard_normal((items, d), np.float32),
        quality=quality.astype(np.float32),
        price=rng.standard_normal(items, np.float32),
    )


def draw_users(rng: Rng, source: SyntheticSource, count: int) -> Users:
    """`count` users; n_u has the mean asked for before it is cut."""
    m = source.interests_per_user
    weight = rng.standard_gamma(2.0, (count, m), np.float32)
    lengths = rng.lognormal(-(LENGTH_SIGMA**2) / 2, LENGTH_SIGMA, count) * source.events_per_user
    return Users(
        topics=np.argsort(rng.random((count, source.topics), np.float32), axis=1).astype(np.int32),
        weight=weight / weight.sum(1, keepdims=True),
        taste=rng.standard_normal((count, m, source.content_dim), np.float32),
        device=rng.integers(0, DEVICES, count, np.int32),
        habit=HABIT * rng.standard_normal(count, np.float32),
        budget=rng.standard_normal(count, np.float32),
        events=np.minimum(np.rint(lengths), source.max_events_per_user).astype(np.int64),
    )


def draw_items(rng: Rng, catalogue: Catalogue, topic: Ids) -> Ids:
    """One item of each topic given, by popularity: the rank's distribution function, inverted."""
    size = catalogue.size[topic]
    u = rng.random(topic.shape, np.float32)
    rank = (SHIFT * np.expm1(u * np.log1p(size / np.float32(SHIFT)))).astype(np.int32)
    return catalogue.first[topic] + np.minimum(rank, size - 1)


def taste_match(catalogue: Catalogue, users: Users, user: Ints, interest: Ids, item: Ids) -> Floats:
    """⟨δ_i, p_um⟩/√d; arguments and result [N]."""
    product = np.einsum("nd,nd->n", catalogue.delta[item], users.taste[user, interest])
    return product / np.float32(np.sqrt(catalogue.delta.shape[1]))


def draw_events(rng: Rng, source: SyntheticSource, catalogue: Catalogue, users: Users) -> Events:
    """Histories, up to each user's last request."""
    layout = draw_layout(rng, source, users)
    column, session_column = draw_columns(rng, source, users, layout)
    item, action = draw_event_items(rng, catalogue, users, layout.user, column)
    time, request_time = draw_times(rng, source, layout)
    request_column = np.full(layout.request_events.shape, NO_TOPIC, np.int32)
    busy = layout.request_events > 0
    request_column[busy] = session_column[layout.session[layout.request_first[busy]]]
    topic = np.take_along_axis(users.topics, np.maximum(request_column, 0), 1)
    return Events(
        user=layout.user,
        item=item,
        time=time,
        action=action,
        request_time=request_time,
        request_burst=np.where(request_column == NO_TOPIC, NO_TOPIC, topic).astype(np.int32),
    )


def draw_layout(rng: Rng, source: SyntheticSource, users: Users) -> Layout:
    """Cut every user's n_u events into sessions; at most a quarter of them lie in the sessions before her requests."""
    n, requests = users.events, source.requests_per_user
    total, offset = int(n.sum()), np.cumsum(n) - n
    request_events = np.minimum(rng.poisson(SESSION_LENGTH, (len(n), requests)), MAX_SESSION)
    request_events = np.minimum(request_events, n[:, None] // (4 * requests))
    window_begin = offset + n - request_events.sum(1)
    request_first = window_begin[:, None] + np.cumsum(request_events, 1) - request_events
    user = np.repeat(np.arange(len(n)), n)
    index = np.arange(total)
    in_window = index >= window_begin[user]
    starts = (rng.random(total, np.float32) < 1 / SESSION_LENGTH) & ~in_window
    starts[offset[n > 0]] = True
    starts[request_first[request_events > 0]] = True
    return Layout(
        user=user,
        session=np.cumsum(starts) - 1,
        starts=starts,
        newest=index >= (window_begin + request_events[:, 0] - source.old_interest_age)[user],
        in_window=in_window,
        window_begin=window_begin,
        request_first=request_first,
        request_events=request_events,
    )


def draw_columns(rng: Rng, source: SyntheticSource, users: Users, layout: Layout) -> tuple[Ids, Ids]:
    """Topics as columns of `users.topics`: of every event [N], and of every session's burst (NO_TOPIC if none)."""
    total, m, old, topics = len(layout.user), source.interests_per_user, old_interests(source), source.topics
    sessions = int(layout.starts.sum())
    burst = rng.integers(old, topics, sessions, np.int32)
    burst[rng.random(sessions, np.float32) >= BURST_SHARE] = NO_TOPIC

    # Interest m if w_1 + … + w_{m−1} ≤ v < w_1 + … + w_m; v starts behind the old ones where those may not occur.
    cumulative = np.cumsum(users.weight, 1)
    behind_old = cumulative[layout.user, old - 1] if old else np.float32(0)
    lowest = np.where(layout.newest, behind_old, np.float32(0))
    v = lowest + (1 - lowest) * rng.random(total, np.float32)
    interest = np.zeros(total, np.int32)
    for later in range(m - 1):
        interest += v >= cumulative[layout.user, later]

    noise = rng.random(total, np.float32) < NOISE_SHARE
    if old == m:
        noise |= layout.newest
    column = np.where(noise, rng.integers(old, topics, total, np.int32), interest)
    burst_now = burst[layout.session]
    of_burst = (burst_now != NO_TOPIC) & (rng.random(total, np.float32) < BURST_FIDELITY)
    return np.where(of_burst, burst_now, column), burst


def draw_event_items(rng: Rng, catalogue: Catalogue, users: Users, user: Ints, column: Ids) -> tuple[Ids, Ids]:
    """Items of the topics given and the actions on them, each [N]."""
    topic = users.topics[user, column]
    item = draw_items(rng, catalogue, topic)
    of_interest = np.flatnonzero(column < users.weight.shape[1])
    who, interest = user[of_interest], column[of_interest]
    other = draw_items(rng, catalogue, topic[of_interest])
    match = taste_match(catalogue, users, who, interest, item[of_interest])
    other_match = taste_match(catalogue, users, who, interest, other)
    item[of_interest] = np.where(other_match > match, other, item[of_interest])
    mood = 2 + 0.8 * rng.standard_normal(len(user), np.float32)
    mood[of_interest] += 1 + 0.5 * np.maximum(match, other_match)
    return item, np.clip(np.rint(mood), 1, 5).astype(np.int32)


def draw_times(rng: Rng, source: SyntheticSource, layout: Layout) -> tuple[Ints, Ints]:
    """Times of events [N] and of requests [U, R], ms: back from START before the window, inside it by request's day."""
    users, requests = layout.request_events.shape
    total = len(layout.user)
    gap = rng.integers(*EVENT_GAP_MS, total)
    session_gap = min(SESSION_GAP_MS, LONGEST_SPAN_MS * SESSION_LENGTH / source.max_events_per_user)
    gap[layout.starts] += (session_gap * rng.standard_exponential(int(layout.starts.sum()))).astype(np.int64)
    elapsed = np.concatenate([[0], np.cumsum(gap)])  # event i happens at elapsed[i + 1]
    time = START_MS - REQUEST_DELAY_MS - (elapsed[layout.window_begin][layout.user] - elapsed[1:])

    begin = START_MS + DAY_MS * np.arange(requests) + rng.integers(0, LATEST_SESSION_MS, (users, requests))
    first = elapsed[np.minimum(layout.request_first + 1, total)]
    in_session = elapsed[1:][layout.in_window] - np.repeat(first.ravel(), layout.request_events.ravel())
    time[layout.in_window] = np.repeat(begin.ravel(), layout.request_events.ravel()) + in_session
    duration = np.maximum(elapsed[layout.request_first + layout.request_events] - first, 0)
    return time, begin + duration + REQUEST_DELAY_MS
