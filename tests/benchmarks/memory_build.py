"""Users a second whose memories are made and stored, bytes of them, and what 400 million users would take.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.memory_build [--users 256] [--events 1000] [--most 100] [--width 16]

Generated users, semantic IDs by behaviour, UxSID after one step of training (what it has learned changes no time), as
many groups of each user as `--most`: those of her history and their nearest ones. Into LMDB in a temporary folder; time
is of reading histories, making records and writing them, without the start. The ways:

- build: `ranker.memory.walk`, users in batches.
- one user a batch: the same with batches of one.
- one pair a pass: a user's history is read and encoded anew for each of her groups, as where a memory is asked for by
  (user, group): of `--pairs-users` users, without writing.

Ways alternate, each is measured `--rounds` times, and the least processor time counts: the figure to compare on a
machine that is shared.

Bytes are those of the records and, beside, of LMDB's pages in use (keys, and room that its tree leaves free), measured
for each dtype. The extrapolation is arithmetic: 400 million users × 100 groups × the bytes of a record measured here.
The published system stores 2.56 TB for as many (Zhang et al. 2026, "UxSID"), which is 64 bytes a group: what 32 values
take in float16, with nothing beside them. Here a record is 2 · width values and a header.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from features.batch import from_tensors
from features.config_file import load_config
from features.dataset import Dataset
from features.prepare import prepare
from features.schema import PrepareConfig
from features.selection import resolve
from features.semantic_ids.apply import apply
from features.semantic_ids.config import SidsConfig
from features.semantic_ids.fit import fit
from features.users import AsOf, UserBatches
from ranker.config import TrainConfig
from ranker.evaluate import restore
from ranker.export.inputs import StoredBlock
from ranker.memory.config import CodesConfig, MemoryConfig
from ranker.memory.generation import generation_of
from ranker.memory.job_lease import leased
from ranker.memory.making import RecordMaker
from ranker.memory.policy import Codes
from ranker.memory.raw_users import RawUsers
from ranker.memory.record import DTYPES, HEADER_BYTES
from ranker.memory.scope import as_of_now, selection_for
from ranker.memory.store import open_store
from ranker.memory.versions import versions_of
from ranker.memory.walk import Walk
from ranker.ranks import Ranks, join_ranks
from ranker.run import Run
from ranker.training import trainer
from tests.benchmarks.machine import machine

USERS, GROUPS, PUBLISHED_TB = 400_000_000, 100, 2.56


class OnePair(RecordMaker):
    """Makes one user's records, one group a pass; which groups there are is found out once."""

    found: Codes | None = None
    which = 0

    def codes(self, block: StoredBlock, event_codes: Tensor, start: Tensor, end: Tensor) -> Codes:
        """The group of that number."""
        if self.found is None:
            self.found = super().codes(block, event_codes, start, end)
        one = slice(self.which, self.which + 1)
        return Codes(self.found.code[one], self.found.request[one], self.found.cut)


def run_of(folder: Path, given: argparse.Namespace) -> Run:
    """A run of one step on generated users."""
    data = folder / "data.yaml"
    data.write_text(f"""
name: memories
source:
  type: synthetic
  users: {given.users}
  items: {given.items}
  events_per_user: {given.events}
  max_events_per_user: {4 * given.events}
  requests_per_user: 4
  candidates_per_request: 8
  topics: 16
labels: {{click: click}}
partitions: 4
""")
    prepare(load_config(data, PrepareConfig), folder / "dataset")
    sids = {"content": [{"type": "behaviour", "dim": 16, "min_count": 1}], "levels": [given.codes, 4]}
    config = SidsConfig.model_validate(sids | {"report": {"pictures": False}})
    codebook, _ = fit(config, Dataset(folder / "dataset"), folder / "codebook", lambda line: None)
    apply(codebook, Dataset(folder / "dataset"))
    train = {
        "name": "memories",
        "dataset": folder / "dataset",
        "features": {"sequence": ["item", "item.sid_1"], "codes": ["item.sid_1"]},
        "model": {"short": None, "long": [{"type": "uxsid", "width": given.width, "anchors": min(16, given.width)}]},
        "loader": {"workers": 0, "requests": 16},
        "training": {"max_steps": 1, "threads": 1, "device": "cpu", "validation_split": None},
    }
    trainer.train(TrainConfig.model_validate(train), folder / "run")
    return Run(folder / "run")


