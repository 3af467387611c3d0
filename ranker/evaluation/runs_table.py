"""`ranker runs RUN …`: the metrics of evaluated runs side by side, with the references and the oracle they share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from features.errors import UserError

COLUMNS = (
    ("ctr", "auc"),
    ("ctr", "uauc"),
    ("ctr", "logloss"),
    ("ctr", "ne"),
    ("ctcvr", "auc"),
    ("ctcvr", "ne"),
    ("cvr", "auc"),
)
TITLES = {"auc": "AUC", "uauc": "UAUC", "logloss": "log loss", "ne": "NE"}


def read_metrics(run: Path) -> dict[str, Any]:
    """Content of a run's ``metrics.json``."""
    path = run / "metrics.json"
    if not path.is_file():
        raise UserError(f"{path}: does not exist; write it with `ranker evaluate {run}`")
    return json.loads(path.read_text())


def show_runs(runs: Sequence[Path], console: Console | None = None) -> None:
    """Print one row a run.

    Raises:
        UserError: a run is not evaluated, or they were measured on different requests.
    """
    metrics = {run: read_metrics(run) for run in runs}
    measured = {run: (m["split"], m["requests"], m["impressions"], m["users"]) for run, m in metrics.items()}
    if len(set(measured.values())) > 1:
        told = "; ".join(f"{run}: {n:,} impressions of {split}" for run, (split, _, n, _) in measured.items())
        raise UserError(f"these runs were measured on different requests, which cannot be compared ({told})")
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")  # a long name takes two lines; a number is never cut
    for task, name in COLUMNS:
        table.add_column(f"{task.upper()}\n{TITLES[name]}", justify="right", no_wrap=True, min_width=6)
    for run, content in metrics.items():
        table.add_row(run.name, *_cells(content))
    table.add_section()
    first = metrics[runs[0]]
    for name, scores in first.get("references", {}).items():
        table.add_row(name.replace("_", " "), *_cells(scores))
    if "oracle" in first:
        table.add_row("oracle", *_cells(first["oracle"]))
    (console or Console()).print(table)


def _cells(scores: Mapping[str, Any]) -> list[str]:
    values = (scores.get(task, {}).get(name) for task, name in COLUMNS)
    return ["–" if value is None else f"{value:.4f}" for value in values]
