"""Time of the vectorised metrics against a loop over users with scikit-learn.

    python -m tests.benchmarks.metrics --rows 5000000 --users 50000

The loop runs on `--loop-users` of the users and its time is scaled to all of them (it is linear in users); both
results are compared on those users.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score

from ranker.evaluation.metrics import binary_metrics
from tests.benchmarks.machine import machine


def loop_over_users(user: np.ndarray, label: np.ndarray, score: np.ndarray) -> float:
    """UAUC as most rankers compute it; `user` is sorted."""
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    aucs: list[float] = []
    for start, stop in zip(starts, [*starts[1:], len(user)], strict=True):
        y = label[start:stop]
        if 0 < y.sum() < len(y):
            aucs.append(float(roc_auc_score(y, score[start:stop])))
    return float(np.mean(aucs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--loop-users", type=int, default=2_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    user = rng.integers(0, args.users, args.rows)
    score = rng.random(args.rows, dtype=np.float32)
    label = rng.random(args.rows) < 0.2 * score
    print(f"machine   {machine('numpy', 'scikit-learn')}")
    print(f"sizes     {args.rows:,} rows, {args.users:,} users, {label.mean():.3f} positive, seed 0")

    times: list[float] = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        metrics = binary_metrics(user, label, score)
        times.append(time.perf_counter() - begin)
    ours_s = float(np.median(times))
    print(f"ours      {ours_s:.2f} s (median of {args.repeats}: {min(times):.2f}–{max(times):.2f}), all six metrics")

    looped = min(args.loop_users, args.users)
    begin = time.perf_counter()
    order = np.argsort(user, kind="stable")
    some = order[: np.searchsorted(user[order], looped)]
    sort_s = time.perf_counter() - begin
    begin = time.perf_counter()
    uauc = loop_over_users(user[some], label[some], score[some])
    users_s = (time.perf_counter() - begin) * args.users / looped
    begin = time.perf_counter()
    auc, loss = roc_auc_score(label, score), log_loss(label, score.astype(np.float64))
    overall_s = time.perf_counter() - begin
    loop_s = sort_s + users_s + overall_s
    print(
        f"sklearn   {loop_s:.2f} s = sort {sort_s:.2f} + users {users_s:.2f} (from {looped:,} of them) "
        f"+ AUC and log loss {overall_s:.2f}"
    )
    print(f"ratio     {loop_s / ours_s:.1f}×")
    ours_on_some = binary_metrics(user[some], label[some], score[some]).uauc
    assert metrics.auc is not None
    assert metrics.logloss is not None
    assert ours_on_some is not None
    difference = max(abs(metrics.auc - auc), abs(metrics.logloss - loss), abs(ours_on_some - uauc))
    print(f"greatest difference of AUC, log loss and UAUC: {difference:.1e}")


if __name__ == "__main__":
    main()
