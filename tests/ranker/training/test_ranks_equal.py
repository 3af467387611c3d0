"""Two ranks are one trainer: the same losses and tables from the same global batches, one end, one error.

What needs two processes is done once, by this file as a program (:func:`scenarios`); the tests read the runs it leaves.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from features.config_file import load_config
from features.dataset import Dataset
from features.errors import UserError
from ranker.config import TrainConfig
from ranker.evaluation.predict import selection_of
from ranker.run import Run
from ranker.towers import esmm_loss
from ranker.training import checkpoint, clock, learner
from ranker.training.trainer import train
from tests.ranker.started_ranks import keep_one_process_group, run_ranks_to_the_end

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]
Scalars = Callable[[Path], dict[str, dict[int, float]]]

EVERY_STEP = ("training.log_every=1", "training.validation_split=null", "training.epochs=1")
# without dropout, whose mask is each rank's own; with ids dropped, which each shard drops alike
FROM_ONE = (
    "loader.shards=2", "loader.requests=128", "loader.drop_item=0.2", "training.checkpoint_every=1",
    "training.keep_checkpoints=99", "model.long=[{type: mean}, {type: target_attention}]", *EVERY_STEP,
)  # fmt: skip
AHEAD = ("training.read_ahead=true", "training.asynchronous_checkpoints=true")
PARTS = ("training.accumulate=2", "training.divergence.policy=skip")
UNEVEN = ("loader.requests=3", "training.epochs=2")
ITEMS_ONLY = "features={request: [user], candidate: [item], dense: [], sequence: [item], event: []}"
MORE_RANKS = (
    "loader.requests=128",
    "training.checkpoint_every=3",
    "training.epochs=2",
    "training.validation_split=null",
)
REFUSED = {
    "planner": ("tables.pooled_sharding=[row_wise]",),
    "label": ("tasks.click=clicked",),
    "exists": (),
    "diverged": ("optimizer.lr=1e30",),
    "too few shards": ("loader.shards=1",),
}


@contextmanager
def ruined_at(step: int) -> Generator[None]:
    """The second batch of a step has no finite loss, and is skipped."""
    losses, batches = esmm_loss, itertools.count()

    def ruined(logits: Tensor, labels: Tensor) -> Tensor:
        return losses(logits, labels) * (float("nan") if next(batches) == 2 * (step - 2) + 1 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "esmm_loss", ruined)
        yield


def scenarios(config: Path, gaps: Path, out: Path) -> None:
    """What each of two ranks runs, in one process group."""

    def config_of(*options: str) -> TrainConfig:
        return load_config(config, TrainConfig, options)

    keep_one_process_group()
    train(config_of(*FROM_ONE), out / "two", resume=True)
    train(config_of(*FROM_ONE, *AHEAD), out / "ahead", resume=True)
    with ruined_at(3):
        train(config_of(*FROM_ONE, *PARTS), out / "parts of two", resume=True)
    train(config_of(f"dataset={gaps}", ITEMS_ONLY, *UNEVEN), out / "uneven")
    train(config_of(*MORE_RANKS), out / "more", resume=True)
    for name, options in REFUSED.items():
        root = out / "two" if name == "exists" else out / name
        try:
            train(config_of(*options), root)
        except UserError as error:
            (out / f"{name}.{os.environ['RANK']}").write_text(str(error))
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def runs(once: Callable[..., Path], config_of: ConfigOf, config_file: Path, gaps: Path) -> Path:
    """Runs of one rank and of two that start from the same checkpoint, and what else two ranks do."""

    def make(out: Path) -> None:
        out.mkdir()
        train(config_of(*FROM_ONE, "training.max_steps=1"), out / "one")
        for name in ("two", "ahead", "parts of one", "parts of two"):
            shutil.copytree(out / "one", out / name)
        train(config_of(*FROM_ONE), out / "one", resume=True)
        with ruined_at(3):
            train(config_of(*FROM_ONE, *PARTS), out / "parts of one", resume=True)
        train(config_of(*MORE_RANKS, "training.max_steps=5"), out / "more")
        run_ranks_to_the_end(2, "tests.ranker.training.test_ranks_equal", str(config_file), str(gaps), str(out))

    return once("ranks", make)


def test_losses_are_those_of_one_rank(runs: Path, scalars: Scalars):
    one, two = scalars(runs / "one"), scalars(runs / "two")
    assert len(one["loss/ctr"]) >= 7
    for tag in ("loss/ctr", "loss/ctcvr", "train/ne", "train/gradient_norm"):
        assert one[tag].keys() == two[tag].keys()
        np.testing.assert_allclose(list(two[tag].values()), list(one[tag].values()), rtol=1e-5, err_msg=tag)


def test_waiting_for_what_ranks_exchange_is_a_part_of_the_step(runs: Path, scalars: Scalars):
    one, two, ahead = (scalars(runs / run) for run in ("one", "two", "ahead"))
    for found in (two, ahead):
        for step in list(one["loss/ctr"])[1:]:  # the first is of one rank in all
            parts = {part: found[f"time_ms/{part}"][step] for part in clock.PARTS}
            assert min(parts.values()) > 0
            assert sum(parts.values()) < 1000 / found["speed/steps_per_s"][step]
    assert set(one["time_ms/communication"].values()) == {0}


def test_parameters_and_optimisers_are_those_of_one_rank(runs: Path, read_checkpoint: Read):
    one, two = (Run(runs / name).checkpoints() for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    for path, other in zip(one[1:], two[1:], strict=True):
        expected, found = read_checkpoint(path), read_checkpoint(other)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=f"{path.name}{name}")
    positions = [checkpoint.position_of(paths[-1]) for paths in (one, two)]
    assert positions[0] == positions[1]


def test_reading_ahead_and_writing_behind_change_nothing(runs: Path, read_checkpoint: Read):
    plain, ahead = (Run(runs / name).checkpoints() for name in ("two", "ahead"))
    assert [path.name for path in plain] == [path.name for path in ahead]
    for path, other in zip(plain, ahead, strict=True):
        expected, found = read_checkpoint(path), read_checkpoint(other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items()), path.name


def test_steps_of_several_batches_are_those_of_one_rank(runs: Path, read_checkpoint: Read):
    """One of them with its last batch skipped, which was to average the gradient over the ranks."""
    one, two = (Run(runs / f"parts of {count}").checkpoints() for count in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert checkpoint.position_of(two[-1]).skipped == 1
    assert checkpoint.position_of(two[-1]) == checkpoint.position_of(one[-1])
    for path, other in zip(one[1:], two[1:], strict=True):
        expected, found = read_checkpoint(path), read_checkpoint(other)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=f"{path.name}{name}")


def test_a_rank_that_runs_out_early_goes_along(runs: Path, gaps: Path, config_of: ConfigOf):
    data = Dataset(gaps)
    requests = [
        sum(end - start for s, (start, end) in p.requests.items() if s == "train") for p in data.manifest.partitions
    ]
    batches = [sum(max(1, round(requests[p] / 3)) for p in (r, r + 2) if requests[p]) for r in (0, 1)]
    assert batches[0] != batches[1]
    last = Run(runs / "uneven").checkpoints()[-1]
    assert checkpoint.position_of(last).epoch == 2
    assert last.name == f"step-{2 * max(batches):08d}"


def test_more_ranks_than_shards_go_on_with_the_epoch(runs: Path, config_of: ConfigOf, dataset: Path):
    """One rank did 5 steps of its epoch; two take up the same share of it, and end with the last epoch."""
    run = Run(runs / "more")
    position = checkpoint.position_of(run.checkpoints()[-1])
    assert (position.shards, position.epoch, position.batch_in_epoch) == (2, 2, 0)
    data = Dataset(dataset)
    from features.selection import resolve
    from ranker.training.trainer import Loader

    selection = selection_of(run.config, data, resolve(run.config.features, data.manifest))

    def steps(shards: int) -> int:
        config = run.config.loader.model_copy(update={"shards": shards})
        return Loader(data, ("train",), selection, config, training=True).steps()

    assert position.step == 5 + 2 * steps(2) - 5 * steps(2) // steps(1)


def test_fewer_ranks_go_on_where_more_were(
    runs: Path, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read, scalars: Scalars
):
    """Saved by two ranks, gone on by one: as if two had gone on."""
    run = tmp_path / "run"
    shutil.copytree(runs / "two", run)
    for path in Run(run).checkpoints()[4:]:
        shutil.rmtree(path)
    train(config_of(*FROM_ONE), run, resume=True)
    found, expected = (read_checkpoint(Run(root).checkpoints()[-1]) for root in (run, runs / "two"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-6, msg=name)


def test_run_json_counts_the_ranks(runs: Path):
    assert Run(runs / "uneven").info["ranks"] == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planner", "tables.pooled_sharding: ['row_wise'] leaves no place for table request_user"),
        ("label", "tasks.click: 'clicked' is not a label"),
        ("exists", "exists; choose another --out"),
        ("diverged", "; lower optimizer.lr or tables.lr"),
        ("too few shards", "loader.shards: 1 shards are too few for 2 ranks"),
    ],
)
def test_both_ranks_end_with_the_error(runs: Path, name: str, message: str):
    for rank in "01":
        assert message in (runs / f"{name}.{rank}").read_text()


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios(*(Path(argument) for argument in sys.argv[1:]))
