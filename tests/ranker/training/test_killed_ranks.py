"""A rank that is killed costs nothing but time: the others end, all start again, and the numbers are the same."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from ranker.run import Run
from tests.ranker.training.killed_ranks import Kill, differences, run_ranks

OPTIONS = (
    "loader.requests=128", "loader.drop_item=0.2", "model.tower.dropout=0.3", "training.epochs=1",
    "training.checkpoint_every=3", "training.validate_every=5", "optimizer.schedule={decay: cosine}",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(once: Callable[..., Path], config_file: Path) -> Path:
    return once("undisturbed", lambda out: run_ranks(config_file, out, OPTIONS))


@pytest.mark.parametrize(
    ("kill", "options"),
    [
        (Kill(1, 7, "step"), ()),
        (Kill(0, 4, "checkpoint"), ()),
        (Kill(0, 6, "step"), ("training.asynchronous_checkpoints=true", "training.read_ahead=true")),
    ],
    ids=str,
)
def test_a_killed_rank(
    kill: Kill,
    options: tuple[str, ...],
    undisturbed: Path,
    config_file: Path,
    tmp_path: Path,
    read_checkpoint: Callable[[Path], dict[str, Tensor]],
):
    said = run_ranks(config_file, tmp_path / "run", (*OPTIONS, *options), kill)
    assert re.search(r"exitcode\s*: -9|Signal 9", said)
    # step 4 ends before the checkpoint of step 5, which is never whole: on from the one before; that of step 6 has just
    # begun to be written behind when step 7 ends, and the one before it, of the validation at step 5, is whole
    assert "resumed from" in said
    assert f"at step { {7: 6, 4: 3, 6: 5}[kill.step] }" in said
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
