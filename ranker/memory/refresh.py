"""`ranker memory refresh RUN --store URL --dataset NEWER`: memories of users with new events, and of nobody else.

The current generation is brought up to date in place, record by record: each record is whole, of the same versions,
and what a reader finds of a user meanwhile may be of before for one block and of after for another. Each user's stamp
(:mod:`ranker.memory.stamps`) says how many events her records were made from and when the last of them was; who has the
same now is not read, and her records stay as they are, bit for bit. Stamps follow the records they speak of, so that a
refresh that was cut off is gone on with by the same command.

One job at a time writes a generation (:mod:`ranker.memory.job_lease`), and its new `as_of_ms` is written before the
first record: memories never go back to an older dataset, though a refresh was cut off.

What a stamp does not see is an event that was changed, and an item's attribute: those want a build
(`ranker memory build RUN --store URL --dataset NEWER`). Nor does it see that time passes: blocks that encode how old
events are (UxSID) made a record as of its own `as_of`, and one made later of the same events differs a little. Those
that are older than is wanted `older_than_days` makes anew.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from features.dataset import Dataset
from features.errors import UserError
from features.instants import iso
from features.progress import log
from features.selection import resolve
from features.users import AsOf, UserBatches
from ranker.evaluate import restore
from ranker.export.inputs import StoredBlock
from ranker.memory.changed import changed, replaced
from ranker.memory.config import MemoryConfig
from ranker.memory.coverage import covered
from ranker.memory.job_lease import leased
from ranker.memory.keys import U64
from ranker.memory.making import BlockRecords, RecordMaker, compressors
from ranker.memory.raw_users import RawUsers
from ranker.memory.report import BuildReport, counted, show, totals_of
from ranker.memory.same_rows import dataset_at
from ranker.memory.scope import as_of_now, partitions_of, selection_for, split_of
from ranker.memory.store import Generation, MemoryStore, StoreError, found_in, open_store
from ranker.memory.vanished import drop, mark_of
from ranker.memory.versions import MemoryVersions, versions_of
from ranker.memory.walk import Walk
from ranker.ranks import join_ranks
from ranker.run import Run

UNDER_WAY, OLDEST = "refresh", "oldest record"
"""notes of a generation: that a refresh is at work or was cut off; as of when the oldest record was made"""


class RefreshReport(NamedTuple):
    """built: of the whole generation, `made` users now; unchanged: users whose records stayed; new: users who had none
    (of those made); vanished: users of the generation who are not in the dataset, and whose records stay unless they
    were to be dropped; oldest_ms: as of when the oldest of the dataset's users' records was made."""

    built: BuildReport
    unchanged: int
    new: int
    vanished: int
    oldest_ms: int


def refresh(
    run_root: Path,
    url: str,
    dataset_root: Path | None = None,
    config: MemoryConfig | None = None,
    drop_vanished: bool = False,
    name: str = "",
    older_than_days: float | None = None,
) -> RefreshReport | None:
    """Bring a generation up to date with a newer dataset; the report on rank 0, None on the others.

    Args:
        dataset_root: a newer preparation; default: the run's own dataset.
        config: how batches are made, `as_of` and `coverage`; which records there are, the generation says itself.
        drop_vanished: remove the records of users whom the dataset does not have; a pass over all of the store's, by
            rank 0 when the others have ended.
        name: of the generation; default: the one that readers of the run's versions read.
        older_than_days: make anew, too, what was made as of so long before.

    Raises:
        UserError: no such generation, or one of another model, or one that is as of later; another job writes it; a
            dataset whose rows are others than the run's.
    """
    run, began = Run(run_root), time.perf_counter()
    own = run.dataset()
    spec = resolve(run.config.features, own.manifest)
    dataset = dataset_at(dataset_root, run, spec, own)
    raw, blocks, options = RawUsers(dataset), compressors(run.config, spec), run.config.training
    given = config or MemoryConfig()
    with ExitStack() as held:
        with join_ranks(options.device, options.threads, given.workers, options.collective_timeout_s) as ranks:
            store = open_store(url)
            checkpoint = ranks.agree(run.best)
            versions = ranks.agree(lambda: versions_of(run, checkpoint))
            chosen = ranks.agree(lambda: _chosen(store, run, versions, name)).name
            lease = leased(store, chosen, ranks, held)
            # what is known of it is read again: from here on nobody else changes it
            generation = ranks.agree(lambda: _chosen(store, run, versions, chosen))
            config = as_built(generation, given)
            split, as_of = split_of(config, dataset), as_of_now(config, dataset, ranks)
            _refuse_taking_back(generation, as_of, dataset)
            generation = ranks.agree(lambda: _begun(store, generation, as_of, dataset))
            partitions = partitions_of(dataset, ranks)
            own_changed = changed(store, generation, dataset, partitions, raw, blocks, as_of, older_than_days)
            stamped, unchanged = map(int, ranks.totals(own_changed.stamped, own_changed.unchanged))
            oldest_ms = min(ranks.gathered(own_changed.oldest_ms))
            before = ranks.agree(lambda: totals_of(store, generation.name)["users"])
            maker = RecordMaker(restore(run, ranks, checkpoint), spec, run.config, config.codes, own)
            writer = store.begin(generation)
            unit = f"refresh-{ranks.agree(time.time_ns)}-{ranks.rank:05d}"
            selection = selection_for(spec, run)
            source = UserBatches(dataset, selection, as_of, own_changed.rows, config.users, config.events)
            walk = Walk(maker, raw, writer, generation, selection, config, ranks, lease)
            own_made, since = _remade(walk, source, store, blocks, unit)
            made = int(ranks.total(own_made))
            seconds = time.perf_counter() - began
            writer.close()
            ranks.barrier()
            coverage = covered(store, generation, dataset, split, blocks, ranks)
        if not ranks.first:
            return None
        if drop_vanished:
            drop(store, generation, dataset, raw, blocks, unit, since, lease.check_alone)
        notes = {key: note for key, note in generation.notes.items() if key != UNDER_WAY} | {OLDEST: iso(oldest_ms)}
        generation = generation.model_copy(update={"notes": notes})
        generation = counted(generation, totals_of(store, generation.name), split, coverage)
        lease.check_alone()
        store.finish(generation)
    report = RefreshReport(
        BuildReport(store.url, generation, blocks, made, seconds, config.before),
        unchanged,
        made - (stamped - unchanged),
        before - stamped,
        oldest_ms,
    )
    show(report.built)
    log(
        f"unchanged: {report.unchanged:,} users, the oldest records as of {iso(oldest_ms)}; new: {report.new:,}; no "
        f"longer in the dataset: {report.vanished:,}, whose records {'are removed' if drop_vanished else 'stay'}"
    )
    return report


def _remade(
    walk: Walk, source: UserBatches, store: MemoryStore, blocks: list[StoredBlock], unit: str
) -> tuple[int, Counter[str]]:
    """Replace the records of the source's users, and mark `unit` with each batch; how many users, and its counts."""
    since: Counter[str] = Counter()

    def written(partition: int, last: bool, counts: Counter[str]) -> None:
        since.update(counts)
        walk.writer.done(unit, mark_of(since))  # what the batches so far have changed

    def before(users: U64, made: list[BlockRecords]) -> Counter[str]:
        counts, stale = replaced(store, walk.generation, users, made, blocks)
        walk.writer.remove_many(stale)
        return counts

    return walk.over(source, "refreshed memories", written, before), since


