"""Metrics of click and conversion probabilities: exact, vectorised, and merged over ranks without loss.

In go predicted probabilities with the label and the user of each impression; out come, per task, AUC, UAUC, WUAUC,
log loss, normalised entropy and calibration. GAUC of the literature is WUAUC under another name.

Three tasks share one set of impressions: CTR (clicked, over all), CTCVR (clicked and converted, over all) and CVR
(converted, over the clicked ones only).

Ranks hold different users' rows, so metrics are never averaged over ranks: :func:`gather_predictions` brings the rows
to rank 0, which computes them as one process would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Task = Literal["ctr", "ctcvr", "cvr"]
TASKS: tuple[Task, ...] = ("ctr", "ctcvr", "cvr")
CLIP = 1e-7
"""log loss takes probabilities of [CLIP, 1 − CLIP]; calibration takes them as they are"""
HISTORY_EDGES: tuple[int, ...] = (0, 1, 10, 30, 100, 300, 1_000, 3_000, 10_000)

Array: TypeAlias = npt.NDArray[Any]
Int64s: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BinaryMetrics:
    """Metrics of one task; ``None`` where undefined (no impressions, or one class only)."""

    auc: float | None
    uauc: float | None
    """mean of the users' own AUC, over users with both classes"""
    wuauc: float | None
    """the same weighted by the user's impressions; called GAUC elsewhere"""
    logloss: float | None
    """nats per impression"""
    ne: float | None
    """log loss / entropy of the mean label: below 1 is better than the constant"""
    calibration: float | None
    """sum of scores / number of positives"""
    impressions: int
    positives: int
    users_with_both: int


def binary_metrics(user: Array, label: Array, score: Array) -> BinaryMetrics:
    """All metrics of one task.

    Args:
        user: integer ids `[N]`, in any order.
        label: 0 or 1 (or bool) `[N]`.
        score: probabilities `[N]`.

    Raises:
        ValueError: lengths differ, a label is not 0 or 1, or a score is not within [0, 1] (NaN included).

    >>> binary_metrics(np.array([7, 7, 7, 8]), np.array([1, 0, 0, 1]), np.array([0.8, 0.8, 0.1, 0.5])).uauc
    0.75
    """
    if not len(user) == len(label) == len(score):
        raise ValueError(f"lengths differ: user {len(user)}, label {len(label)}, score {len(score)}")
    _check_range("label", label, (label == 0) | (label == 1), "0 or 1")
    _check_range("score", score, (score >= 0) & (score <= 1), "a probability within [0, 1]")
    if len(user) == 0:
        return BinaryMetrics(None, None, None, None, None, None, impressions=0, positives=0, users_with_both=0)

    positive = label.astype(bool)
    positives, mean = int(positive.sum()), float(positive.mean())
    probability = score.astype(np.float64)
    predicted = float(probability.sum())
    np.clip(probability, CLIP, 1 - CLIP, out=probability)
    logloss = float(-np.log(np.where(positive, probability, 1 - probability)).mean())
    both_classes = 0 < positives < len(positive)
    entropy = -(mean * np.log(mean) + (1 - mean) * np.log(1 - mean)) if both_classes else None

    overall, by_user = count_pairs(user, positive, score)
    ranked = by_user.positives * by_user.negatives > 0
    auc_u = by_user.auc(ranked)
    weight_u = (by_user.positives + by_user.negatives)[ranked]
    return BinaryMetrics(
        auc=float(overall.auc()[0]) if both_classes else None,
        uauc=float(auc_u.mean()) if len(auc_u) else None,
        wuauc=float(np.average(auc_u, weights=weight_u)) if len(auc_u) else None,
        logloss=logloss,
        ne=float(logloss / entropy) if entropy else None,
        calibration=predicted / positives if positives else None,
        impressions=len(positive),
        positives=positives,
        users_with_both=len(auc_u),
    )


@dataclass(frozen=True)
class Pairs:
    """Counts per group, `[G]` each; `won_twice`: 2 × (positive, negative) pairs in the right order, a tie a half."""

    won_twice: Int64s
    positives: Int64s
    negatives: Int64s

    def auc(self, of: Array | slice = slice(None)) -> npt.NDArray[np.float64]:
        """Share of the pairs that are in the right order, of each group."""
        return self.won_twice[of] / (2.0 * self.positives[of] * self.negatives[of])


