"""Generated logs keep what their model states."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError
from sklearn.metrics import log_loss, roc_auc_score

from features.prepare.synthetic import generate, split_of_request, user_ranges
from features.prepare.synthetic_history import LENGTH_SIGMA
from features.prepare.synthetic_impressions import POSITION
from features.schema import PrepareConfig, SyntheticSource

CONFIGS = Path(__file__).parents[3] / "configs" / "synthetic"
Columns = dict[str, npt.NDArray[np.generic]]


@dataclass
class Logs:
    source: SyntheticSource
    events: Columns
    impressions: Columns
    items: Columns
    users: Columns
    truth: Columns


def read(path: Path) -> Columns:
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


def draw(source: SyntheticSource, out: Path, chunk_rows: int = 200_000) -> Logs:
    reads = generate(source, out, chunk_rows)
    tables = [table.path for table in (reads.events, reads.impressions, reads.items, reads.users) if table]
    return Logs(source, *(read(path) for path in tables), read(out / "truth"))


def small(**changes: object) -> SyntheticSource:
    return SyntheticSource(**{"users": 40, "items": 300, "events_per_user": 100, "topics": 12, **changes})


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    """The default model."""
    return draw(SyntheticSource(), tmp_path_factory.mktemp("default") / "logs")


def old_topics(logs: Logs) -> npt.NDArray[np.bool_]:
    """[users, topics]: is the topic one of the user's old interests?"""
    old = np.zeros((logs.source.users, logs.source.topics), bool)
    of_old = logs.truth["old"].astype(bool)
    old[logs.truth["user"][of_old], logs.truth["cluster"][of_old]] = True
    return old


def item_popularity(logs: Logs) -> npt.NDArray[np.int64]:
    return np.bincount(logs.events["item"], minlength=logs.source.items)


# The files


