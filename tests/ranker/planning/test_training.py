"""The plan that is shown is the plan that is trained with, and what hinders it reaches every rank."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from features.dataset import Dataset
from ranker.config import TrainConfig
from tests.ranker.planning.conftest import Plan
from tests.ranker.started_ranks import start_ranks

OWN = "tables.sharding.sequence_item_category.types=[column_wise]"


def fail_on_this_rank(config: Path) -> None:
    """One of two ranks: it says what it hears of failures in planning, then builds its trainer, then fails in earnest.

    Such processes take long to start, so one pair of them shows all.
    """
    from features.config_file import load_config
    from ranker.ranks import join_ranks
    from ranker.tables import sharding
    from ranker.training import trainer

    rank = os.environ["RANK"]

    def fail(*rest: object, **named: object) -> None:
        raise ZeroDivisionError("a defect")

    with join_ranks("cpu", 1, timeout_s=60.0) as ranks:

        def build(*options: str) -> None:
            run = load_config(config, TrainConfig, options)
            trainer.Trainer(run, Dataset(run.dataset), {}, ranks)

        def told(what: str, *options: str) -> None:
            try:
                build(*options)
            except Exception as error:
                print(f"{what}: {type(error).__name__}: {error}", file=sys.stderr)

        told("by the user", "tables.sharding.candidate_item.types=[row_wise]")
        for name in ("cluster_of", "place"):
            kept = getattr(sharding, name)
            if rank == "0":
                setattr(sharding, name, fail)
            told(name)
            setattr(sharding, name, kept)
        build(OWN)
        if rank == "1":
            sharding.DistributedModelParallel = fail  # type: ignore[assignment,misc]
        build()


@pytest.fixture(scope="module")
def said(config_file: Path) -> list[str]:
    """What each of two ranks says; both end by an error."""
    both = start_ranks(2, "tests.ranker.planning.test_training", str(config_file))
    try:
        said = [process.communicate(timeout=240)[1] for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert [process.returncode for process in both] == [1, 1], said
    return said


def test_two_ranks_train_with_the_plan_that_is_shown(plan: Plan, said: list[str]):
    logged = re.findall(r"table (\w+): (\w+), kernel (\w+), ranks ([\d,]+)", said[0])
    _, shown, _ = plan("--cpus", "2", "--set", OWN)
    tables = [(t["name"], t["sharding"], t["kernel"], ",".join(map(str, t["ranks"]))) for t in shown["tables"]]
    assert logged == tables
    assert len(tables) == 8
    assert ("sequence_item_category", "column_wise") in [table[:2] for table in tables]


def test_what_the_user_can_put_right_is_told_on_both(said: list[str]):
    reason = "tables.sharding.candidate_item.types: ['row_wise'] leaves no place for table candidate_item"
    assert f"by the user: ShardingError: {reason}" in said[0]
    assert f"by the user: UserError: {reason}" in said[1]


@pytest.mark.parametrize("name", ["cluster_of", "place"])
def test_a_defect_in_planning_ends_the_rank_that_waits_for_the_plan(said: list[str], name: str):
    assert f"{name}: ZeroDivisionError: a defect" in said[0]
    assert f"{name}: RuntimeError: rank 0 failed, its own log says where: a defect" in said[1]


def test_a_rank_that_fails_to_make_its_shards_ends_the_other(said: list[str]):
    assert said[1].rstrip().endswith("ZeroDivisionError: a defect")
    assert "rank 0 of 2, making the shards of tables: another rank died, or did not come within 60 s" in said[0]


if __name__ == "__main__":
    fail_on_this_rank(Path(sys.argv[1]))