def count_pairs(user: Array, positive: Array, score: Array) -> tuple[Pairs, Pairs]:
    """Pairs over all rows, and by user in ascending order.

    The order (user, score) takes one argsort by score and one plain sort of integers that pack user, rank of the score
    and label: several times faster than ``np.lexsort``, which sorts indices twice.
    """
    order = np.argsort(score)
    ranked = score[order]
    rank = np.zeros(len(order), np.int64)
    np.cumsum(ranked[1:] != ranked[:-1], out=rank[1:])
    label = positive[order].astype(np.int64)
    overall = _pairs_by_group(np.zeros_like(rank), rank, label)

    bits = int(rank[-1]).bit_length() + 1
    first, last = int(user.min()), int(user.max())
    if (last - first).bit_length() + bits <= 63:
        group = user.astype(np.int64) - first
    else:
        group = np.unique(user, return_inverse=True)[1].astype(np.int64)
    packed = (group[order] << bits) | (rank << 1) | label
    packed.sort()
    return overall, _pairs_by_group(packed >> bits, packed >> 1, packed & 1)


def _pairs_by_group(group: Int64s, rank: Int64s, label: Int64s) -> Pairs:
    """Pairs of each group; rows `[N]` are sorted by (group, rank). Integers throughout, hence exact."""
    tie = _starts((rank[1:] != rank[:-1]) | (group[1:] != group[:-1]))
    positives = np.add.reduceat(label, tie)  # [ties]
    negatives = np.diff(tie, append=len(label)) - positives
    first = _starts(group[tie][1:] != group[tie][:-1])  # [G], the first tie of each group
    lower = np.cumsum(negatives) - negatives
    lower -= np.repeat(lower[first], np.diff(first, append=len(tie)))  # negatives of the group below the tie
    return Pairs(
        won_twice=np.add.reduceat(positives * (2 * lower + negatives), first),
        positives=np.add.reduceat(positives, first),
        negatives=np.add.reduceat(negatives, first),
    )


def _starts(changes: npt.NDArray[np.bool_]) -> Int64s:
    """Positions at which runs begin, given whether each row but the first differs from the one before it."""
    return np.flatnonzero(np.concatenate([[True], changes])).astype(np.int64)


