"""A refresh makes what a build on the newer dataset makes, of users with new events; others cost nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from features.dataset import Dataset
from features.errors import UserError
from features.instants import iso
from features.reader import Reader
from ranker.export.inputs import StoredBlock
from ranker.memory import refresh as refreshing
from ranker.memory.config import MemoryConfig
from ranker.memory.coverage import stamps_of
from ranker.memory.generation import DECIDES
from ranker.memory.keys import hashes_of, keys_of, user_keys
from ranker.memory.refresh import RefreshReport, refresh
from ranker.memory.stamps import BLOCK
from ranker.memory.store import StoreError, open_store
from ranker.memory.vanished import hash_of_stamp
from ranker.memory.verify import verify
from ranker.memory.versions import versions_of
from ranker.run import Run
from tests.ranker.memory.built_memories import everything_in, same_numbers
from tests.ranker.memory.days import ACTIVE, GONE, NEW, QUIET, day


def refreshed(days: Path, store: str, drop_vanished: bool = False, **changes: object) -> RefreshReport:
    """A refresh's report."""
    config = MemoryConfig.model_validate({"users": 8, "events": 60} | changes)
    report = refresh(days / "run", store, days / "two", config, drop_vanished)
    assert report is not None
    return report


def keys_of_users(days: Path, store: str, users: list[int]) -> set[int]:
    """Of all records that stamps of these users tell of, and the stamps."""
    opened = open_store(store)
    generation = opened.generations()[-1]
    versions = versions_of(Run(days / "run"))
    hashes = hashes_of(users)
    (asked,) = stamps_of(opened, generation.name, hashes, versions, [StoredBlock(0, "uxsid", "item.category")]).asked
    parts = [user_keys(hashes, block).key for block in (1, BLOCK)]
    parts.append(keys_of(hashes, 0, asked.request.numpy(), asked.code.numpy()).key)
    return {int(key) for key in np.concatenate(parts)}


def test_the_days_are_what_they_are_for(days: Path):
    """Users are numbered anew, and lie in other partitions; the items that training knows are not."""
    one, two = Dataset(days / "one"), Dataset(days / "two")
    assert one.vocabulary_hash() != two.vocabulary_hash()
    assert one.manifest.known_items == two.manifest.known_items == one.manifest.items == two.manifest.items - 1
    assert len(one.manifest.partitions) != len(two.manifest.partitions)


def test_refreshed_users_have_the_records_of_a_build_and_others_those_they_had(days: Path, store: str):
    before = everything_in(store)
    report = refreshed(days, store)
    assert (report.built.made, report.new, report.vanished) == (len(ACTIVE) + len(NEW), len(NEW), 1)
    assert report.unchanged == len(QUIET)
    after, wanted = everything_in(store), everything_in(str(days / "rebuilt"))
    changed = keys_of_users(days, str(days / "rebuilt"), [*ACTIVE, *NEW])
    assert changed <= wanted.keys()
    same_numbers({k: after[k] for k in after if k in changed}, {k: wanted[k] for k in changed})
    stay = keys_of_users(days, str(days / "built"), [*QUIET, GONE])
    assert {k: after[k] for k in stay} == {k: before[k] for k in stay}
    assert after.keys() == changed | stay  # nothing is left of groups that a user no longer has


def test_who_is_gone_is_removed_if_asked(days: Path, store: str):
    gone = keys_of_users(days, str(days / "built"), [GONE])
    assert gone <= everything_in(store).keys()
    report = refreshed(days, store, drop_vanished=True)
    assert report.vanished == 1
    after = everything_in(store)
    assert after.keys() == everything_in_undisturbed(days, store).keys() - gone
    assert report.built.counts["records"] == len(after)
    assert report.built.counts["users"] == len(ACTIVE) + len(QUIET) + len(NEW)
    again = refreshed(days, store, drop_vanished=True)
    assert (again.vanished, again.built.made, everything_in(store)) == (0, 0, after)


def test_a_stamps_key_gives_the_users_hash_back():
    hashes = hashes_of(range(1000))
    assert (hash_of_stamp(user_keys(hashes, BLOCK).key) == hashes[:, 0]).all()


