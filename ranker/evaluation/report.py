"""The report of an evaluation: one typed object, written as ``metrics.json`` and shown as tables.

The model stands beside what it must beat (the references without sequences, :mod:`ranker.evaluation.references`) and,
on generated data, beside the best that can be attained (the oracle, scoring with the true probabilities).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from features.schema import Split
from ranker.evaluation.metrics import (
    HISTORY_EDGES,
    TASKS,
    BinaryMetrics,
    HistoryBucket,
    Predictions,
    Task,
    by_history_length,
    task_metrics,
)
from ranker.evaluation.references import REFERENCES, References

METRICS = ("auc", "uauc", "wuauc", "logloss", "ne", "calibration")
_TITLES = ("AUC", "UAUC", "WUAUC", "log loss", "NE", "calib.")
_ROWS = {"item_rate": "item rate", "user_item_logit": "user + item"}
_UNDEFINED = "–"

Tasks = dict[Task, BinaryMetrics]


class Figure(NamedTuple):
    """A mean over so many of something; none where there is nothing to take it over."""

    name: str
    value: float | None
    over: int
    what: str


@dataclass(frozen=True)
class BlockReport:
    """What a long-sequence block does, measured on a sample of requests (:mod:`ranker.evaluation.diagnostics`)."""

    name: str
    kind: str
    requests: int
    figures: list[Figure]


@dataclass(frozen=True)
class Report:
    """Metrics of one split: of the model, of the references, and of the oracle where there is one."""

    split: Split
    requests: int
    impressions: int
    users: int
    unknown_items: int
    """impressions whose item is outside the vocabulary"""
    model: Tasks
    history: list[HistoryBucket]
    references: dict[str, Tasks] = field(default_factory=dict[str, Tasks])
    oracle: Tasks | None = None
    oracle_history: list[HistoryBucket] | None = None
    blocks: list[BlockReport] = field(default_factory=list[BlockReport])


def make_report(
    predictions: Predictions,
    split: Split,
    unknown_items: int = 0,
    references: References | None = None,
    edges: Sequence[int] = HISTORY_EDGES,
    blocks: Sequence[BlockReport] = (),
) -> Report:
    """Measure `predictions`, those of all ranks (:func:`ranker.evaluation.metrics.gather_predictions`).

    Requests and users are counted from the impressions: a request without candidates leaves no trace in them.
    """
    oracle = predictions.oracle()
    return Report(
        split=split,
        requests=len(np.unique(predictions.request)),
        impressions=len(predictions),
        users=len(np.unique(predictions.user)),
        unknown_items=unknown_items,
        model=task_metrics(predictions),
        history=by_history_length(predictions, edges),
        references=_measure_references(references, predictions) if references is not None else {},
        oracle=task_metrics(oracle) if oracle is not None else None,
        oracle_history=by_history_length(oracle, edges) if oracle is not None else None,
        blocks=list(blocks),
    )


def _measure_references(references: References, predictions: Predictions) -> dict[str, Tasks]:
    return {name: task_metrics(references.score(name, predictions)) for name in REFERENCES}


def metrics_json(report: Report) -> dict[str, object]:
    """The content of ``metrics.json``. Every task has its six metrics: null where undefined or not measured."""
    content: dict[str, object] = {
        "split": report.split,
        "requests": report.requests,
        "impressions": report.impressions,
        "users": report.users,
        "unknown_items": report.unknown_items,
        **_tasks_json(report.model),
        "by_history_length": _history_json(report.history, report.oracle_history),
        "references": {name: _tasks_json(tasks) for name, tasks in report.references.items()},
    }
    if report.oracle is not None:
        content["oracle"] = _tasks_json(report.oracle)
    if report.blocks:
        content["blocks"] = [_block_json(block) for block in report.blocks]
    return content


def _block_json(block: BlockReport) -> dict[str, object]:
    figures = {f.name: {"value": f.value, "over": f.over, "what": f.what} for f in block.figures}
    return {"block": block.name, "type": block.kind, "requests": block.requests, "figures": figures}


def _history_json(model: list[HistoryBucket], oracle: list[HistoryBucket] | None) -> list[dict[str, object]]:
    """Buckets `min` ≤ length < `max`; the last has no upper end: null."""
    rows: list[dict[str, object]] = [
        {"min": bucket.min, "max": bucket.max, "impressions": bucket.impressions, **_tasks_json(bucket.tasks)}
        for bucket in model
    ]
    if oracle is not None:
        for row, best in zip(rows, oracle, strict=True):
            row["oracle"] = _tasks_json(best.tasks)
    return rows


def _tasks_json(tasks: Tasks) -> dict[str, object]:
    return {task: {name: _value(tasks.get(task), name) for name in METRICS} for task in TASKS}


def _value(metrics: BinaryMetrics | None, name: str) -> float | None:
    return None if metrics is None else getattr(metrics, name)


def write_metrics(report: Report, path: Path) -> None:
    """Write ``metrics.json`` in one step: a reader sees the old file or the whole new one."""
    text = json.dumps(metrics_json(report), indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def print_report(report: Report, console: Console | None = None) -> None:
    """Show the tables on the terminal."""
    console = console or Console()
    console.print(_task_table(report))
    console.print(_history_table(report))
    if report.blocks:
        console.print(_block_table(report.blocks))
    console.print(
        "UAUC: mean over users with both classes; WUAUC: weighted by impressions (= GAUC). "
        "CVR is on clicks. NE < 1: better than the mean label. calib.: sum of scores / positives.",
        highlight=False,
    )


def _task_table(report: Report) -> Table:
    """One section a task; rows: the model, the references, the oracle."""
    table = Table(
        title=f"{report.split}: {report.requests:,} requests, {report.impressions:,} impressions, "
        f"{report.users:,} users, {report.unknown_items:,} impressions of unknown items",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("task", no_wrap=True)
    table.add_column("scores", no_wrap=True)
    for title in _TITLES:
        table.add_column(title, justify="right", no_wrap=True)
    scored = {"model": report.model, **report.references}
    if report.oracle is not None:
        scored["oracle"] = report.oracle
    for task in report.model:
        for name, tasks in scored.items():
            title = task.upper() if name == "model" else ""
            cells = [_cell(_value(tasks.get(task), metric)) for metric in METRICS]
            table.add_row(title, _ROWS.get(name, name), *cells)
        table.add_section()
    return table


def _history_table(report: Report) -> Table:
    """One section a task; rows: history lengths that occur (of CVR: among clicks); `oracle` is its AUC."""
    table = Table(title="By history length (lengths that occur)", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    for title in ("events", "impressions", "AUC", "UAUC", "log loss", "calib."):
        table.add_column(title, justify="right", no_wrap=True)
    if report.oracle_history is not None:
        table.add_column("oracle", justify="right", no_wrap=True)
    best = report.oracle_history or [None] * len(report.history)
    for task in report.model:
        title = task.upper()
        for bucket, attainable in zip(report.history, best, strict=True):
            measured = bucket.tasks[task]
            if measured.impressions == 0:
                continue
            cells = [_cell(_value(measured, metric)) for metric in ("auc", "uauc", "logloss", "calibration")]
            if attainable is not None:
                cells.append(_cell(_value(attainable.tasks.get(task), "auc")))
            table.add_row(title, interval(bucket.min, bucket.max), f"{measured.impressions:,}", *cells)
            title = ""
        table.add_section()
    return table


def _block_table(blocks: list[BlockReport]) -> Table:
    """One section a block; rows: its figures."""
    title = f"What blocks do, on {blocks[0].requests:,} requests drawn from the first rank's share"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("block", no_wrap=True)
    table.add_column("figure", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("over", no_wrap=True)
    for block in blocks:
        name = f"{block.name.removeprefix('model.')} {block.kind}"
        for figure in block.figures:
            table.add_row(name, figure.name, _cell(figure.value), f"{figure.over:,} {figure.what}")
            name = ""
        table.add_section()
    return table


def interval(low: int, high: int | None) -> str:
    """The lengths of a bucket, ``low`` ≤ length < ``high``."""
    if high is None:
        return f"≥ {low:,}"
    return f"{low:,}" if high == low + 1 else f"{low:,}–{high - 1:,}"


def _cell(value: float | None) -> str:
    return _UNDEFINED if value is None else f"{value:.4f}"