class Building:
    """What is measured, of one run."""

    def __init__(self, run: Run, given: argparse.Namespace, ranks: Ranks, folder: Path) -> None:
        self.run, self.given, self.ranks, self.folder = run, given, ranks, folder
        self.dataset = run.dataset()
        self.spec = resolve(run.config.features, self.dataset.manifest)
        self.model = restore(run, ranks)
        self.codes = CodesConfig(policy="nearest", most=given.most)
        self.as_of: AsOf = as_of_now(MemoryConfig(), self.dataset, ranks)
        self.stores = 0

    def source(self, users: int, events: int) -> UserBatches:
        """All users."""
        partitions = dict.fromkeys(range(len(self.dataset.manifest.partitions)))
        return UserBatches(self.dataset, selection_for(self.spec, self.run), self.as_of, partitions, users, events)

    def stored(self, config: MemoryConfig) -> Counter[str]:
        """Make and store all users' memories; what was counted, and LMDB's bytes."""
        self.stores += 1
        store = open_store(f"lmdb:{self.folder / str(self.stores)}")
        maker = RecordMaker(self.model, self.spec, self.run.config, config.codes, self.dataset)
        raw, versions, now = RawUsers(self.dataset), versions_of(self.run), self.as_of.now
        generation = generation_of("measured", "", self.dataset, config, versions, maker.blocks, now)
        writer, counts = store.begin(generation), Counter[str]()
        selection = selection_for(self.spec, self.run)
        with ExitStack() as held:
            lease = leased(store, "measured", self.ranks, held)
            walk = Walk(maker, raw, writer, generation, selection, config, self.ranks, lease)
            source = self.source(config.users, config.events)
            walk.over(source, "memories", lambda partition, last, more: counts.update(more))
            writer.done("all")
            writer.close()
        counts["disk_bytes"] = store.size("measured").bytes
        return counts

    def users_a_batch(self, users: int) -> int:
        """The build's way; how many users."""
        config = MemoryConfig(codes=self.codes, users=users, events=self.given.batch_events)
        return self.stored(config)["users"]

    def one_pair_a_pass(self) -> int:
        """Make the memories of some users, a group at a time; how many users."""
        maker, source = OnePair(self.model, self.spec, self.run.config, self.codes, self.dataset), self.source(1, 1)
        users = min(self.given.pairs_users, len(source))
        for user in range(users):
            maker.found = None
            for which in range(self.given.most + 1):
                maker.which = which
                maker.make(from_tensors(self.spec, source[user]))
        return users


def seconds_of(way: Callable[[], int]) -> tuple[float, float]:
    """Seconds a user, of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    users = way()
    return (time.perf_counter() - clock) / users, (time.process_time() - processor) / users


def show_speeds(building: Building, rounds: int) -> None:
    """Each way's, and the build's over it."""
    ways: dict[str, Callable[[], int]] = {
        "build": lambda: building.users_a_batch(building.given.batch_users),
        "one user a batch": lambda: building.users_a_batch(1),
        "one pair a pass": building.one_pair_a_pass,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(seconds_of(way))
    least = {name: [min(times) for times in zip(*of_way, strict=True)] for name, of_way in found.items()}
    print(f"{'way':<18}{'users/s':>12}{'users/s of CPU':>16}{'build is faster by':>20}")
    for name, (clock, processor) in least.items():
        print(f"{name:<18}{1 / clock:>12,.1f}{1 / processor:>16,.1f}{processor / least['build'][1]:>20.2f}")


def show_bytes(building: Building) -> None:
    """By dtype: of a record and of a user, here and for as many as are published."""
    heads = ("a record, B", "on disk, B", "a user, B", "on disk, B", "400M × 100, TB", "on disk, TB")
    print(f"{'dtype':<10}" + "".join(f"{head:>16}" for head in heads))
    for dtype in DTYPES:
        counts = building.stored(MemoryConfig(codes=building.codes, dtype=dtype, users=building.given.batch_users))
        users, records = counts["users"], counts["memories"]
        size = counts["memory_bytes"] + counts["stamp_bytes"]
        record = counts["memory_bytes"] / records
        disk = record * counts["disk_bytes"] / size  # the pages hold stamps, too
        figures = [record, disk, size / users, counts["disk_bytes"] / users]
        figures += [USERS * GROUPS * each / 1e12 for each in (record, disk)]
        print(f"{dtype:<10}" + "".join(f"{figure:>16,.2f}" for figure in figures))
    print(
        f"published: {PUBLISHED_TB} TB, {PUBLISHED_TB * 1e12 / USERS / GROUPS:.0f} B a group; here a group has "
        f"{2 * building.given.width} values, and {HEADER_BYTES} B of header"
    )


def main() -> None:
    """Print machine, sizes, speeds, their ratios, bytes, and the extrapolation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        *(("users", 256), ("events", 1_000), ("items", 2_000), ("codes", 128), ("most", 100), ("width", 16)),
        *(("pairs-users", 4), ("batch-users", 256), ("batch-events", 65_536), ("rounds", 3)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    trainer.ensure_healthy = lambda device: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as name:
        run = run_of(Path(name), given)
        with join_ranks("cpu", 1) as ranks:
            building = Building(run, given, ranks, Path(name))
            events = building.dataset.manifest.events
            print(f"machine: {machine('torch', 'torchrec', 'lmdb', threads=1)}")
            print(
                f"{given.users:,} users, {events / given.users:,.0f} events each, {given.codes} codes, "
                f"{given.most} of them and none a user; UxSID of width {given.width}; batches of "
                f"{given.batch_users} users or {given.batch_events:,} events; {given.rounds} rounds"
            )
            show_speeds(building, given.rounds)
            show_bytes(building)


if __name__ == "__main__":
    main()