def _check_range(name: str, values: Array, good: Array, allowed: str) -> None:
    if not good.all():
        row = int(np.argmin(good))
        bad = len(values) - int(good.sum())
        raise ValueError(f"{name}: row {row} is {values[row]}, must be {allowed} ({bad} of {len(values)} rows are not)")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Scored impressions, one row each: `[N]` columns.

    Raises:
        ValueError: columns of different lengths.
    """

    user: Array
    """dense user index, int"""
    item: Array
    """dense item index, int"""
    history_length: Array
    """events available before the request, int"""
    request: Array
    """any number of the request's own, int: equal within it, distinct over all partitions and ranks; only counted"""
    click: Array
    """0 or 1"""
    conversion: Array | None = None
    """0 or 1; counts only on clicks"""
    p_ctr: Array
    p_ctcvr: Array | None = None
    p_cvr: Array | None = None
    oracle_click: Array | None = None
    """true probability of a click (generated data only)"""
    oracle_conversion: Array | None = None
    """true probability of a conversion given a click"""

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of different lengths: {lengths}")

    def __len__(self) -> int:
        return len(self.user)

    def columns(self) -> dict[str, Array]:
        """The columns that are there, by name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: column for name, column in named if column is not None}

    def select(self, rows: Array) -> Predictions:
        """The rows of a mask `[N]` or of indices."""
        return Predictions(**{name: column[rows] for name, column in self.columns().items()})

    def oracle(self) -> Predictions | None:
        """The same impressions scored with their true probabilities; ``None`` without them."""
        if self.oracle_click is None:
            return None
        cvr = self.oracle_conversion
        ctcvr = None if cvr is None else self.oracle_click * cvr
        return replace(self, p_ctr=self.oracle_click, p_cvr=cvr, p_ctcvr=ctcvr)

    @staticmethod
    def concat(parts: Iterable[Predictions]) -> Predictions:
        """One after another. Parts without rows may lack columns that the others have.

        Raises:
            ValueError: no parts, or parts with rows that differ in their columns.
        """
        given = list(parts)
        if not given:
            raise ValueError("no predictions to concatenate")
        filled = [part.columns() for part in given if len(part)] or [given[0].columns()]
        _check_same_columns(filled)
        return Predictions(**{name: np.concatenate([part[name] for part in filled]) for name in filled[0]})


def _check_same_columns(parts: Sequence[dict[str, Any]]) -> None:
    for part in parts:
        if part.keys() != parts[0].keys():
            raise ValueError(f"predictions differ in their columns: {sorted(parts[0])} and {sorted(part)}")


def task_metrics(predictions: Predictions) -> dict[Task, BinaryMetrics]:
    """Metrics of each task that has a label and a score."""
    user, click, conversion = predictions.user, predictions.click, predictions.conversion
    metrics: dict[Task, BinaryMetrics] = {"ctr": binary_metrics(user, click, predictions.p_ctr)}
    if conversion is not None and predictions.p_ctcvr is not None:
        metrics["ctcvr"] = binary_metrics(user, click * conversion, predictions.p_ctcvr)
    if conversion is not None and predictions.p_cvr is not None:
        clicked = click.astype(bool)
        metrics["cvr"] = binary_metrics(user[clicked], conversion[clicked], predictions.p_cvr[clicked])
    return metrics


@dataclass(frozen=True)
class HistoryBucket:
    """Metrics of the impressions whose requests have `min` ≤ history length < `max` (no upper end: ``None``).

    UAUC and WUAUC are over each user's impressions within the bucket.
    """

    min: int
    max: int | None
    impressions: int
    tasks: dict[Task, BinaryMetrics]


def by_history_length(predictions: Predictions, edges: Sequence[int] = HISTORY_EDGES) -> list[HistoryBucket]:
    """One bucket from each edge to the next, half-open, the last without end; buckets without impressions stay.

    Raises:
        ValueError: edges are not strictly ascending from 0, so that rows would fall outside every bucket.
    """
    if not edges or edges[0] != 0 or list(edges) != sorted(set(edges)):
        raise ValueError(f"edges: must ascend strictly from 0, got {list(edges)}")
    bucket = np.searchsorted(np.asarray(edges), predictions.history_length, side="right") - 1
    buckets: list[HistoryBucket] = []
    for number, (low, high) in enumerate(zip(edges, [*edges[1:], None], strict=True)):
        inside = predictions.select(bucket == number)
        buckets.append(HistoryBucket(low, high, len(inside), task_metrics(inside)))
    return buckets


def gather_predictions(local: Predictions, group: dist.ProcessGroup | None = None) -> Predictions | None:
    """Every rank's rows, in the order of ranks, on rank 0; ``None`` on the others. One process: `local` itself.

    Ranks may hold different numbers of rows, none included. Columns travel one by one into their place on rank 0,
    which so holds no second copy.

    Args:
        group: a gloo group of all ranks; default: the default group, which must then be gloo.

    Raises:
        ValueError: on every rank alike, if ranks with rows differ in their columns or data types.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = (len(local), {name: column.dtype.str for name, column in local.columns().items()})
    headers: list[Any] = [None] * world
    dist.all_gather_object(headers, mine, group=group)
    rows: list[int] = [count for count, _ in headers]
    dtypes: list[dict[str, str]] = [columns for count, columns in headers if count]
    if not dtypes:
        return local if rank == 0 else None
    _check_same_columns(dtypes)
    if any(columns != dtypes[0] for columns in dtypes):
        raise ValueError(f"predictions differ in their data types between ranks: {dtypes}")

    if rank != 0:
        for name in dtypes[0] if len(local) else ():
            dist.send(_as_bytes(np.array(local.columns()[name])), dst=0, group=group)
        return None
    ends = np.cumsum(rows)
    gathered: dict[str, Array] = {}
    for name, dtype in dtypes[0].items():
        column = np.empty(int(ends[-1]), dtype)
        if len(local):
            column[: len(local)] = local.columns()[name]
        for source in range(1, world):
            if rows[source]:
                dist.recv(_as_bytes(column[ends[source - 1] : ends[source]]), src=source, group=group)
        gathered[name] = column
    return Predictions(**gathered)


def _as_bytes(column: Array) -> torch.Tensor:
    """The memory of a contiguous column as a uint8 tensor, of whatever type it is."""
    return torch.from_numpy(column.view(np.uint8))
