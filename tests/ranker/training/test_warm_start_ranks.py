"""A run starts from another on more ranks or fewer, with tables cut otherwise: the same rows, the same refusals.

What needs two processes is done once, by this file as a program (:func:`scenarios`); the tests read the runs it leaves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.config_file import load_config
from features.dataset import Dataset
from features.errors import UserError
from ranker.config import TrainConfig, with_start
from ranker.run import Run
from ranker.training.trainer import train
from tests.ranker.started_ranks import keep_one_process_group, run_ranks_to_the_end
from tests.ranker.training.next_day import check_tables, next_day

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]

# wide enough for the planner to cut columns
OPTIONS = (
    "tables.dims={item: 256, user: 256}", "loader.requests=128", "training.validation_split=null",
    "training.max_steps=4",
)  # fmt: skip
BY_COLUMNS = ("tables.pooled_sharding=[column_wise]", "tables.sequence_sharding=[row_wise]")
WHOLE = ("tables.pooled_sharding=[table_wise]", "tables.sequence_sharding=[table_wise]")
STARTED = ("training.max_steps=0", "warm_start.new_rows=mean")


def scenarios(config: Path, day: Path, out: Path) -> None:
    """What each of two ranks runs, in one process group."""

    def config_of(*options: str) -> TrainConfig:
        return load_config(config, TrainConfig, options)

    keep_one_process_group()
    train(config_of(*OPTIONS, *BY_COLUMNS), out / "two")
    for source, cut, name in (("one", BY_COLUMNS, "one to two"), ("two", WHOLE, "two to two")):
        options = (f"dataset={day}", *OPTIONS, *cut, *STARTED)
        train(config_of(*with_start(options, out / source)), out / name)
    try:
        train(config_of(*with_start((f"dataset={day}", *OPTIONS, "tables.dim=16"), out / "one")), out / "refused")
    except UserError as error:
        (out / f"refused.{os.environ['RANK']}").write_text(str(error))
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def day(once: Callable[..., Path], dataset: Path) -> Path:
    """Numbered anew, with ids that are new and ids that are gone."""
    return once("day_of_ranks", lambda out: next_day(dataset, out, new=5, gone=2, seed=4))


@pytest.fixture(scope="module")
def runs(once: Callable[..., Path], config_of: ConfigOf, config_file: Path, day: Path) -> Path:
    """Runs of one rank and of two, and runs that start from them."""

    def make(out: Path) -> None:
        out.mkdir()
        train(config_of(*OPTIONS, *WHOLE), out / "one")
        program = "tests.ranker.training.test_warm_start_ranks"
        run_ranks_to_the_end(2, program, str(config_file), str(day), str(out))
        options = (f"dataset={day}", *OPTIONS, *WHOLE, *STARTED)
        train(config_of(*with_start(options, out / "two")), out / "two to one")

    return once("started_ranks", make)


@pytest.mark.parametrize("name", ["one to two", "two to one", "two to two"])
def test_rows_are_those_of_their_ids(
    name: str, runs: Path, dataset: Path, day: Path, config_of: ConfigOf, read_checkpoint: Read
):
    before = read_checkpoint(Run(runs / name.split()[0]).best())
    run = Run(runs / name)
    after = read_checkpoint(run.best())
    counts = check_tables(
        before, after, config_of(), Dataset(dataset), Dataset(day), lambda table: table[1:].double().mean(0).float()
    )
    assert counts["request_user"] == (298, 5, 2)
    recorded: dict = run.info["warm_start"]["tables"]  # type: ignore[index]
    assert {table: tuple(rows.values()) for table, rows in recorded.items()} == counts  # each row counted once
    for key in before:
        if ".dense." in key:
            assert torch.equal(after[key], before[key]), key


def test_columns_were_cut(runs: Path, read_checkpoint: Read):
    """Else the sums of row-wise Adagrad would not have been tried where a row has several."""
    for name, parts in (("one", 1), ("two", 2), ("one to two", 2), ("two to one", 1)):
        state = read_checkpoint(Run(runs / name).best())
        key = "tables.candidate.embedding_bags.candidate_item.weight"
        rows = len(state[f".model.{key}"])
        assert len(state[f".optimizer.state.{key}.candidate_item.momentum1"]) == parts * rows


def test_both_ranks_end_with_the_error(runs: Path):
    for rank in "01":
        assert "tables.dim: 16, but" in (runs / f"refused.{rank}").read_text()


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenarios(*(Path(argument) for argument in sys.argv[1:]))
