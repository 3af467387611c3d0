"""The search tries what the space allows, keeps the best, and goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.config_file import load_config
from features.errors import UserError
from ranker import tune as tuning
from ranker.config import TrainConfig
from ranker.tune import Dimension, parse_space, tune
from tests.ranker.compare.conftest import InThisProcess

SPACE = ["optimizer.lr=1e-3..1e-1 log", "model.short.length=2,5", "model.short.hidden=[4],[8]"]
BUDGET = ["training.max_steps=3", "training.epochs=1"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    """Trials run in this process."""
    launcher = InThisProcess()
    monkeypatch.setattr(tuning, "ChildProcesses", lambda threads: launcher)
    return launcher


def test_a_search_is_gone_on_with_and_its_best_trial_kept(config_file: Path, tmp_path: Path, here: InThisProcess):
    tune(config_file, tmp_path, SPACE, 2, BUDGET)
    best = tune(config_file, tmp_path, SPACE, 3, BUDGET)
    assert [name for name, _ in here.ran] == ["0000", "0001", "0002"]
    assert [p.parent.name for p in tmp_path.glob("trials/*/checkpoints")] != []
    kept = [path.parent for path in tmp_path.glob("trials/*/checkpoints")]
    assert len(kept) == 1
    config, chosen = (load_config(p, TrainConfig) for p in (kept[0] / "config.yaml", tmp_path / "best.yaml"))
    assert config == chosen
    assert best.keys() == {"optimizer.lr", "model.short.length", "model.short.hidden"}
    assert chosen.optimizer.lr == pytest.approx(float(best["optimizer.lr"]))
    assert chosen.model.short is not None
    assert [json.dumps(chosen.model.short.length), json.dumps(chosen.model.short.hidden)] == [
        best["model.short.length"], best["model.short.hidden"],
    ]  # fmt: skip
    trials = [load_config(path, TrainConfig) for path in sorted(tmp_path.glob("trials/*.yaml"))]
    assert len({trial.optimizer.lr for trial in trials}) == 3  # a search that is gone on with draws anew
    assert all(1e-3 <= trial.optimizer.lr <= 1e-1 for trial in trials)
    with pytest.raises(UserError, match="searched with another space or config"):
        tune(config_file, tmp_path, SPACE[:1], 4, BUDGET)


def test_a_trial_that_fails_is_told(config_file: Path, tmp_path: Path, here: InThisProcess):
    """Settings that a config refuses, in every trial."""
    with pytest.raises(UserError, match="no trial ended well"):
        tune(config_file, tmp_path, ["tables.dim=3,5"], 2)
    assert here.ran == []


@given(st.integers(-5, 5), st.integers(1, 5))
def test_ranges_are_whole_where_both_ends_are(low: int, width: int):
    (whole, real) = parse_space([f"a={low}..{low + width}", f"b={low}.0..{low + width}"])
    assert whole == Dimension("a", low, low + width)
    assert (type(whole.low), type(real.low)) == (int, float)


@pytest.mark.parametrize(
    "text", ["a", "a=", "a=2..1", "a=1..1", "a=0..1 log", "a=x..y", "a=true..2", "a=[1", "a=1..2,3..4"]
)
def test_no_space(text: str):
    with pytest.raises(UserError, match="--space"):
        parse_space([text])


def test_no_validation_split(config_file: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"validation_split: None is not in .*; a search is judged by it"):
        tune(config_file, tmp_path, SPACE, 1, ["training.validation_split=null"])
