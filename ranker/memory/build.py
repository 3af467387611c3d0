"""`ranker memory build RUN --store URL`: the memories of all users of a run's dataset, as records of a store.

Each rank walks over partitions of its own. A partition is marked as done with its last record, so that the same command
goes on with those that are not; what is written twice is the same. The generation is switched to when it is whole.

    python -m ranker.memory.build RUN --store URL [--config YAML] [--set KEY=VALUE] [--refresh --dataset NEWER]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from features.config_file import load_config
from features.errors import UserError
from features.selection import resolve
from features.users import AsOf, UserBatches
from ranker.evaluate import restore
from ranker.memory.config import MemoryConfig
from ranker.memory.coverage import covered
from ranker.memory.generation import conclude, generation_of, take_up, unit_of
from ranker.memory.making import RecordMaker, compressors
from ranker.memory.raw_users import RawUsers
from ranker.memory.refresh import refresh
from ranker.memory.report import BuildReport, counted, show, totals_of
from ranker.memory.scope import as_of_now, partitions_of, selection_for, split_of
from ranker.memory.store import open_store
from ranker.memory.versions import versions_of
from ranker.memory.walk import Walk
from ranker.ranks import join_ranks
from ranker.run import Run


def build(
    run_root: Path, url: str, config: MemoryConfig | None = None, name: str = "", switch: bool = True
) -> BuildReport | None:
    """Make the memories of all users, and have readers read them; the report on rank 0, None on the others.

    Args:
        name: of the generation; default: made of what decides its records, so that the same build finds it again.
        switch: False leaves readers with the generation they have.

    Raises:
        UserError: no run or another dataset than it was trained on; users whose ids were not kept; no block with a
            memory to keep; a generation of that name with other records.
    """
    run, config = Run(run_root), config or MemoryConfig()
    dataset = run.dataset()
    spec, split = resolve(run.config.features, dataset.manifest), split_of(config, dataset)
    raw, blocks = RawUsers(dataset), compressors(run.config, spec)
    options, began = run.config.training, time.perf_counter()
    with join_ranks(options.device, options.threads, config.workers, options.collective_timeout_s) as ranks:
        store = open_store(url)
        as_of = as_of_now(config, dataset, ranks)
        maker = RecordMaker(restore(run, ranks), spec, run.config, config.codes, dataset)
        wanted = generation_of(name, run.config.name, dataset, config, versions_of(run), blocks, as_of.now)
        taken = ranks.agree(lambda: take_up(store, wanted))
        generation = taken.generation
        left = [p for p in partitions_of(dataset, ranks) if unit_of(p) not in taken.done]
        writer = store.begin(generation)
        selection = selection_for(spec, run)
        source = UserBatches(
            dataset,
            selection,
            AsOf(generation.as_of_ms, config.before),
            dict.fromkeys(left),
            config.users,
            config.events,
        )

        of_partition: Counter[str] = Counter()

        def written(partition: int, last: bool, counts: Counter[str]) -> None:
            of_partition.update(counts)
            if last:
                writer.done(unit_of(partition), of_partition)
                of_partition.clear()

        for empty in sorted(set(left) - {slot.partition for slot in source.slots}):
            writer.done(unit_of(empty))
        walk = Walk(maker, raw, writer, generation, selection, config, ranks)
        made = ranks.total(walk.over(source, f"memories of {dataset.manifest.name}", written))
        seconds = time.perf_counter() - began
        writer.close()
        ranks.barrier()
        coverage = covered(store, generation, dataset, split, blocks, ranks)
        if not ranks.first:
            return None
        generation = counted(generation, totals_of(store, generation.name), split, coverage)
        conclude(store, generation, switch, config.keep)
        report = BuildReport(store.url, generation, blocks, int(made), seconds, config.before)
    show(report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ranker.memory.build`` and of `torchx run`: builds, or with ``--refresh`` refreshes."""
    parser = argparse.ArgumentParser(prog="ranker.memory.build", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--store", required=True, help="lmdb:PATH, redis://HOST:PORT/DB?namespace=NAME, …")
    parser.add_argument("--config", type=Path, help="YAML file; `ranker schema memory` lists its keys")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key (repeatable)")
    parser.add_argument("--name", default="", help="of the generation; default: by what decides its records")
    parser.add_argument("--no-switch", action="store_true", help="leave readers with the generation they have")
    parser.add_argument("--refresh", action="store_true", help="make records of users with new events alone")
    parser.add_argument("--dataset", type=Path, help="with --refresh: a newer preparation")
    parser.add_argument("--drop-vanished", action="store_true", help="with --refresh: of users it no longer has")
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.config, MemoryConfig, given.set)
        if given.refresh:
            refresh(given.run, given.store, given.dataset, config, given.drop_vanished)
        else:
            build(given.run, given.store, config, given.name, not given.no_switch)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
