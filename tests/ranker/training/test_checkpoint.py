"""A run that was cut short goes on to the same numbers, to the last bit."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.errors import UserError
from ranker.config import TrainConfig
from ranker.ranks import join_ranks
from ranker.run import Run, RunError
from ranker.training import checkpoint
from ranker.training.trainer import Trainer, train

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]
Scalars = Callable[[Path], dict[str, dict[int, float]]]

# about seven steps an epoch, with everything that is random (shuffling, ids dropped, dropout), and rates that change
OPTIONS = (
    "loader.requests=256", "model.tower.dropout=0.3", "loader.drop_item=0.2", "optimizer.weight_decay=0.01",
    "training.epochs=2", "training.validate_every=4", "training.checkpoint_every=3", "training.keep_checkpoints=9",
    "training.log_every=1", "optimizer.schedule={warmup_steps: 3, decay: cosine}",
    "tables.schedule={decay: linear, final: 0.1}",
)  # fmt: skip


class Cut(Exception):
    """The machine went away."""


def cut_at(step: int, monkeypatch: pytest.MonkeyPatch, method: str = "step") -> None:
    whole = getattr(Trainer, method)

    def cut(self: Trainer, *arguments: object) -> object:
        if self.position.step == step:
            raise Cut
        return whole(self, *arguments)

    monkeypatch.setattr(Trainer, method, cut)


@pytest.fixture(scope="module")
def straight(once: Callable[..., Path], config_of: ConfigOf) -> Path:
    """The run that was never cut."""
    return once("straight", lambda out: train(config_of(*OPTIONS), out))


@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_cut_run_goes_on_to_the_same_numbers(
    step: int, straight: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read, scalars: Scalars
):
    run, config = tmp_path / "run", config_of(*OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(step, patch)
        with pytest.raises(Cut):
            train(config, run)
    left = [path.name for path in Run(run).checkpoints()]
    assert left == [
        f"step-{n:08d}" for n in (3, 4, 6, 8, 9) if n <= step and (run / "checkpoints" / f"step-{n:08d}").exists()
    ]
    train(config, run, resume=True)

    last, expected = Run(run).checkpoints()[-1], Run(straight).checkpoints()[-1]
    assert last.name == expected.name
    found, wanted = read_checkpoint(last), read_checkpoint(expected)
    assert found.keys() == wanted.keys()
    assert any("exp_avg" in name for name in wanted)
    assert any("momentum" in name for name in wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    assert checkpoint.position_of(last) == checkpoint.position_of(expected)
    here, there = scalars(run), scalars(straight)
    for tag in ("loss/ctr", "train/gradient_norm", "valid/ctr/auc", "valid/ctcvr/logloss"):
        assert here[tag] == there[tag], tag


def test_a_longer_run_is_one_run(config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read):
    """Where rates do not fall to the end of the run, wherever that is."""
    constant = (*OPTIONS, "optimizer.schedule.decay=none", "tables.schedule.decay=none")
    train(config_of(*constant), tmp_path / "whole")
    shorter = config_of(*constant, "training.epochs=1")
    train(shorter, tmp_path / "run")
    train(config_of(*constant), tmp_path / "run", resume=True)
    assert Run(tmp_path / "run").config.training.epochs == 2  # the config that made it, as it is now
    found = read_checkpoint(Run(tmp_path / "run").checkpoints()[-1])
    for name, value in read_checkpoint(Run(tmp_path / "whole").checkpoints()[-1]).items():
        assert torch.equal(found[name], value), name


def test_a_finished_run_stays_as_it_is(straight: Path, config_of: ConfigOf, tmp_path: Path, scalars: Scalars):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    train(config_of(*OPTIONS), run, resume=True)
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert scalars(run)["loss/ctr"] == scalars(straight)["loss/ctr"]


def test_no_half_checkpoint_is_taken(config_of: ConfigOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, config = tmp_path / "run", config_of(*OPTIONS)
    with monkeypatch.context() as patch:
        write = checkpoint.dcp.save

        def cut(state: object, checkpoint_id: Path) -> None:
            write(state, checkpoint_id=checkpoint_id)
            if "00000006" in checkpoint_id.name:
                raise Cut

        patch.setattr(checkpoint.dcp, "save", cut)
        with pytest.raises(Cut):
            train(config, run)
    partial = run / "checkpoints" / ".step-00000006.partial"
    assert partial.is_dir()
    assert Run(run).checkpoints()[-1].name < "step-00000006"
    train(config, run, resume=True)
    assert not partial.exists()
    assert Run(run).checkpoints()[-1].name >= "step-00000012"


def test_a_removal_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = checkpoint.path_of(tmp_path, 3)
    whole.mkdir(parents=True)
    (whole / "a").touch()

    def cut(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            raise Cut

    monkeypatch.setattr(checkpoint.shutil, "rmtree", cut)
    with pytest.raises(Cut):
        checkpoint.remove(whole)
    assert checkpoint.all_of(tmp_path) == []


CHANGED = {
    "model.tower.hidden=[8]": r"model.tower.hidden: \[8\], but .* was trained with \[16\]",
    "model.short=null": "model.short",
    "tables.dim=16": "tables.dim: 16, but",
    "tables.lr=0.5": "tables.lr",
    "features.request=[user]": "features.request",
    "tasks.conversion=null": "tasks.conversion",
    "seed=1": "seed",
    "loader.requests=8": "loader.requests",
    "loader.drop_item=0": "loader.drop_item",
    "training.splits=[train, valid]": "training.splits",
    "training.monitor=ne": "training.monitor",
}


@pytest.mark.parametrize("option", CHANGED)
def test_another_model_is_refused(trained: Path, config_of: ConfigOf, option: str):
    before = (trained / "config.yaml").read_text()
    with pytest.raises(
        RunError, match=f"^{CHANGED[option]}.*resume with the run's own config.yaml, or start a new run"
    ):
        train(config_of("training.epochs=4", option), trained, resume=True)
    assert (trained / "config.yaml").read_text() == before


def test_what_does_not_change_the_model_may_change(trained: Path, config_of: ConfigOf):
    allowed = ("optimizer.lr=0.5", "loader.workers=2", "loader.prefetch=9", "tables.pooled_sharding=[table_wise]")
    run = Run(trained)
    run.go_on_with(config_of("training.epochs=9", "training.patience=3", "training.threads=2", *allowed))
    assert run.config.training.epochs == 9


def test_resuming_what_is_not_there_yet_starts_it(
    config_of: ConfigOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The same command again and again is what schedulers can do."""
    config = config_of("training.max_steps=2")
    (tmp_path / ".run.new").mkdir()  # of a process that was killed as it made the folder
    (tmp_path / ".run.new" / "moments.json").write_text("{")
    train(config, tmp_path / "run", resume=True)
    assert "no run to resume; a new one starts" in capsys.readouterr().err
    train(config, tmp_path / "run", resume=True)
    assert [path.name for path in Run(tmp_path / "run").checkpoints()] == ["step-00000002"]
    assert not (tmp_path / ".run.new").exists()


