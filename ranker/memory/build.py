"""`ranker memory build RUN --store URL`: the memories of all users of a run's dataset, as records of a store.

Each rank walks over partitions of its own. A partition is marked as done with its last record, so that the same command
goes on with those that are not; what is written twice is the same. The generation is switched to when it is whole.

    python -m ranker.memory.build RUN --store URL [--config YAML] [--set KEY=VALUE] [--dataset NEWER [--refresh]]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from features.config_file import load_config
from features.errors import UserError
from features.instants import iso
from features.progress import log
from features.selection import resolve
from features.users import AsOf, UserBatches
from ranker.evaluate import restore
from ranker.memory.config import MemoryConfig
from ranker.memory.coverage import covered
from ranker.memory.generation import conclude, generation_of, later_one_of, refuse_going_back, take_up, unit_of
from ranker.memory.job_lease import leased
from ranker.memory.making import RecordMaker, compressors
from ranker.memory.raw_users import RawUsers
from ranker.memory.refresh import refresh
from ranker.memory.report import BuildReport, counted, show, totals_of
from ranker.memory.same_rows import dataset_at
from ranker.memory.scope import as_of_now, partitions_of, selection_for, split_of
from ranker.memory.store import open_store
from ranker.memory.versions import versions_of
from ranker.memory.walk import Walk
from ranker.ranks import join_ranks
from ranker.run import Run


def build(
    run_root: Path,
    url: str,
    config: MemoryConfig | None = None,
    name: str = "",
    switch: bool = True,
    dataset_root: Path | None = None,
) -> BuildReport | None:
    """Make the memories of all users, and have readers read them; the report on rank 0, None on the others.

    Args:
        name: of the generation; default: made of what decides its records, so that the same build finds it again.
        switch: False leaves readers with the generation they have.
        dataset_root: a newer preparation; default: the run's own dataset.

    Raises:
        UserError: no run or another dataset than it was trained on; a newer dataset with other rows; users whose ids
            were not kept; no block with a memory to keep; a generation of that name with other records, or that
            another job writes; readers' generation is as of later than this one would be.
    """
    run, config = Run(run_root), config or MemoryConfig()
    own = run.dataset()
    spec = resolve(run.config.features, own.manifest)
    dataset = dataset_at(dataset_root, run, spec, own)
    split, raw, blocks = split_of(config, dataset), RawUsers(dataset), compressors(run.config, spec)
    options, began = run.config.training, time.perf_counter()
    with (
        ExitStack() as held,
        join_ranks(options.device, options.threads, config.workers, options.collective_timeout_s) as ranks,
    ):
        store = open_store(url)
        as_of = as_of_now(config, dataset, ranks)
        checkpoint = ranks.agree(run.best)
        versions = ranks.agree(lambda: versions_of(run, checkpoint))
        wanted = generation_of(name, run.config.name, dataset, config, versions, blocks, as_of.now)
        lease = leased(store, wanted.name, ranks, held)
        if switch:
            ranks.agree(lambda: refuse_going_back(store, wanted, dataset))
        taken = ranks.agree(lambda: take_up(store, wanted))
        generation = taken.generation
        maker = RecordMaker(restore(run, ranks, checkpoint), spec, run.config, config.codes, own)
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
        walk = Walk(maker, raw, writer, generation, selection, config, ranks, lease)
        made = ranks.total(walk.over(source, f"memories of {dataset.manifest.name}", written))
        seconds = time.perf_counter() - began
        writer.close()
        ranks.barrier()
        coverage = covered(store, generation, dataset, split, blocks, ranks)
        if not ranks.first:
            return None
        lease.check_alone()
        generation = counted(generation, totals_of(store, generation.name), split, coverage)
        later = later_one_of(store, generation) if switch else None  # refreshed while this one was built
        conclude(store, generation, switch and later is None, config.keep)
        report = BuildReport(store.url, generation, blocks, int(made), seconds, config.before)
    show(report)
    if later is not None:
        log(
            f"{store.url}: readers stay with generation {later.name}, which has been refreshed meanwhile and is as of "
            f"{iso(later.as_of_ms)}; refresh this one with the same dataset (`ranker memory refresh {run.root} --store "
            f"{store.url} --dataset … --generation {generation.name}`), then switch (`ranker memory switch {store.url} "
            f"{generation.name}`)"
        )
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
    parser.add_argument("--dataset", type=Path, help="a newer preparation; default: the run's own dataset")
    parser.add_argument("--generation", default="", help="with --refresh: which one; default: the current one")
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="with --refresh: anew, too, what is older")
    parser.add_argument("--drop-vanished", action="store_true", help="with --refresh: of users it no longer has")
    given = parser.parse_args(arguments)
    of_one, of_other = (
        (given.generation, given.older_than is not None, given.drop_vanished),
        (given.name, given.no_switch),
    )
    if any(of_other if given.refresh else of_one):
        parser.error(
            "--name and --no-switch are of a build, --generation, --older-than and --drop-vanished of --refresh"
        )
    try:
        config = load_config(given.config, MemoryConfig, given.set)
        if given.refresh:
            refresh(
                given.run, given.store, given.dataset, config, given.drop_vanished, given.generation, given.older_than
            )
        else:
            build(given.run, given.store, config, given.name, not given.no_switch, given.dataset)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
