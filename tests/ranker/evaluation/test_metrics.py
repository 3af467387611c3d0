"""Metrics against scikit-learn, user by user, on scores with ties and users of one class."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from ranker.evaluation.metrics import (
    BinaryMetrics,
    Predictions,
    binary_metrics,
    by_history_length,
    gather_predictions,
    task_metrics,
)
from ranker.native_threads import wait_until_idle
from tests.free_ports import free_port


def reference_metrics(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> BinaryMetrics:
    """The definitions, with a loop over users and scikit-learn's AUC and log loss."""
    label = label.astype(np.float64)
    both = 0 < label.sum() < len(label)
    mean = label.mean()
    aucs, sizes = [], []
    for u in np.unique(user):
        mine = user == u
        if 0 < label[mine].sum() < mine.sum():
            aucs.append(roc_auc_score(label[mine], score[mine]))
            sizes.append(mine.sum())
    loss = log_loss(label, score, labels=[0, 1])
    return BinaryMetrics(
        auc=roc_auc_score(label, score) if both else None,
        uauc=float(np.mean(aucs)) if aucs else None,
        wuauc=float(np.average(aucs, weights=sizes)) if aucs else None,
        logloss=loss,
        ne=loss / log_loss(label, np.full(len(label), mean)) if both else None,
        calibration=score.sum() / label.sum() if label.sum() else None,
        impressions=len(label),
        positives=int(label.sum()),
        users_with_both=len(aucs),
    )


def assert_equal(actual: BinaryMetrics, expected: BinaryMetrics) -> None:
    found, wanted = dataclasses.asdict(actual), dataclasses.asdict(expected)
    assert [name for name in found if found[name] is None] == [name for name in wanted if wanted[name] is None]
    defined = {name: value for name, value in wanted.items() if value is not None}
    assert {name: found[name] for name in defined} == pytest.approx(defined, rel=1e-9, abs=1e-12)


