"""Managed tables of two ranks: each has the ids of its range, and one process reads them all afterwards.

This file is the program of the ranks, which take our refusal of CPUs away.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.config_file import load_config
from features.errors import UserError
from ranker.config import TrainConfig
from ranker.evaluate import evaluate, restore
from ranker.export import export
from ranker.planning.constraints import ShardingError
from ranker.ranks import join_ranks
from ranker.run import Run
from ranker.tables.held_rows import NOBODY, HeldRows
from ranker.training.trainer import train
from tests.ranker.started_ranks import keep_one_process_group, run_ranks_to_the_end
from tests.ranker.tables.managed_tables import TABLES, on_cpus

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]
Scalars = Callable[[Path], dict[str, dict[int, float]]]
OPTIONS = (TABLES, "model.long=[{type: mean}]", "training.log_every=1", "training.checkpoint_every=5")
STEPS = ("training.max_steps=8", "training.keep_checkpoints=9", "loader.drop_item=0.1")


def scenarios(config: Path, dataset: Path, out: Path) -> None:
    """What each of two ranks runs, in one process group."""

    def config_of(*options: str) -> TrainConfig:
        return load_config(config, TrainConfig, (f"dataset={dataset}", *OPTIONS, *STEPS, *options))

    keep_one_process_group()
    with on_cpus():
        train(config_of(), out / "run")
        report = evaluate(out / "run", "valid")
        if report is not None:
            (out / "auc").write_text(str(report.model["ctr"].auc))
        train(config_of("training.max_steps=5"), out / "resumed")
        train(config_of(), out / "resumed", resume=True)
        train(config_of(f"warm_start.run={out / 'run'}", "training.max_steps=0"), out / "next")
        try:
            train(config_of(TABLES.replace("rows: 30", "rows: 3")), out / "few")
        except ShardingError as error:
            (out / "few").write_text(str(error))
        except UserError:
            pass  # the other rank's


@pytest.fixture(scope="module")
def runs(once: Callable[..., Path], config_file: Path, open_ids: Path) -> Path:
    def make(out: Path) -> None:
        out.mkdir()
        run_ranks_to_the_end(2, "tests.ranker.training.test_managed_ranks", str(config_file), str(open_ids), str(out))

    return once("managed ranks", make)


def test_one_process_reads_what_two_ranks_have_taught(runs: Path, tmp_path: Path, scalars: Scalars):
    """Validation was by TorchRec's modules on two ranks; evaluation is by held rows on one."""
    found = scalars(runs / "run")
    report = evaluate(runs / "run", "valid")
    assert report is not None
    validated = found["valid/ctr/auc"]
    assert report.model["ctr"].auc == pytest.approx(validated[max(validated)], abs=1e-6)
    assert report.model["ctr"].auc == pytest.approx(float((runs / "auc").read_text()), abs=1e-6)  # by both
    assert found["managed/sequence_item/known"][8] > 0.5
    assert export(runs / "run", tmp_path / "export", requests=100) <= 1e-6


def test_each_rank_has_rows_for_the_ids_of_its_range(runs: Path, open_ids: Path):
    with join_ranks("cpu", 1) as ranks:
        model = restore(Run(runs / "run"), ranks)
        tables = [module for module in model.modules() if isinstance(module, HeldRows)]
    assert {table.name for table in tables} >= {"sequence_item", "candidate_item", "request_user"}
    for table in tables:
        first, second = table.fallback.tolist()
        ids, rows = table.ids[table.ids != NOBODY], table.rows[table.ids != NOBODY]
        assert len(rows.unique()) == len(rows)
        assert not torch.isin(rows, table.fallback).any()
        low = ids < int(table.of_rank)
        assert (rows[low] < first).all()
        assert ((rows[~low] > first) & (rows[~low] < second)).all()
    items = next(table for table in tables if table.name == "sequence_item")
    assert items.fallback.tolist() == [14, 29]
    assert min(int((items.ids < 10**9).sum()), int((items.ids >= 10**9).sum())) > 9


def equal(one: Path, two: Path, read: Read) -> bool:
    first, second = read(one), read(two)
    assert any(name.startswith(".histories.sequence_item/1") for name in first)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_two_ranks_resume_to_the_same_numbers(runs: Path, read_checkpoint: Read):
    assert equal(Run(runs / "run").checkpoints()[-1], Run(runs / "resumed").checkpoints()[-1], read_checkpoint)


def test_two_ranks_start_the_next_day_where_the_day_before_ended(runs: Path, read_checkpoint: Read):
    before, after = (read_checkpoint(Run(runs / name).best()) for name in ("run", "next"))
    managed = [name for name in before if "managed_" in name or name.startswith(".histories")]
    assert all(torch.equal(before[name], after[name]) for name in managed)


def test_other_ranks_are_refused(runs: Path, open_ids: Path, config_of: ConfigOf, tmp_path: Path):
    message = r"tables\.managed_collision: which id of \w+ has .* divided among 2 ranks.* are 1; train on with 2"
    config = config_of(f"dataset={open_ids}", *OPTIONS, *STEPS, "training.max_steps=9")
    with on_cpus(), pytest.raises(UserError, match=message):
        train(config, runs / "run", resume=True)
    warm = config.model_copy(update={"warm_start": config.warm_start.model_copy(update={"run": runs / "run"})})
    with on_cpus(), pytest.raises(UserError, match=message):
        train(warm, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def test_a_rank_without_two_rows_is_refused(runs: Path):
    assert (
        (runs / "few")
        .read_text()
        .startswith("tables.managed_collision: table candidate_item has 3 rows, 2 a rank, which")
    )


if __name__ == "__main__":
    scenarios(*(Path(argument) for argument in sys.argv[1:]))