def test_users_without_new_events_are_neither_read_nor_encoded(days: Path, store: str, monkeypatch: pytest.MonkeyPatch):
    read: list[int] = []
    two, whole = Dataset(days / "two"), Reader.read_users

    def noting(self: Reader, partition, rows, length, now):
        read.extend(partition.histories.flat("user")[rows].tolist())
        return whole(self, partition, rows, length, now)

    monkeypatch.setattr(Reader, "read_users", noting)
    refreshed(days, store)
    assert sorted(two.values_of("user", np.array(read)).tolist()) == sorted([*ACTIVE, *NEW])


def test_a_second_refresh_finds_nothing_to_do(days: Path, store: str):
    refreshed(days, store)
    before = everything_in(store)
    again = refreshed(days, store)
    assert (again.built.made, again.new, again.unchanged) == (0, 0, len(ACTIVE) + len(NEW) + len(QUIET))
    assert everything_in(store) == before


def test_the_generation_says_what_it_holds_now(days: Path, store: str):
    report = refreshed(days, store)
    opened = open_store(store)
    generation = opened.generations()[-1]
    records = everything_in(store)
    assert generation == report.built.generation
    assert opened.current(generation.versions) == generation.name
    assert generation.notes["dataset"] == Dataset(days / "two").manifest.content_hash
    assert generation.counts["users"] == len(ACTIVE) + len(QUIET) + len(NEW) + 1
    assert generation.counts["records"] == len(records)
    assert generation.counts["bytes"] == sum(map(len, records.values()))
    assert report.built.coverage["users"].found == report.built.coverage["users"].asked
    assert verify(opened, generation).overwritten == 0


def test_a_refresh_that_is_cut_off_is_gone_on_with(days: Path, store: str, monkeypatch: pytest.MonkeyPatch):
    whole = refreshing.replaced
    batches = iter(range(2))

    def dying(*arguments: object):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return whole(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(refreshing, "replaced", dying)
        with pytest.raises(KeyboardInterrupt):
            refreshed(days, store, users=1)
    report = refreshed(days, store)
    assert report.built.made == len(ACTIVE) + len(NEW) - 2
    same_numbers(everything_in(store), everything_in_undisturbed(days, store))
    assert report.built.counts["records"] == len(everything_in(store))


def everything_in_undisturbed(days: Path, store: str) -> dict[int, bytes]:
    """Of a refresh without interruption."""
    other = str(shutil.copytree(days / "built", Path(store).with_name("undisturbed")))
    refreshed(days, other)
    return everything_in(other)


def test_a_dataset_with_other_rows_is_refused_with_what_to_do(days: Path, store: str, tmp_path: Path):
    other = day(tmp_path / "other", 2, extra_categories=True)
    with pytest.raises(UserError, match=r"item.category: numbered or made otherwise .*`ranker train … .*--from"):
        refresh(days / "run", store, other.root)


def test_memories_are_not_taken_back_to_an_older_day(days: Path, store: str):
    refreshed(days, store)
    with pytest.raises(UserError, match=r"ends at 2020-09-13 .* as of 2020-09-14 .* --dataset a newer preparation"):
        refresh(days / "run", store)


def test_a_store_without_this_models_memories_is_refused(days: Path, store: str, tmp_path: Path):
    with pytest.raises(StoreError, match=r"no current generation of model .*build it first"):
        refresh(days / "run", str(tmp_path / "empty"), days / "two")
    other = shutil.copytree(days / "run", tmp_path / "run")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("init_scale: 0.5", "init_scale: 0.25"))
    with pytest.raises(StoreError, match=r"no current generation of model .*build it first \(`ranker memory build"):
        refresh(other, store, days / "two")


def test_which_records_there_are_the_generation_says(days: Path, store: str):
    generation = open_store(store).generations()[-1]
    config = refreshing.as_built(generation, MemoryConfig(dtype="int8", users=3, as_of="2021-01-01"))
    assert config.model_dump(include=DECIDES)["codes"]["most"] == 2
    assert (config.dtype, config.users, config.as_of) == ("float32", 3, "2021-01-01")
    assert iso(generation.as_of_ms) >= "2020-09-13"
