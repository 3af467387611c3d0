"""Two ranks write the records of one; a build that was killed goes on to those of one that was not.

As a program it is one of two ranks, ``RUN STORE --refresh DAYS STORE``, which then refresh a store of two days, or a
build alone, ``RUN STORE --kill BATCH``, killed (SIGKILL) in its batch of that number.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from features.dataset import Dataset
from ranker.config import TrainConfig
from ranker.memory.build import build
from ranker.memory.config import MemoryConfig
from ranker.memory.refresh import refresh
from ranker.memory.store import open_store
from ranker.memory.walk import Walk
from ranker.run import Run
from ranker.training.trainer import train
from tests.ranker.memory.built_memories import BLOCKS, everything_in, same_numbers
from tests.ranker.memory.days import built_days
from tests.ranker.started_ranks import ROOT, keep_one_process_group, run_ranks_to_the_end
from tests.ranker.test_blocks import options_of

MODULE = "tests.ranker.memory.test_build_ranks"
SMALL = MemoryConfig.model_validate({"users": 20, "events": 1_500, "dtype": "float32"})


def main() -> None:
    """Build, in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("store")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--refresh", nargs=2)
    given = parser.parse_args()
    if given.refresh:
        keep_one_process_group()
    write, batches = Walk._write, iter(range(given.kill or 0))

    def dying(self: Walk, *arguments: object):
        written = write(self, *arguments)  # type: ignore[arg-type]
        if next(batches, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    if given.kill:
        Walk._write = dying  # type: ignore[method-assign]
    build(given.run, given.store, SMALL)
    if given.refresh:
        days = Path(given.refresh[0])
        refresh(days / "run", given.refresh[1], days / "two", MemoryConfig(users=2), drop_vanished=True)
        dist.barrier()


@pytest.fixture(scope="module")
def stores(once: Callable[..., Path], config_of: Callable[..., TrainConfig], coded: Path) -> Path:
    """A run whose tables two ranks share, and stores of its memories: of one rank, and of two."""

    def make(root: Path) -> None:
        shared = "tables.sequence_sharding=[row_wise]"
        train(config_of(*options_of(coded, BLOCKS, "training.max_steps=2", shared)), root / "run")
        build(root / "run", str(root / "one"), SMALL)
        days = built_days(once)
        shutil.copytree(days / "built", root / "refreshed")
        given = str(root / "run"), str(root / "two"), "--refresh", str(days), str(root / "refreshed")
        run_ranks_to_the_end(2, MODULE, *given)

    return once("memory_ranks", make)


def test_two_ranks_write_the_records_of_one(stores: Path):
    """With partitions of unlike sizes, so that a rank runs out of users before the other."""
    sizes = [info.histories for info in Dataset(Run(stores / "run").config.dataset).manifest.partitions]
    assert sizes[0] + sizes[2] != sizes[1] + sizes[3]
    same_numbers(everything_in(str(stores / "two")), everything_in(str(stores / "one")))


def test_two_ranks_report_what_one_does(stores: Path):
    (one,), (two,) = (open_store(str(stores / ranks)).generations() for ranks in ("one", "two"))
    assert two.counts == one.counts
    assert two.name == one.name
    assert two.counts["users"] == sum(info.histories for info in Run(stores / "run").dataset().manifest.partitions)


def test_two_ranks_refresh_as_one(stores: Path, once: Callable[..., Path], tmp_path: Path):
    days = built_days(once)
    alone = str(shutil.copytree(days / "built", tmp_path / "store"))
    report = refresh(days / "run", alone, days / "two", MemoryConfig(users=2), drop_vanished=True)
    same_numbers(everything_in(str(stores / "refreshed")), everything_in(alone))
    assert report is not None
    assert open_store(str(stores / "refreshed")).generations()[0].counts == report.built.counts


def test_a_killed_build_goes_on_to_the_same_store(stores: Path, tmp_path: Path):
    """Killed after a partition that is done, within the next one: the first is not made again."""
    url, users = str(tmp_path / "store"), [p.histories for p in Run(stores / "run").dataset().manifest.partitions]
    command = [sys.executable, "-m", MODULE, str(stores / "run"), url, "--kill", str(users[0] // 20 + 3)]
    killed = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    store = open_store(url)
    (generation,) = store.generations()
    assert (generation.finished_ms, store.currents()) == (None, {})
    done = store.done(generation.name)
    assert list(done) == ["partition-00000"]
    report = build(stores / "run", url, SMALL)
    assert report is not None
    assert report.made == sum(users) - users[0]
    assert everything_in(url) == everything_in(str(stores / "one"))
    assert open_store(url).generations()[0].counts == open_store(str(stores / "one")).generations()[0].counts


if __name__ == "__main__":
    main()