def random_predictions(rows: int, seed: int = 0, **changes: np.ndarray | None) -> Predictions:
    rng = np.random.default_rng(seed)
    oracle_click, oracle_conversion = rng.random(rows), rng.random(rows)
    p_ctr = rng.integers(1, 20, rows) / 20  # many ties
    p_cvr = rng.integers(1, 20, rows) / 20
    columns: dict[str, np.ndarray | None] = {
        "user": rng.integers(0, max(rows // 8, 1), rows),
        "item": rng.integers(0, 50, rows).astype(np.int32),
        "history_length": rng.integers(0, 500, rows),
        "request": np.arange(rows) // 4,
        "click": (rng.random(rows) < oracle_click).astype(np.float32),
        "conversion": (rng.random(rows) < oracle_conversion).astype(np.float32),
        "p_ctr": p_ctr,
        "p_cvr": p_cvr,
        "p_ctcvr": p_ctr * p_cvr,
        "oracle_click": oracle_click,
        "oracle_conversion": oracle_conversion,
    }
    return Predictions(**(columns | changes))


rows = st.lists(
    st.tuples(st.integers(0, 5), st.booleans(), st.sampled_from([0.01, 0.25, 0.5, 0.5 + 1e-12, 0.9])),
    min_size=1,
    max_size=60,
)


@given(rows)
def test_equals_scikit_learn_user_by_user_with_ties_and_one_class_users(rows: list[tuple[int, bool, float]]) -> None:
    user, label, score = (np.array(column) for column in zip(*rows, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_equal(binary_metrics(user, label, score), reference_metrics(user, label, score))


@given(rows, st.randoms())
def test_the_order_of_rows_does_not_matter(rows: list[tuple[int, bool, float]], random) -> None:
    shuffled = random.sample(rows, len(rows))
    first, second = ([np.array(c) for c in zip(*some, strict=True)] for some in (rows, shuffled))
    assert_equal(binary_metrics(*first), binary_metrics(*second))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_scikit_learn_on_many_rows(dtype: type) -> None:
    rng = np.random.default_rng(1)
    user, label, score = rng.integers(-30, 300, 5_000), rng.random(5_000) < 0.3, rng.random(5_000).astype(dtype)
    assert_equal(binary_metrics(user, label, score), reference_metrics(user, label, score.astype(np.float64)))


def test_user_ids_may_be_as_far_apart_as_int64_allows() -> None:
    limits = np.iinfo(np.int64)
    user = np.array([limits.min, limits.max, limits.min, limits.max, 0])
    label, score = np.array([1, 0, 0, 1, 1]), np.array([0.9, 0.8, 0.2, 0.3, 0.5])
    assert_equal(binary_metrics(user, label, score), reference_metrics(user, label, score))


def test_no_impressions_leave_everything_undefined() -> None:
    empty = np.array([])
    assert binary_metrics(empty.astype(int), empty, empty) == BinaryMetrics(*[None] * 6, 0, 0, 0)


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_ranking_and_ne_undefined_but_not_log_loss(label: int) -> None:
    metrics = binary_metrics(np.array([1, 2]), np.full(2, label), np.array([0.2, 0.4]))
    assert (metrics.auc, metrics.uauc, metrics.wuauc, metrics.ne) == (None, None, None, None)
    assert metrics.logloss is not None
    assert metrics.calibration == (pytest.approx(0.3) if label else None)


def test_uauc_of_a_single_user_is_the_auc() -> None:
    metrics = binary_metrics(np.zeros(4, int), np.array([1, 0, 0, 1]), np.array([0.9, 0.9, 0.1, 0.5]))
    assert metrics.uauc == metrics.wuauc == metrics.auc == 0.625


def test_wuauc_weights_users_by_their_impressions_and_leaves_out_one_class_users() -> None:
    user = np.array([1, 1, 2, 2, 2, 2, 3])
    label = np.array([1, 0, 1, 0, 0, 0, 1])
    score = np.array([0.9, 0.1, 0.1, 0.9, 0.9, 0.9, 0.5])
    metrics = binary_metrics(user, label, score)
    assert (metrics.uauc, metrics.wuauc, metrics.users_with_both) == (0.5, pytest.approx(2 / 6), 2)


def test_the_mean_label_as_score_has_ne_and_calibration_of_one() -> None:
    label = np.array([1, 0, 0, 0, 1, 0, 0, 0])
    metrics = binary_metrics(np.arange(8), label, np.full(8, 0.25))
    assert (metrics.ne, metrics.calibration, metrics.auc) == (pytest.approx(1), pytest.approx(1), 0.5)


def test_certain_and_wrong_scores_cost_the_clipped_loss() -> None:
    metrics = binary_metrics(np.arange(2), np.array([1, 0]), np.array([0.0, 1.0]))
    assert metrics.logloss == pytest.approx(-math.log(1e-7))


@pytest.mark.parametrize(
    ("label", "score", "message"),
    [
        ([0, 1, 1], [0.1, math.nan, 2.0], r"score: row 1 is nan, must be a probability .*\(2 of 3 rows"),
        ([0, 1, 1], [0.1, 0.2, -0.5], r"score: row 2 is -0.5"),
        ([0, 0.5, 1], [0.1, 0.2, 0.3], r"label: row 1 is 0.5, must be 0 or 1"),
        ([0, 1], [0.1, 0.2, 0.3], r"lengths differ: user 3, label 2, score 3"),
    ],
)
def test_wrong_values_are_named(label: list[float], score: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        binary_metrics(np.arange(3), np.array(label), np.array(score))


def test_each_task_has_its_label_score_and_population() -> None:
    predictions = random_predictions(2_000)
    metrics = task_metrics(predictions)
    user, click, conversion = predictions.user, predictions.click, predictions.conversion
    clicked = click == 1
    assert_equal(metrics["ctr"], reference_metrics(user, click, predictions.p_ctr))
    assert_equal(metrics["ctcvr"], reference_metrics(user, click * conversion, predictions.p_ctcvr))
    assert_equal(metrics["cvr"], reference_metrics(user[clicked], conversion[clicked], predictions.p_cvr[clicked]))


def test_without_a_conversion_label_there_is_only_ctr() -> None:
    assert list(task_metrics(random_predictions(100, conversion=None))) == ["ctr"]


def test_the_oracle_scores_with_the_true_probabilities() -> None:
    predictions = random_predictions(5_000)
    oracle = predictions.oracle()
    assert oracle is not None
    metrics, best = task_metrics(predictions), task_metrics(oracle)
    for task in metrics:
        assert best[task].auc > metrics[task].auc
        assert best[task].calibration == pytest.approx(1, abs=0.1)
    assert random_predictions(10, oracle_click=None).oracle() is None


def test_history_buckets_are_half_open_and_cover_every_length() -> None:
    lengths = np.array([0, 1, 9, 10, 29, 30, 9_999, 10_000, 10_001, 10**9])
    buckets = by_history_length(random_predictions(len(lengths), history_length=lengths))
    found = {(bucket.min, bucket.max): bucket.impressions for bucket in buckets}
    assert found == {
        (0, 1): 1,
        (1, 10): 2,
        (10, 30): 2,
        (30, 100): 1,
        (100, 300): 0,
        (300, 1_000): 0,
        (1_000, 3_000): 0,
        (3_000, 10_000): 1,
        (10_000, None): 3,
    }


def test_a_bucket_is_measured_on_its_own_impressions() -> None:
    predictions = random_predictions(3_000)
    inside = (predictions.history_length >= 30) & (predictions.history_length < 100)
    bucket = by_history_length(predictions)[3]
    assert bucket.tasks == task_metrics(predictions.select(inside))
    assert_equal(
        bucket.tasks["ctr"],
        reference_metrics(predictions.user[inside], predictions.click[inside], predictions.p_ctr[inside]),
    )


@pytest.mark.parametrize("edges", [[], [1, 10], [0, 10, 5], [0, 10, 10]])
def test_edges_that_would_lose_rows_are_refused(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend strictly from 0"):
        by_history_length(random_predictions(10), edges)


def test_predictions_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different lengths.*'p_ctr': 3"):
        random_predictions(4, p_ctr=np.zeros(3))


def test_concat_restores_what_was_cut_apart() -> None:
    whole = random_predictions(100)
    empty = random_predictions(0, conversion=None, p_cvr=None)
    parts = [empty, whole.select(slice(0, 30)), whole.select(slice(30, 100))]
    joined = Predictions.concat(parts).columns()
    assert joined.keys() == whole.columns().keys()
    assert all(np.array_equal(joined[name], column) for name, column in whole.columns().items())


def test_concat_refuses_parts_with_other_columns() -> None:
    with pytest.raises(ValueError, match="differ in their columns"):
        Predictions.concat([random_predictions(2), random_predictions(2, conversion=None)])


SHARES = {
    "unequal": [slice(0, 137), slice(137, 1_000)],
    "rank 0 empty": [slice(0, 0), slice(0, 1_000)],
    "rank 1 empty": [slice(0, 1_000), slice(0, 0)],
    "both empty": [slice(0, 0), slice(0, 0)],
}


def gather_on_rank(rank: int, port: int, out: Path) -> None:
    """What a rank does: it gathers each way of sharing the rows, then fails to gather columns that differ."""
    store = dist.TCPStore("localhost", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    for name, shares in SHARES.items():
        local = random_predictions(1_000).select(shares[rank])
        if not len(local):  # a rank that never saw a batch knows the obligatory columns at most
            local = random_predictions(0, conversion=None, p_cvr=None, p_ctcvr=None)
        gathered = gather_predictions(local)
        assert (gathered is None) == (rank != 0)
        if gathered is not None:
            np.savez(out / f"{name}.npz", **gathered.columns())
    differing = random_predictions(10) if rank == 0 else random_predictions(10, conversion=None)
    with pytest.raises(ValueError, match="differ in their columns"):
        gather_predictions(differing)
    narrower = random_predictions(10) if rank == 0 else random_predictions(10, click=np.zeros(10, np.int8))
    with pytest.raises(ValueError, match="differ in their data types"):
        gather_predictions(narrower)
    dist.barrier()
    wait_until_idle()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes left what rank 0 gathered. Both ended well: errors come on every rank, none waits."""
    out = tmp_path_factory.mktemp("ranks")
    port, spawn = free_port(), multiprocessing.get_context("spawn")
    ranks = [spawn.Process(target=gather_on_rank, args=(rank, port, out)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    return out


@pytest.mark.parametrize("share", [name for name in SHARES if name != "both empty"])
def test_two_ranks_measure_what_one_does(two_ranks: Path, share: str) -> None:
    whole = random_predictions(1_000)
    with np.load(two_ranks / f"{share}.npz") as columns:
        gathered = Predictions(**columns)
    assert {name: column.dtype for name, column in gathered.columns().items()} == {
        name: column.dtype for name, column in whole.columns().items()
    }
    assert task_metrics(gathered) == task_metrics(whole)
    assert by_history_length(gathered) == by_history_length(whole)


def test_ranks_without_rows_gather_none(two_ranks: Path) -> None:
    with np.load(two_ranks / "both empty.npz") as columns:
        assert len(Predictions(**columns)) == 0


def test_one_process_gathers_its_own() -> None:
    local = random_predictions(10)
    assert gather_predictions(local) is local
