"""A batch that would ruin the model changes nothing: it ends the run or is skipped, told and kept either way."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.batch import RequestBatch, from_tensors
from features.errors import UserError
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.run import Run
from ranker.training import learner
from ranker.training.checkpoint import position_of
from ranker.training.source import ReadWhenAsked
from ranker.training.trainer import Trainer, train

ConfigOf = Callable[..., TrainConfig]
OPTIONS = ("training.epochs=1", "training.validation_split=null", "training.checkpoint_every=1", "training.max_steps=6")
SKIP = "training.divergence={policy: skip, max_skipped: 2}"


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the losses of some steps, counted from 1, something else."""

    def poison(*steps: int, loss: float = float("nan")) -> None:
        step, losses = Trainer.step, learner.esmm_loss
        now = [0]

        def counted(self: Trainer, *rest: object) -> None:
            now[0] = self.position.step + 1
            step(self, *rest)  # type: ignore[arg-type]

        def wrong(logits: Tensor, labels: Tensor) -> Tensor:
            right = losses(logits, labels)
            # the mean over candidates of two tasks is to be `loss`
            return right * 0 + loss / 2 * labels.size(0) if now[0] in steps else right

        monkeypatch.setattr(Trainer, "step", counted)
        monkeypatch.setattr(learner, "esmm_loss", wrong)

    return poison


def test_it_ends_the_run(config_of: ConfigOf, tmp_path: Path, poisoned: Callable[..., None]):
    poisoned(4)
    run = tmp_path / "run"
    kept = re.escape(str(run / "diverged"))
    with pytest.raises(UserError, match=rf"^step 4: the loss is nan; lower .* nothing was updated by it; .*{kept}$"):
        train(config_of(*OPTIONS), run)
    assert [path.name for path in (run / "diverged").iterdir()] == ["step-00000004-batch-00000004-rank-0.pt"]
    assert Run(run).checkpoints()[-1].name == "step-00000003"


def test_it_is_skipped_and_changes_nothing(
    config_of: ConfigOf, tmp_path: Path, poisoned: Callable[..., None],
    read_checkpoint: Callable[[Path], dict[str, Tensor]], capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    poisoned(3, 5)
    run = tmp_path / "run"
    train(config_of(*OPTIONS, SKIP, "training.keep_checkpoints=9"), run)
    said = capsys.readouterr().err
    assert "WARNING: step 3: the loss is nan; the batch is skipped, 1 of at most 2; kept in" in said
    assert "WARNING: step 5: the loss is nan; the batch is skipped, 2 of at most 2; kept in" in said
    states = [read_checkpoint(path) for path in Run(run).checkpoints()]
    for number, (before, after) in enumerate(pairwise(states), 2):
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (number in (3, 5))
    assert position_of(Run(run).checkpoints()[-1]).skipped == 2


def test_not_more_than_some_are_skipped(config_of: ConfigOf, tmp_path: Path, poisoned: Callable[..., None]):
    """A run that goes on counts those before."""
    poisoned(2, 3, 5)
    run = tmp_path / "run"
    train(config_of(*OPTIONS, SKIP, "training.max_steps=4"), run)
    with pytest.raises(UserError, match=r"^step 5: .*as many as training.divergence.max_skipped \(2\) were skipped"):
        train(config_of(*OPTIONS, SKIP), run, resume=True)


def test_an_exploding_loss(config_of: ConfigOf, tmp_path: Path, poisoned: Callable[..., None]):
    poisoned(2, loss=50.0)
    train(config_of(*OPTIONS), tmp_path / "any")
    poisoned(2, loss=50.0)
    with pytest.raises(UserError, match=r"^step 2: the loss is 50, more than training.divergence.max_loss \(20\); "):
        train(config_of(*OPTIONS, "training.divergence.max_loss=20"), tmp_path / "limited")


def test_the_batch_that_is_kept_is_the_batch(
    config_of: ConfigOf, tmp_path: Path, poisoned: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    poisoned(1)
    seen: list[RequestBatch] = []
    take = ReadWhenAsked.take

    def watched(self: ReadWhenAsked) -> RequestBatch:
        seen.append(take(self))
        return seen[-1]

    config, run = config_of(*OPTIONS), tmp_path / "run"
    monkeypatch.setattr(ReadWhenAsked, "take", watched)
    with pytest.raises(UserError, match="the loss is nan"):
        train(config, run)
    tensors = torch.load(run / "diverged" / "step-00000001-batch-00000001-rank-0.pt", weights_only=True)
    kept = from_tensors(resolve(config.features, Run(run).dataset().manifest), tensors)
    for name in RequestBatch._fields:
        ours, theirs = getattr(kept, name), getattr(seen[0], name)
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs), name
        else:
            assert ours.keys() == theirs.keys()
            assert torch.equal(ours.values(), theirs.values())
            assert torch.equal(ours.lengths(), theirs.lengths())
