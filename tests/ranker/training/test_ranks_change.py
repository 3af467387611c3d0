"""A run goes on with another number of ranks, again and again, as if it had always had one; so it is measured."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.config_file import load_config
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.run import Run
from ranker.training import trainer as training
from ranker.training.trainer import train
from tests.ranker.started_ranks import keep_one_process_group, run_ranks_to_the_end

OPTIONS = (
    "loader.shards=4", "loader.requests=32", "training.checkpoint_every=1", "training.keep_checkpoints=99",
    "training.validation_split=null", "training.epochs=9", "model.long=[{type: mean}, {type: target_attention}]",
)  # fmt: skip


def train_or_measure(config: Path, run: Path, steps: str) -> None:
    """One rank of those who go on to `steps`, or measure the run."""
    training.ensure_healthy = lambda device: None
    if steps == "measure":
        evaluate(run)
    else:
        train(load_config(config, TrainConfig, (*OPTIONS, f"training.max_steps={steps}")), run, resume=True)


def train_without_and_with_a_break(config: Path, out: Path) -> None:
    """One rank of those who train two runs alike, but that one stops after three steps, and is resumed."""
    training.ensure_healthy = lambda device: None
    keep_one_process_group()

    def train_to(steps: int, run: str, resume: bool = False) -> None:
        train(load_config(config, TrainConfig, (*OPTIONS, f"training.max_steps={steps}")), out / run, resume=resume)

    train_to(6, "undisturbed")
    train_to(3, "resumed")
    train_to(6, "resumed", resume=True)


def test_three_ranks_resume_to_the_last_bit(
    config_file: Path, tmp_path: Path, read_checkpoint: Callable[[Path], dict[str, Tensor]]
):
    """Sums of three numbers depend on their order, which is to be the same in a process that starts anew."""
    run_ranks_to_the_end(3, "tests.ranker.training.test_ranks_change", str(config_file), str(tmp_path), "break")
    expected, found = (read_checkpoint(Run(tmp_path / name).checkpoints()[-1]) for name in ("undisturbed", "resumed"))
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_two_then_one_then_three(
    config_of: Callable[..., TrainConfig], config_file: Path, tmp_path: Path,
    read_checkpoint: Callable[[Path], dict[str, Tensor]],
):  # fmt: skip
    always, changing = tmp_path / "always", tmp_path / "changing"

    def on(ranks: int, what: str) -> None:
        run_ranks_to_the_end(ranks, "tests.ranker.training.test_ranks_change", str(config_file), str(changing), what)

    train(config_of(*OPTIONS, "training.max_steps=1"), always)  # what a table starts with is each rank's own
    shutil.copytree(always, changing)
    for ranks, steps in ((2, 4), (1, 7), (3, 10)):
        train(config_of(*OPTIONS, f"training.max_steps={steps}"), always, resume=True)
        on(ranks, str(steps))
        last, other = (Run(run).checkpoints()[-1] for run in (always, changing))
        assert last.name == other.name == f"step-{steps:08d}"
        expected, found = read_checkpoint(last), read_checkpoint(other)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=5e-6, msg=f"{ranks} ranks: {name}")
        if ranks > 1:
            on(ranks, "measure")
            by_many, by_one = json.loads((changing / "metrics.json").read_text()), measured(changing)
            for task in ("ctr", "ctcvr", "cvr"):
                for metric, value in by_many[task].items():
                    assert by_one[task][metric] == pytest.approx(value, rel=1e-9), (ranks, task, metric)
            assert by_many["ctr"]["auc"] == pytest.approx(measured(always)["ctr"]["auc"], abs=1e-4)


def measured(run: Path) -> dict[str, dict[str, float]]:
    """A run's metrics by one rank."""
    evaluate(run)
    return json.loads((run / "metrics.json").read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3] == "break":
        train_without_and_with_a_break(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        train_or_measure(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
