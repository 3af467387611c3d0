"""`ranker memory refresh RUN --store URL --dataset NEWER`: memories of users with new events, and of nobody else.

The current generation is brought up to date in place, record by record: each record is whole, of the same versions,
and what a reader finds of a user meanwhile may be of before for one block and of after for another. Each user's stamp
(:mod:`ranker.memory.stamps`) says how many events her records were made from and when the last of them was; who has the
same now is not read, and her records stay as they are, bit for bit. Stamps follow the records they speak of, so that a
refresh that was cut off is gone on with by the same command.

What a stamp does not see is an event that was changed, and an item's attribute: those want a build.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from features.dataset import Dataset
from features.errors import UserError
from features.instants import iso
from features.progress import log
from features.selection import resolve
from features.users import AsOf, UserBatches, cut_of
from features.views import Ints, Partition
from ranker.evaluate import restore
from ranker.export.inputs import StoredBlock
from ranker.memory.config import MemoryConfig
from ranker.memory.coverage import USERS, covered, stamps_of
from ranker.memory.keys import U64, keys_of
from ranker.memory.making import BlockRecords, RecordMaker, compressors
from ranker.memory.raw_users import RawUsers
from ranker.memory.report import BuildReport, counted, show, totals_of
from ranker.memory.same_rows import refuse_other_rows
from ranker.memory.scope import as_of_now, partitions_of, selection_for, split_of
from ranker.memory.store import Generation, MemoryStore, StoreError, open_store
from ranker.memory.vanished import drop, mark_of, older_records
from ranker.memory.versions import MemoryVersions, versions_of
from ranker.memory.walk import Walk
from ranker.ranks import join_ranks
from ranker.run import Run


class RefreshReport(NamedTuple):
    """built: of the whole generation, `made` users now; unchanged: users whose records stayed; new: users who had none
    (of those made); vanished: users of the generation who are not in the dataset, and whose records stay unless they
    were to be dropped."""

    built: BuildReport
    unchanged: int
    new: int
    vanished: int


class _Changed(NamedTuple):
    """rows: by partition, history rows whose records are to be made; stamped, unchanged: users with a stamp, and with
    the one that their history has."""

    rows: dict[int, Ints]
    stamped: int
    unchanged: int


def refresh(
    run_root: Path,
    url: str,
    dataset_root: Path | None = None,
    config: MemoryConfig | None = None,
    drop_vanished: bool = False,
) -> RefreshReport | None:
    """Bring the current generation up to date with a newer dataset; the report on rank 0, None on the others.

    Args:
        dataset_root: a newer preparation; default: the run's own dataset.
        config: how batches are made, `as_of` and `coverage`; which records there are, the generation says itself.
        drop_vanished: remove the records of users whom the dataset does not have; a pass over all of the store's.

    Raises:
        UserError: no current generation, or one of another model; a dataset whose rows are others than the run's.
    """
    run, began = Run(run_root), time.perf_counter()
    older = run.dataset()
    dataset = older if dataset_root is None else Dataset(dataset_root)
    spec = resolve(run.config.features, older.manifest)
    refuse_other_rows(run, spec, older, dataset)
    raw, blocks, options = RawUsers(dataset), compressors(run.config, spec), run.config.training
    given = config or MemoryConfig()
    with join_ranks(options.device, options.threads, given.workers, options.collective_timeout_s) as ranks:
        store = open_store(url)
        generation = ranks.agree(lambda: _current(store, run, versions_of(run)))
        config = as_built(generation, given)
        split, as_of = split_of(config, dataset), as_of_now(config, dataset, ranks)
        _refuse_going_back(generation, as_of, dataset)
        changed = _changed(store, generation, dataset, partitions_of(dataset, ranks), raw, blocks, as_of)
        stamped, unchanged = map(int, ranks.totals(changed.stamped, changed.unchanged))
        before = ranks.agree(lambda: totals_of(store, generation.name)["users"])
        maker = RecordMaker(restore(run, ranks), spec, run.config, config.codes, older)
        writer = store.begin(generation)
        unit = f"refresh-{ranks.agree(time.time_ns)}-{ranks.rank:05d}"
        since: Counter[str] = Counter()

        def written(partition: int, last: bool, counts: Counter[str]) -> None:
            since.update(counts)
            writer.done(unit, mark_of(since))  # with each batch: what the batches so far have changed

        def replaced(users: U64, made: list[BlockRecords]) -> Counter[str]:
            counts, stale = _replaced(store, generation, users, made, blocks)
            writer.remove_many(stale)
            return counts

        selection = selection_for(spec, run)
        source = UserBatches(dataset, selection, as_of, changed.rows, config.users, config.events)
        walk = Walk(maker, raw, writer, generation, selection, config, ranks)
        made = int(ranks.total(walk.over(source, f"refreshed memories of {dataset.manifest.name}", written, replaced)))
        seconds = time.perf_counter() - began
        ranks.barrier()
        if drop_vanished and ranks.first:
            since.update(drop(store, generation, writer, dataset, raw, blocks))
            writer.done(unit, mark_of(since))
        writer.close()
        ranks.barrier()
        coverage = covered(store, generation, dataset, split, blocks, ranks)
        if not ranks.first:
            return None
        notes = generation.notes | {"dataset": dataset.manifest.content_hash}
        generation = generation.model_copy(update={"as_of_ms": as_of.now, "notes": notes})
        generation = counted(generation, totals_of(store, generation.name), split, coverage)
        store.finish(generation)
        report = RefreshReport(
            BuildReport(store.url, generation, blocks, made, seconds, config.before),
            unchanged,
            made - (stamped - unchanged),
            before - stamped,
        )
    show(report.built)
    log(
        f"unchanged: {report.unchanged:,} users; new: {report.new:,}; no longer in the dataset: {report.vanished:,}, "
        f"whose records {'are removed' if drop_vanished else 'stay'}"
    )
    return report


def as_built(generation: Generation, given: MemoryConfig) -> MemoryConfig:
    """The config of a generation's records, with batches, `as_of` and `coverage` as given."""
    records = json.loads(generation.notes["config"])
    how = given.model_dump(exclude={"codes", "dtype", "before"}, mode="json")
    return MemoryConfig.model_validate(records | how)


