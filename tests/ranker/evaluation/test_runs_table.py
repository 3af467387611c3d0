"""Runs are compared on the same requests only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from features.errors import UserError
from ranker.evaluation.runs_table import show_runs


def write_run(root: Path, name: str, auc: float | None, requests: int = 5) -> Path:
    tasks = {"ctr": {"auc": auc, "ne": 0.9}, "ctcvr": {"auc": None}, "cvr": {"auc": None}}
    metrics = {"split": "test", "requests": requests, "impressions": 10, "users": 2, **tasks}
    metrics |= {"references": {"item_rate": {"ctr": {"auc": 0.55}}}, "oracle": {"ctr": {"auc": 0.99}}}
    (root / name).mkdir()
    (root / name / "metrics.json").write_text(json.dumps(metrics))
    return root / name


def test_runs_references_and_oracle_side_by_side(tmp_path: Path):
    console = Console(record=True, width=150)
    show_runs([write_run(tmp_path, "mean", 0.61), write_run(tmp_path, "din", 0.625)], console)
    rows = {line.split()[0]: line for line in console.export_text().splitlines() if len(line.split()) > 2}
    assert "0.6100" in rows["mean"]
    assert "0.6250" in rows["din"]
    assert "–" in rows["din"]
    assert "0.5500" in rows["item"]
    assert "0.9900" in rows["oracle"]


def test_refused(tmp_path: Path):
    a, b = write_run(tmp_path, "a", 0.6), write_run(tmp_path, "b", 0.6, requests=6)
    with pytest.raises(UserError, match="different requests"):
        show_runs([a, b])
    with pytest.raises(UserError, match="ranker evaluate"):
        show_runs([a, tmp_path / "c"])


def test_no_number_is_cut_on_a_narrow_terminal(tmp_path: Path):
    console = Console(record=True, width=80)
    show_runs([write_run(tmp_path, "a_run_with_a_name_of_great_length", 0.61234)], console)
    text = console.export_text()
    assert "…" not in text
    assert "0.6123" in text