def test_a_folder_that_is_no_run_is_not_resumed(config_of: ConfigOf, tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(RunError, match=r"no run.json; not a run folder"):
        train(config_of(), tmp_path, resume=True)


def first_line(path: Path) -> str:
    return path.read_text().splitlines(keepends=True)[0]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "__0_0.distcp is not what was written": lambda path: os.truncate(path / "__0_0.distcp", 100),
    "position.json is not what was written": lambda path: (path / "position.json").write_text("{"),
    ".metadata is missing": lambda path: (path / ".metadata").unlink(),
    "SHA256SUMS is missing": lambda path: (path / "SHA256SUMS").unlink(),
    "SHA256SUMS is cut": lambda path: os.truncate(path / "SHA256SUMS", 70),
    "SHA256SUMS is cut ": lambda path: (path / "SHA256SUMS").write_text(first_line(path / "SHA256SUMS")),
}


@pytest.mark.parametrize("wrong", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    wrong: str,
    straight: Path,
    config_of: ConfigOf,
    tmp_path: Path,
    read_checkpoint: Read,
    capsys: pytest.CaptureFixture[str],
):
    run = shutil.copytree(straight, tmp_path / "run")
    *_, before, last = Run(run).checkpoints()
    DAMAGES[wrong](last)
    wrong = wrong.strip()
    told = f"{last}: {re.escape(wrong)}; `ranker train … --resume` sets it aside"
    with join_ranks("cpu") as ranks, pytest.raises(UserError, match=told):
        checkpoint.check(last, ranks)
    train(config_of(*OPTIONS), run, resume=True)
    said = capsys.readouterr().err
    assert f"WARNING: {last}: {wrong}; kept as damaged-{last.name}, the checkpoint before it is taken" in said
    assert f"resumed from {before}" in said
    assert (last.parent / f"damaged-{last.name}").is_dir()
    found, wanted = read_checkpoint(last), read_checkpoint(Run(straight).checkpoints()[-1])
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_one_changed_bit_is_enough(straight: Path, tmp_path: Path):
    path = shutil.copytree(Run(straight).checkpoints()[-1], tmp_path / "step")
    with join_ranks("cpu") as ranks:
        assert checkpoint.fault(path, ranks) is None
        data = bytearray((path / "__0_0.distcp").read_bytes())
        data[len(data) // 2] ^= 1
        (path / "__0_0.distcp").write_bytes(data)
        assert checkpoint.fault(path, ranks) == "__0_0.distcp is not what was written"


@pytest.mark.parametrize(("workers", "after"), [(0, 5), (1, 5), (0, 8)])  # at step 8 a validation is due
def test_sigterm_leaves_a_checkpoint(
    workers: int, after: int, straight: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """A scheduler's time is over, and all processes of the job are told so: what was done is kept, the exit code is a
    signal's, the run goes on from there."""
    run, config = tmp_path / "run", config_of(*OPTIONS, f"loader.workers={workers}")
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def ended(self: Trainer, *arguments: object) -> None:
            step(self, *arguments)  # type: ignore[arg-type]
            if self.position.step == after - 1:
                children = [child.pid for child in multiprocessing.active_children()]
                assert len(children) == workers
                for process in (*children, os.getpid()):
                    os.kill(process, signal.SIGTERM)

        patch.setattr(Trainer, "step", ended)
        with pytest.raises(SystemExit) as exit:
            train(config, run)
    assert exit.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert Run(run).checkpoints()[-1].name == f"step-{after:08d}"  # the step that was on its way is done
    assert f"told to end (SIGTERM) after step {after}; `--resume` goes on from there" in capsys.readouterr().err
    train(config, run, resume=True)
    last, expected = (Run(root).checkpoints()[-1] for root in (run, straight))
    found, wanted = read_checkpoint(last), read_checkpoint(expected)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert checkpoint.position_of(last) == checkpoint.position_of(expected)


def test_sigterm_at_the_last_step_changes_nothing(straight: Path, config_of: ConfigOf, tmp_path: Path):
    """What is done is done: the run ends well."""
    steps = checkpoint.position_of(Run(straight).checkpoints()[-1]).step
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step

        def ended(self: Trainer, *arguments: object) -> None:
            if self.position.step == steps - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            step(self, *arguments)  # type: ignore[arg-type]

        patch.setattr(Trainer, "step", ended)
        train(config_of(*OPTIONS), tmp_path / "run")
    last, expected = (Run(root).checkpoints()[-1] for root in (tmp_path / "run", straight))
    assert checkpoint.position_of(last) == checkpoint.position_of(expected)
