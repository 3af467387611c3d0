"""What ``metrics.json`` and the terminal show."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ranker.evaluation.metrics import HISTORY_EDGES, Predictions
from ranker.evaluation.references import Impressions, count_references
from ranker.evaluation.report import METRICS, Report, make_report, metrics_json, print_report, write_metrics

COUNTED = count_references([Impressions(np.arange(4), np.arange(4), np.array([0, 1, 0, 1]), np.array([0, 1, 1, 0]))])


def predictions(rows: int = 200, oracle: bool = False, conversion: bool = True) -> Predictions:
    rng = np.random.default_rng(0)
    p = rng.random(rows)
    return Predictions(
        user=rng.integers(0, 10, rows),
        item=rng.integers(0, 10, rows),
        history_length=rng.integers(0, 100, rows),
        request=np.arange(rows) // 2,
        click=rng.random(rows) < p,
        conversion=rng.random(rows) < 0.5 if conversion else None,
        p_ctr=p,
        p_ctcvr=p / 2 if conversion else None,
        p_cvr=np.full(rows, 0.5) if conversion else None,
        oracle_click=p if oracle else None,
        oracle_conversion=np.full(rows, 0.5) if oracle else None,
    )


def report(rows: int = 200, oracle: bool = False, conversion: bool = True) -> Report:
    some = predictions(rows, oracle, conversion)
    return make_report(some, "test", unknown_items=3, references=COUNTED)


def shown(some: Report) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_report(some, console)
    return console.file.getvalue()


def test_metrics_json_has_the_documented_keys() -> None:
    content = metrics_json(report())
    assert list(content) == [
        *("split", "requests", "impressions", "users", "unknown_items"),
        *("ctr", "ctcvr", "cvr", "by_history_length", "references"),
    ]
    assert (content["split"], content["requests"], content["impressions"], content["users"]) == ("test", 100, 200, 10)
    assert content["unknown_items"] == 3
    for task in ("ctr", "ctcvr", "cvr"):
        assert tuple(content[task]) == METRICS
        assert all(isinstance(value, float) for value in content[task].values())
    assert set(content["references"]) == {"constant", "item_rate", "user_item_logit"}
    assert tuple(content["references"]["item_rate"]["cvr"]) == METRICS
    buckets = content["by_history_length"]
    assert [bucket["min"] for bucket in buckets] == list(HISTORY_EDGES)
    assert [bucket["max"] for bucket in buckets] == [*HISTORY_EDGES[1:], None]
    assert list(buckets[0]) == ["min", "max", "impressions", "ctr", "ctcvr", "cvr"]
    assert sum(bucket["impressions"] for bucket in buckets) == 200


def test_the_oracle_stands_beside_the_model_where_there_is_one() -> None:
    content = metrics_json(report(oracle=True))
    assert content["oracle"]["ctr"] == content["ctr"]  # these predictions are the true probabilities
    assert content["by_history_length"][3]["oracle"]["ctr"] == content["by_history_length"][3]["ctr"]
    assert "oracle" in shown(report(oracle=True))


def test_undefined_metrics_are_null_in_json_and_a_dash_on_the_terminal() -> None:
    some = report(conversion=False)
    content = json.loads(json.dumps(metrics_json(some), allow_nan=False))
    assert content["ctcvr"] == dict.fromkeys(METRICS)
    assert content["by_history_length"][-1]["ctr"] == dict.fromkeys(METRICS)  # no history of 10,000 events
    assert "–" in shown(some)


@pytest.mark.parametrize("oracle", [False, True])
def test_a_split_without_impressions_is_reported_as_such(oracle: bool) -> None:
    some = report(rows=0, oracle=oracle)
    content = metrics_json(some)
    assert (content["requests"], content["impressions"], content["users"]) == (0, 0, 0)
    assert content["ctr"] == dict.fromkeys(METRICS)
    assert ("oracle" in content) == oracle
    assert "0 impressions" in shown(some)


def test_the_tables_fit_80_columns() -> None:
    long = replace(predictions(20_000, oracle=True), history_length=np.arange(20_000))
    lines = shown(make_report(long, "test", references=COUNTED)).splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_the_tables_show_model_references_and_history_lengths() -> None:
    some = report()
    text = shown(some)
    for expected in (
        "CTR",
        "CTCVR",
        "CVR",
        "model",
        "constant",
        "item rate",
        "user + item",
        "3 impressions of unknown",
    ):
        assert expected in text
    assert f"{some.model['ctr'].auc:.4f}" in text
    for interval in ("1–9", "10–29", "30–99"):
        assert interval in text
    assert "≥ 10,000" not in text  # no history is so long


def test_writing_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.json"
    write_metrics(report(conversion=False), path)
    write_metrics(report(), path)
    assert json.loads(path.read_text()) == metrics_json(report())
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        write_metrics(report(), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