def _current(store: MemoryStore, run: Run, versions: MemoryVersions) -> Generation:
    """The generation that readers of this model read.

    Raises:
        StoreError: there is none that this run's build has made.
    """
    name = store.current(versions)
    for generation in store.generations():
        if generation.name == name and "config" in generation.notes:
            return generation
    raise StoreError(
        f"{store.url}: no current generation of {versions} that `ranker memory build` has made; build it first "
        f"(`ranker memory build {run.root} --store {store.url}`)"
    )


def _refuse_going_back(generation: Generation, as_of: AsOf, dataset: Dataset) -> None:
    """Raise UserError where memories hold more than the dataset does."""
    if as_of.now < generation.as_of_ms:
        raise UserError(
            f"{dataset.root}: ends at {iso(as_of.now)}, and the memories of generation {generation.name} are as of "
            f"{iso(generation.as_of_ms)}: a refresh would take events out of them; give --dataset a newer preparation"
        )


def _changed(
    store: MemoryStore,
    generation: Generation,
    dataset: Dataset,
    partitions: list[int],
    raw: RawUsers,
    blocks: list[StoredBlock],
    as_of: AsOf,
) -> _Changed:
    """Whose stamp is not what her history has now."""
    rows: dict[int, Ints] = {}
    stamped = unchanged = 0
    for index in partitions:
        partition = Partition(dataset, index)
        cut, user = cut_of(dataset, partition, index, as_of), partition.histories.flat("user")
        parts = [np.zeros(0, np.int64)]
        for first in range(0, user.size, USERS):
            some = slice(first, first + USERS)
            stamps = stamps_of(store, generation.name, raw.hashes(user[some]), generation.versions, blocks)
            same = stamps.found.numpy() & (stamps.events.numpy() == cut.length[some])
            same &= stamps.last.numpy() == cut.last[some]
            stamped, unchanged = stamped + int(stamps.found.sum()), unchanged + int(same.sum())
            parts.append(first + np.flatnonzero(~same))
        rows[index] = np.concatenate(parts)
    return _Changed(rows, stamped, unchanged)


def _replaced(
    store: MemoryStore, generation: Generation, users: U64, made: list[BlockRecords], blocks: list[StoredBlock]
) -> tuple[Counter[str], U64]:
    """What the users' older records count for, negative; and keys of those that get no new ones."""
    older = older_records(store, generation, users, blocks)
    stale: list[U64] = [np.zeros(0, np.uint64)]
    for block, _, codes in made:
        if codes is not None:
            new = keys_of(users, block.number, codes.request.cpu().numpy(), codes.code.cpu().numpy())
            stale.append(np.setdiff1d(older.keys[block.number], new.key))
    return older.counts, np.concatenate(stale)
