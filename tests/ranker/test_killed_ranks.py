"""A rank that is killed costs nothing but time: the others end, all start again, and the numbers are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from ranker.run import Run
from tests.ranker.killed_ranks import Kill, differences, run_ranks

OPTIONS = (
    "loader.requests=128", "loader.drop_item=0.2", "model.tower.dropout=0.3", "training.epochs=1",
    "training.checkpoint_every=3", "training.validate_every=5", "optimizer.schedule={decay: cosine}",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(once: Callable[..., Path], config_file: Path) -> Path:
    return once("undisturbed", lambda out: run_ranks(config_file, out, OPTIONS))


@pytest.mark.parametrize("kill", [Kill(1, 7, "step"), Kill(0, 4, "checkpoint")], ids=str)
def test_a_killed_rank(
    kill: Kill,
    undisturbed: Path,
    config_file: Path,
    tmp_path: Path,
    read_checkpoint: Callable[[Path], dict[str, Tensor]],
):
    said = run_ranks(config_file, tmp_path / "run", OPTIONS, kill)
    assert re.search(r"exitcode\s*: -9|Signal 9", said)
    # step 4 ends before the checkpoint of step 5, which is never whole: on from the one before
    assert "resumed from" in said
    assert ("at step 6" if kill.step == 7 else "at step 3") in said
    last, expected = (Run(root).checkpoints()[-1] for root in (tmp_path / "run", undisturbed))
    assert last.name == expected.name
    assert differences(read_checkpoint(last), read_checkpoint(expected)) == []


def test_two_agents_train_together_and_survive_a_kill(
    undisturbed: Path, config_file: Path, tmp_path: Path, read_checkpoint: Callable[[Path], dict[str, Tensor]]
):
    """As two machines with a rank each: the agent whose rank lives is told to start it again too."""
    said = run_ranks(config_file, tmp_path / "run", OPTIONS, Kill(1, 4, "step"), agents=2)
    assert (tmp_path / "run.killed").exists()
    assert said.count("resumed from") == 1
    assert Run(tmp_path / "run").info["ranks"] == 2
    last, expected = (Run(root).checkpoints()[-1] for root in (tmp_path / "run", undisturbed))
    assert last.name == expected.name
    assert differences(read_checkpoint(last), read_checkpoint(expected)) == []
