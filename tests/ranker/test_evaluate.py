"""`ranker evaluate`: metrics.json holds what the scores say, on any number of ranks, beside what they must beat."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from features.dataset import Dataset
from features.errors import UserError
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.evaluate import evaluate, main, restore
from ranker.evaluation.metrics import HISTORY_EDGES, Predictions
from ranker.evaluation.predict import predict, scoring_loader, selection_of
from ranker.evaluation.stored_predictions import read_predictions
from ranker.ranks import join_ranks
from ranker.run import Run
from ranker.training import checkpoint

ConfigOf = Callable[..., TrainConfig]
METRICS = {"auc", "uauc", "wuauc", "logloss", "ne", "calibration"}


@pytest.fixture(scope="module")
def metrics(trained: Path) -> dict[str, Any]:
    return json.loads((trained / "metrics.json").read_text())


@pytest.fixture(scope="module")
def predictions(trained: Path) -> Predictions:
    """The run's scores of its test split, by hand."""
    run = Run(trained)
    data, config = run.dataset(), run.config
    with join_ranks("cpu", 1) as ranks:
        selection = selection_of(config, data, resolve(config.features, data.manifest))
        found = predict(restore(run, ranks), scoring_loader(config, data, "test", selection, ranks), config, ranks)
    assert found is not None
    return found


def test_layout(metrics: dict[str, Any], dataset: Path):
    tasks = {"ctr", "ctcvr", "cvr"}
    counted = Dataset(dataset).manifest.splits["test"]
    assert metrics.keys() == {
        "split", "requests", "impressions", "users", "unknown_items", *tasks, "by_history_length", "references",
        "oracle",
    }  # fmt: skip
    assert metrics["split"] == "test"
    assert (metrics["requests"], metrics["impressions"], metrics["users"]) == (
        counted.requests, counted.impressions, counted.users,
    )  # fmt: skip
    for task in tasks:
        assert metrics[task].keys() == METRICS
    buckets = metrics["by_history_length"]
    assert [(b["min"], b["max"]) for b in buckets] == [*zip(HISTORY_EDGES, [*HISTORY_EDGES[1:], None], strict=True)]
    assert sum(b["impressions"] for b in buckets) == counted.impressions
    assert all({"min", "max", "impressions", *tasks} <= b.keys() for b in buckets)
    assert metrics["references"].keys() == {"constant", "item_rate", "user_item_logit"}


def test_metrics_are_those_of_the_scores(metrics: dict[str, Any], predictions: Predictions):
    click, p = predictions.click, predictions.p_ctr
    assert metrics["ctr"]["auc"] == pytest.approx(roc_auc_score(click, p), abs=1e-12)
    assert metrics["ctr"]["logloss"] == pytest.approx(log_loss(click, p), abs=1e-12)
    assert metrics["ctr"]["calibration"] == pytest.approx(p.sum() / click.sum(), abs=1e-12)
    constant = np.full(len(click), click.mean(dtype=np.float64))
    assert metrics["ctr"]["ne"] == pytest.approx(log_loss(click, p) / log_loss(click, constant), abs=1e-12)
    both = [u for u in np.unique(predictions.user) if 0 < click[predictions.user == u].mean() < 1]
    by_user = [roc_auc_score(click[predictions.user == u], p[predictions.user == u]) for u in both]
    assert metrics["ctr"]["uauc"] == pytest.approx(np.mean(by_user), abs=1e-12)
    assert predictions.conversion is not None
    assert predictions.p_cvr is not None
    assert predictions.p_ctcvr is not None
    clicked = click == 1
    assert metrics["cvr"]["auc"] == pytest.approx(
        roc_auc_score(predictions.conversion[clicked], predictions.p_cvr[clicked]), abs=1e-12
    )
    assert metrics["ctcvr"]["auc"] == pytest.approx(
        roc_auc_score(predictions.conversion, predictions.p_ctcvr), abs=1e-12
    )
    assert predictions.oracle_click is not None
    assert metrics["oracle"]["ctr"]["auc"] == pytest.approx(roc_auc_score(click, predictions.oracle_click), abs=1e-12)