def test_the_same_config_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("once", "again"):
        generate(small(), tmp_path / name, chunk_rows=1_000)
    once = sorted(path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*.parquet"))
    assert len(once) > 6
    for path in once:
        assert (tmp_path / "once" / path).read_bytes() == (tmp_path / "again" / path).read_bytes()


def test_another_seed_gives_other_logs(tmp_path: Path) -> None:
    first, second = (draw(small(seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    assert not np.array_equal(first.impressions["item"], second.impressions["item"])


def test_logs_of_two_runs_do_not_mix(tmp_path: Path) -> None:
    generate(small(), tmp_path)
    with pytest.raises(FileExistsError, match="empty folder"):
        generate(small(seed=1), tmp_path)


def test_ids_join(logs: Logs) -> None:
    assert np.array_equal(logs.items["item"], np.arange(logs.source.items))
    assert np.array_equal(logs.users["user"], np.arange(logs.source.users))
    for table in (logs.events, logs.impressions):
        assert np.isin(table["item"], logs.items["item"]).all()
        assert np.isin(table["user"], logs.users["user"]).all()
    assert {len(vector) for vector in logs.items["content"]} == {logs.source.content_dim}


def test_requests_have_distinct_candidates_in_positions(logs: Logs) -> None:
    c = logs.source.candidates_per_request
    items = np.sort(logs.impressions["item"].reshape(-1, c), axis=1)
    assert (items[:, 1:] != items[:, :-1]).all()
    assert (logs.impressions["position"].reshape(-1, c) == np.arange(c)).all()
    assert (np.unique(logs.impressions["request"], return_counts=True)[1] == c).all()


def test_requests_of_a_user_ascend_and_splits_part_at_an_instant(logs: Logs) -> None:
    time = logs.impressions["time"].reshape(logs.source.users, logs.source.requests_per_user, -1)[:, :, 0]
    assert (np.diff(time, axis=1) > 0).all()
    split, time = logs.impressions["split"], logs.impressions["time"]
    assert time[split == "train"].max() < time[split == "valid"].min()
    assert time[split == "valid"].max() < time[split == "test"].min()


@pytest.mark.parametrize("requests", [3, 4, 10, 12, 100])
def test_every_split_has_requests(requests: int) -> None:
    assert set(split_of_request(requests)) == {"train", "valid", "test"}


# Histories


def test_events_of_a_user_ascend_in_time(logs: Logs) -> None:
    user, time = logs.events["user"], logs.events["time"]
    same = user[1:] == user[:-1]
    assert (user[1:] >= user[:-1]).all()
    assert (time[1:] > time[:-1])[same].all()


def test_histories_go_on_between_requests(logs: Logs) -> None:
    first = logs.impressions["time"].reshape(logs.source.users, -1)[:, 0]
    late = logs.events["time"] > first[logs.events["user"]]
    assert 0.02 < late.mean() < 0.3


def test_old_interests_leave_no_event_among_the_newest(logs: Logs) -> None:
    old = old_topics(logs)
    assert (old.sum(1) == 3).all()
    user, time = logs.events["user"], logs.events["time"]
    of_old = old[user, logs.items["cluster"][logs.events["item"]]]
    first_request = logs.impressions["time"].reshape(logs.source.users, -1)[:, 0]
    before = np.bincount(user[time < first_request[user]], minlength=logs.source.users)
    begin = np.searchsorted(user, np.arange(logs.source.users))
    age = before[user] - (np.arange(len(user)) - begin[user])  # 1: the newest event before the first request
    assert not of_old[age <= logs.source.old_interest_age].any()
    assert of_old[age > logs.source.old_interest_age].mean() > 0.2


def test_history_lengths_are_lognormal_about_the_mean_asked_for(logs: Logs) -> None:
    lengths = np.bincount(logs.events["user"], minlength=logs.source.users)
    error = LENGTH_SIGMA * 1.2 * logs.source.events_per_user / np.sqrt(logs.source.users)
    assert abs(lengths.mean() - logs.source.events_per_user) < 4 * error
    assert np.log(lengths).std() == pytest.approx(LENGTH_SIGMA, rel=0.1)
    assert lengths.max() > 5 * lengths.mean()


def test_history_lengths_are_capped(tmp_path: Path) -> None:
    drawn = draw(small(max_events_per_user=120), tmp_path)
    assert np.bincount(drawn.events["user"]).max() == 120


def test_bursts_repeat_a_topic(logs: Logs) -> None:
    """One topic in five events running is rare without bursts (Σ w² is about 0.2), common with them."""
    topic, user = logs.items["cluster"][logs.events["item"]], logs.events["user"]
    running = np.lib.stride_tricks.sliding_window_view(topic, 5)
    runs = (running == running[:, :1]).all(1) & (user[4:] == user[:-4])
    assert runs.mean() > 0.03


def test_actions_are_stronger_on_interests(logs: Logs) -> None:
    topic = logs.items["cluster"][logs.events["item"]]
    interest = np.zeros((logs.source.users, logs.source.topics), bool)
    interest[logs.truth["user"], logs.truth["cluster"]] = True
    liked = interest[logs.events["user"], topic]
    assert set(np.unique(logs.events["action"])) == {1, 2, 3, 4, 5}
    assert logs.events["action"][liked].mean() > logs.events["action"][~liked].mean() + 0.5


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_none_of_the_interests_may_be_old(share: float, tmp_path: Path) -> None:
    drawn = draw(small(old_interest_share=share, old_interest_age=20), tmp_path)
    assert drawn.truth["old"].mean() == share
    if share == 0:
        assert np.array_equal(drawn.impressions["oracle_click"], drawn.impressions["oracle_click_recent"])


def test_users_without_events_have_requests(tmp_path: Path) -> None:
    drawn = draw(small(events_per_user=0), tmp_path)
    assert len(drawn.events["user"]) == 0
    assert len(drawn.impressions["user"]) == 40 * 10 * 10


# Labels


def test_rates_are_those_of_the_oracle_and_near_the_target(logs: Logs) -> None:
    click, p = logs.impressions["click"], logs.impressions["oracle_click"]
    clicked, conversion, q = click == 1, logs.impressions["conversion"], logs.impressions["oracle_conversion"]
    assert abs(click.mean() - p.mean()) < 4 * np.sqrt((p * (1 - p)).mean() / len(p))
    assert abs(conversion[clicked].mean() - q[clicked].mean()) < 4 * np.sqrt(0.25 / clicked.sum())
    assert p.mean() == pytest.approx(logs.source.click_rate, rel=0.05)
    assert q[clicked].mean() == pytest.approx(logs.source.conversion_rate, rel=0.05)


def test_oracle_is_calibrated_in_every_tenth(logs: Logs) -> None:
    click = logs.impressions["click"]
    for oracle in ("oracle_click", "oracle_click_recent"):
        p = logs.impressions[oracle]
        for tenth in np.array_split(np.argsort(p), 10):
            error = np.sqrt((p[tenth] * (1 - p[tenth])).mean() / len(tenth))
            # users share their draws, so that the errors of a tenth are not independent
            assert abs(click[tenth].mean() - p[tenth].mean()) < 6 * error + 0.002


def test_conversions_are_only_on_clicks(logs: Logs) -> None:
    assert not (logs.impressions["conversion"] > logs.impressions["click"]).any()
    clicked = logs.impressions["click"] == 1
    assert roc_auc_score(logs.impressions["conversion"][clicked], logs.impressions["oracle_conversion"][clicked]) > 0.7


def test_oracle_log_loss_beats_the_constant(logs: Logs) -> None:
    click = logs.impressions["click"]
    constant = log_loss(click, np.full(len(click), click.mean()))
    recent = log_loss(click, logs.impressions["oracle_click_recent"])
    assert log_loss(click, logs.impressions["oracle_click"]) < recent - 0.03 < constant - 0.06


def oracle_aucs(drawn: Logs) -> tuple[float, float, float]:
    """Click AUC of the oracle, of the oracle without the old interests, of item popularity."""
    click = drawn.impressions["click"]
    scores = (
        drawn.impressions["oracle_click"],
        drawn.impressions["oracle_click_recent"],
        item_popularity(drawn)[drawn.impressions["item"]],
    )
    full, recent, popular = (float(roc_auc_score(click, score)) for score in scores)
    return full, recent, popular


def test_long_history_matters_by_default(logs: Logs) -> None:
    full, recent, popular = oracle_aucs(logs)
    assert full > 0.85
    assert full - recent > 0.1
    assert recent - popular > 0.1
    assert popular > 0.53


def test_long_history_matters_in_the_demo(tmp_path: Path) -> None:
    config = PrepareConfig.model_validate(yaml.safe_load((CONFIGS / "data.yaml").read_text()))
    assert isinstance(config.source, SyntheticSource)
    full, recent, popular = oracle_aucs(draw(config.source, tmp_path))
    assert full > 0.85
    assert full - recent > 0.1
    assert recent - popular > 0.1


def test_later_positions_are_clicked_less(logs: Logs) -> None:
    shape = (-1, logs.source.candidates_per_request)
    rate = logs.impressions["click"].reshape(shape).mean(0)
    assert rate[0] > 1.2 * rate[-1]
    p = logs.impressions["oracle_click"].reshape(shape)
    slope = np.polyfit(np.log1p(np.arange(shape[1])), np.log(p / (1 - p)).mean(0), 1)[0]
    assert slope == pytest.approx(-POSITION, abs=0.1)


# Memory and configuration


@pytest.mark.parametrize("chunk_rows", [1, 1_000, 500_000])
def test_chunks_cover_all_users_once_and_are_bounded(chunk_rows: int) -> None:
    source = SyntheticSource(users=1_000, events_per_user=700)
    ranges = list(user_ranges(source, chunk_rows))
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert ranges[-1][1] == 1_000
    assert all((last - first) * 700 <= max(chunk_rows, 700) for first, last in ranges)


def test_four_times_the_users_need_no_more_memory(tmp_path: Path) -> None:
    def peak_bytes(users: int) -> int:
        tracemalloc.start()
        generate(SyntheticSource(users=users, items=500), tmp_path / str(users), chunk_rows=20_000)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    # A small run first: what is imported on first use is not the generator's.
    peak_bytes(10)
    assert peak_bytes(800) < 1.3 * peak_bytes(200)


def test_large_config_is_a_hundred_million_events() -> None:
    config = PrepareConfig.model_validate(yaml.safe_load((CONFIGS / "large.yaml").read_text()))
    assert isinstance(config.source, SyntheticSource)
    assert config.source.users * config.source.events_per_user == 10**8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topics": 400}, "topics: at most one an item"),
        ({"interests_per_user": 12}, "interests_per_user: less than topics"),
        ({"candidates_per_request": 301}, "candidates_per_request: at most items"),
        ({"requests_per_user": 2}, "requests_per_user"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        small(**changes)