def as_built(generation: Generation, given: MemoryConfig) -> MemoryConfig:
    """The config of a generation's records, with batches, `as_of` and `coverage` as given."""
    records = json.loads(generation.notes["config"])
    how = given.model_dump(exclude={"codes", "dtype", "before"}, mode="json")
    return MemoryConfig.model_validate(records | how)


def _chosen(store: MemoryStore, run: Run, versions: MemoryVersions, name: str) -> Generation:
    """The generation of this name, or the one that readers read.

    Raises:
        StoreError: there is none that is finished and of this run's versions.
    """
    if not (wanted := name or store.current(versions)):
        raise StoreError(f"{store.url}: no current generation of {versions}; build it first ({_build(run, store)})")
    generation = found_in(store.generations(), wanted, store.url)
    if generation.versions != versions:
        raise StoreError(
            f"{store.url}: generation {generation.name} is of {generation.versions}, and {run.root} is of {versions}; "
            f"its memories are others: build them ({_build(run, store)})"
        )
    if generation.finished_ms is None or "config" not in generation.notes:
        raise StoreError(
            f"{store.url}: generation {generation.name} is none that a build has made and finished; go on with its "
            f"build first ({_build(run, store)})"
        )
    return generation


def _build(run: Run, store: MemoryStore) -> str:
    return f"`ranker memory build {run.root} --store {store.url}`, with the same --dataset"


def _refuse_taking_back(generation: Generation, as_of: AsOf, dataset: Dataset) -> None:
    """Raise UserError where memories hold more than the dataset does."""
    if as_of.now < generation.as_of_ms:
        raise UserError(
            f"{dataset.root}: ends at {iso(as_of.now)}, and the memories of generation {generation.name} are as of "
            f"{iso(generation.as_of_ms)}: a refresh would take events out of them; give --dataset a newer preparation"
        )


def _begun(store: MemoryStore, generation: Generation, as_of: AsOf, dataset: Dataset) -> Generation:
    """The generation as what it is to become, which is stated before the first record is."""
    notes = {"dataset": dataset.manifest.content_hash, UNDER_WAY: "under way, or cut off: the same command goes on"}
    begun = generation.model_copy(update={"as_of_ms": as_of.now, "notes": generation.notes | notes})
    store.finish(begun)
    return begun