def test_two_ranks_measure_as_one(trained: Path, tmp_path: Path, metrics: dict[str, Any]):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "metrics.json").unlink()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "ranker.evaluate", str(run),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((run / "metrics.json").read_text())
    assert flat(found) == pytest.approx(flat(metrics), abs=1e-12, nan_ok=True)


def flat(value: Any, path: str = "") -> dict[str, float]:
    """Numbers of nested JSON by their path; null as NaN."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{path}.{name}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{path}[{i}]").items()}
    return {} if isinstance(value, str) else {path: float("nan") if value is None else value}


def test_the_best_checkpoint_is_measured(trained: Path, tmp_path: Path, metrics: dict[str, Any]):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    last = Run(run).checkpoints()[-1]
    other = next(path for path in Run(run).checkpoints() if path != Run(run).best())
    position = checkpoint.position_of(last)
    assert position.best_step is not None
    position.best_step = int(other.name.removeprefix("step-"))
    (last / "position.json").write_text(position.model_dump_json())
    report = evaluate(run)
    assert report is not None
    assert report.model["ctr"].auc != metrics["ctr"]["auc"]


def test_unknown_items_are_counted(config_of: ConfigOf, gaps: Path, tmp_path: Path):
    from ranker.training.trainer import train

    features = "features={request: [user], candidate: [item], dense: [], sequence: [item], event: []}"
    train(config_of(f"dataset={gaps}", features, "training.max_steps=2"), tmp_path / "run")
    report = evaluate(tmp_path / "run")
    assert report is not None
    content = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert content["unknown_items"] == 9
    assert content["impressions"] == 27 + 9
    assert "oracle" not in content  # these logs hold no true probabilities
    assert content["ctr"]["logloss"] is not None


def test_another_split(trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    report = evaluate(run, "valid")
    assert report is not None
    assert report.split == "valid"
    best = checkpoint.position_of(Run(run).checkpoints()[-1]).best
    assert report.model["ctr"].auc == pytest.approx(best, abs=1e-12)  # what training saw


def test_frozen_histories(trained: Path, tmp_path: Path):
    """Other scores of the same impressions, in a file of their own. Training requests: of these a user has many."""
    run = shutil.copytree(trained, tmp_path / "run")
    evaluate(run, "train")
    evaluate(run, "train", frozen=True)
    live, frozen = (json.loads((run / name).read_text()) for name in ("metrics.json", "metrics-frozen.json"))
    assert frozen["impressions"] == live["impressions"]
    assert frozen["references"] == live["references"]
    assert frozen["ctr"]["logloss"] != live["ctr"]["logloss"]


def test_predictions_are_kept_where_asked_for(trained: Path, tmp_path: Path, predictions: Predictions):
    run = shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match=r"write it with `ranker evaluate .* --predictions`"):
        read_predictions(run / "predictions.parquet")
    evaluate(run, keep_predictions=True)
    found = read_predictions(run / "predictions.parquet")
    assert found.columns().keys() == predictions.columns().keys()
    for name, column in predictions.columns().items():
        np.testing.assert_array_equal(found.columns()[name], column)
        assert found.columns()[name].dtype == column.dtype


def test_a_diverged_model_is_refused(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(run: Run, ranks: Any) -> Any:
        model = restore(run, ranks)
        with torch.no_grad():
            next(model.dense.parameters() if hasattr(model, "dense") else model.module.dense.parameters()).fill_(np.nan)
        return model

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    monkeypatch.setattr("ranker.evaluate.restore", broken)
    with pytest.raises(UserError, match="scores are not finite: training diverged"):
        evaluate(run)


def test_the_command_reports_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
