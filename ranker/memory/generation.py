"""Which generation a build writes: a new one, or one that an earlier build of the same records has begun."""

from __future__ import annotations

import hashlib
import json
import time
from typing import NamedTuple

from features.dataset import Dataset
from features.instants import iso
from features.progress import log
from ranker.export.inputs import StoredBlock
from ranker.memory.config import MemoryConfig
from ranker.memory.store import Generation, MemoryStore, StoreError
from ranker.memory.versions import MemoryVersions

DECIDES = {"codes", "dtype", "as_of", "before"}
"""keys of the config that decide which records there are; others only how they are made"""


class TakenUp(NamedTuple):
    """generation: what is known of it; done: its units that are done."""

    generation: Generation
    done: frozenset[str]


def unit_of(partition: int) -> str:
    """The unit of work that a partition is."""
    return f"partition-{partition:05d}"


def generation_of(
    name: str,
    run: str,
    dataset: Dataset,
    config: MemoryConfig,
    versions: MemoryVersions,
    blocks: list[StoredBlock],
    as_of_ms: int,
) -> Generation:
    """The generation of these records; without a `name`, it is named by what decides them."""
    records = json.dumps(config.model_dump(mode="json", include=DECIDES), sort_keys=True)
    identity = f"{versions} {records} {dataset.manifest.content_hash}"
    return Generation(
        name=name or f"{versions.model:016x}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}",
        model=versions.model,
        codebook=versions.codebook,
        dtype=config.dtype,
        blocks={block.number: "request" if block.probe is None else "probe" for block in blocks},
        as_of_ms=as_of_ms,
        begun_ms=time.time_ns() // 1_000_000,
        notes={"run": run, "dataset": dataset.manifest.content_hash, "config": records},
    )


def take_up(store: MemoryStore, wanted: Generation) -> TakenUp:
    """What there is of the generation already; says so where there is something.

    Raises:
        StoreError: the store has one of that name with other records.
    """
    others = [one for one in store.generations() if one.name != wanted.name and one.finished_ms is None]
    for other in others:
        log(f"{store.url}: generation {other.name} was begun and not finished; it is of other records, and is left")
    for old in store.generations():
        if old.name == wanted.name:
            refuse_other_records(old, wanted, store)
            done = frozenset(store.done(old.name))
            if old.finished_ms is None:
                log(f"generation {old.name} goes on: {len(done)} partitions are done")
            else:
                log(f"generation {old.name} is finished; another --name makes its records anew")
            return TakenUp(old, done)
    log(f"generation {wanted.name} begins")
    return TakenUp(wanted, frozenset())


def refuse_other_records(old: Generation, wanted: Generation, store: MemoryStore) -> None:
    """Raise StoreError where a generation of this name has, or is to have, other records."""
    was = {"model": f"{old.model:016x}", "codebook": f"{old.codebook:016x}"} | old.notes
    now = {"model": f"{wanted.model:016x}", "codebook": f"{wanted.codebook:016x}"} | wanted.notes
    for key in ("model", "codebook", "dataset", "config"):
        if was.get(key) != now[key]:
            either = (
                ""
                if old.name == store.current(old.versions)
                else f", or drop that one (`ranker memory drop {store.url} {old.name}`)"
            )
            since = " (a refresh may have brought it there)" if key == "dataset" else ""
            raise StoreError(
                f"{store.url}: generation {old.name!r} has {key} {was.get(key)}{since}, and this build {now[key]}; "
                f"give this build another --name{either}"
            )


def later_one_of(store: MemoryStore, wanted: Generation) -> Generation | None:
    """The generation that readers of these versions read, where it is as of later than this one."""
    current = store.current(wanted.versions)
    for one in store.generations():
        if one.name == current and one.as_of_ms > wanted.as_of_ms:
            return one
    return None


def refuse_going_back(store: MemoryStore, wanted: Generation, dataset: Dataset) -> None:
    """Raise StoreError where a switch to this generation would take events out of readers' memories."""
    if (later := later_one_of(store, wanted)) is not None:
        raise StoreError(
            f"{dataset.root}: as of {iso(wanted.as_of_ms)}, and generation {later.name}, which readers of this model "
            f"read, is as of {iso(later.as_of_ms)}: they would lose events; give --dataset a newer preparation, or "
            f"build with --no-switch and another --name (and `ranker memory switch {store.url} NAME`, if that is meant)"
        )


def conclude(store: MemoryStore, generation: Generation, switch: bool, keep: int) -> None:
    """Finish a generation, have readers of its versions read it, and drop older ones of them.

    What was read until now stays, to be gone back to; so do generations of other versions, whose servers may read them.

    Args:
        keep: finished generations left beside the current one and this one: the one that was current, then the newest.
    """
    store.finish(generation)
    served = store.current(generation.versions)
    if switch and served != generation.name:
        store.switch(generation.name)
        log(f"{store.url}: readers of {generation.versions} read generation {generation.name} from now on")
    currents = store.currents().values()
    left = [one for one in store.generations() if one.name != generation.name]
    for other in (one for one in left if one.versions != generation.versions):
        what, option = ("which their servers read, ", " --current") if other.name in currents else ("", "")
        log(
            f"{store.url}: generation {other.name} of {other.versions}, {what}stays; "
            f"`ranker memory drop {store.url} {other.name}{option}` removes it"
        )
    older = [
        one for one in left if one.versions == generation.versions and one.name not in currents and one.finished_ms
    ]
    older.sort(key=lambda one: (one.name == served, one.finished_ms or 0, one.begun_ms), reverse=True)
    for one in older[keep:]:
        if one.name == served:
            continue
        try:
            store.drop(one.name)
            log(f"{store.url}: generation {one.name} dropped")
        except StoreError as error:  # another writes it, or drops it; the build has done its work
            log(f"{store.url}: generation {one.name} stays: {error}")
