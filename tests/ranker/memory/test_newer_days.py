"""Builds on a newer preparation, refreshes of any generation, records that are too old: who may go where in time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import distributed

from features.dataset import Dataset
from features.errors import UserError
from ranker.memory import build as building
from ranker.memory import refresh as refreshing
from ranker.memory import vanished
from ranker.memory.build import build, main
from ranker.memory.config import MemoryConfig
from ranker.memory.keys import hashes_of, user_keys
from ranker.memory.refresh import OLDEST, refresh
from ranker.memory.report import BuildReport, totals_of
from ranker.memory.stamps import BLOCK
from ranker.memory.store import StoreError, open_store
from ranker.memory.versions import versions_of
from ranker.run import Run
from tests.ranker.memory.built_memories import everything_in, same_numbers
from tests.ranker.memory.days import ACTIVE, GONE, NEW, QUIET, SMALL, day, trained
from tests.redis_servers import RedisServer

DAY_MS = 86_400_000


def built(days: Path, store: str, dataset: str = "two", **arguments: object) -> BuildReport:
    """A build's report."""
    report = build(days / "run", store, SMALL, dataset_root=days / dataset, **arguments)  # type: ignore[arg-type]
    assert report is not None
    return report


def test_a_build_on_a_newer_preparation_is_that_of_a_run_on_it(days: Path, store: str):
    before = open_store(store).generations()
    report = built(days, store)
    assert everything_in(store, report.generation.name) == everything_in(str(days / "rebuilt"))
    assert report.generation.notes["dataset"] == Dataset(days / "two").manifest.content_hash
    assert [one.name for one in open_store(store).generations()] == [before[0].name, report.generation.name]


def test_a_build_on_other_rows_is_refused(days: Path, store: str, tmp_path: Path):
    other = day(tmp_path / "other", 2, extra_categories=True)
    with pytest.raises(UserError, match=r"item.category: numbered or made otherwise"):
        build(days / "run", store, SMALL, dataset_root=other.root)


def test_after_a_refresh_a_build_does_not_take_readers_back(days: Path, store: str):
    """What the messages say to do is done."""
    refresh(days / "run", store, days / "two")
    (refreshed,) = open_store(store).generations()
    with pytest.raises(StoreError, match=r"they would lose events; give --dataset a newer .* --no-switch and another"):
        build(days / "run", store, SMALL)
    with pytest.raises(StoreError, match=r"has dataset .*a refresh may have brought it there.* another --name$"):
        build(days / "run", store, SMALL, switch=False)
    older = build(days / "run", store, SMALL, name="yesterday", switch=False)
    assert older is not None
    newest = built(days, store).generation
    assert len({refreshed.name, "yesterday", newest.name}) == 3
    assert newest.as_of_ms == refreshed.as_of_ms > older.generation.as_of_ms
    same_numbers(everything_in(store, newest.name), everything_in(str(days / "rebuilt")))


def test_readers_stay_with_what_was_refreshed_while_another_was_built(
    days: Path, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (first,) = open_store(store).generations()
    covered = building.covered

    def meanwhile(*arguments: object):
        found = covered(*arguments)  # type: ignore[arg-type]
        open_store(store).finish(first.model_copy(update={"as_of_ms": first.as_of_ms + 9 * DAY_MS}))
        return found

    monkeypatch.setattr(building, "covered", meanwhile)
    name = built(days, store).generation.name
    assert open_store(store).current(versions_of(Run(days / "run"))) == first.name
    assert [one.finished_ms is None for one in open_store(store).generations()] == [False, False]
    assert f"--generation {name}`), then switch" in " ".join(capsys.readouterr().err.split())


def test_a_generation_that_is_not_the_current_one_is_refreshed_by_its_name(days: Path, store: str):
    (current,) = open_store(store).generations()
    build(days / "run", store, SMALL, name="beside", switch=False)
    report = refresh(days / "run", store, days / "two", name="beside")
    assert report is not None
    assert (report.built.generation.name, report.built.made) == ("beside", len(ACTIVE) + len(NEW))
    assert open_store(store).generations()[0] == current
    with pytest.raises(StoreError, match=r"no generation 'other'; it has .*beside"):
        refresh(days / "run", store, days / "two", name="other")


def test_records_that_are_too_old_are_made_anew(days: Path, store: str, tmp_path: Path):
    """As a build of that time makes them; the generation says how old the oldest are."""
    later = MemoryConfig(users=8, as_of="2020-09-24")
    kept = refresh(days / "run", store, config=later, older_than_days=30)
    assert kept is not None
    assert (kept.built.made, kept.built.generation.notes[OLDEST][:10]) == (0, "2020-09-13")
    made = refresh(days / "run", store, config=later, older_than_days=5)
    assert made is not None
    assert (made.built.made, made.unchanged) == (len(ACTIVE) + len(QUIET) + 1, 0)
    assert made.built.generation.notes[OLDEST] == "2020-09-24 00:00:00"
    build(days / "run", str(tmp_path / "other"), SMALL.model_copy(update={"as_of": "2020-09-24"}))
    same_numbers(everything_in(store), everything_in(str(tmp_path / "other")))
    again = refresh(days / "run", store, config=later, older_than_days=5)
    assert again is not None
    assert again.built.made == 0


@pytest.mark.parametrize("job", ["build", "refresh"])
def test_records_are_stamped_by_the_checkpoint_that_made_them(
    days: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
):
    """Though training names another best one meanwhile."""
    run = Run(shutil.copytree(days / "run", tmp_path / "run"))
    first = run.best()
    other = Run(trained(tmp_path / "more", days / "one", "training.max_steps=3")).best()
    second = Path(shutil.copytree(other, first.with_name(other.name)))
    assert versions_of(run, first) != versions_of(run, second)
    whole = str(shutil.copytree(store, tmp_path / "whole"))
    refresh(days / "run", whole, days / "two")
    named = iter([first])
    monkeypatch.setattr(Run, "best", lambda self: next(named, second))
    if job == "build":
        assert build(run.root, str(tmp_path / "new"), SMALL) is not None
        found, wanted = everything_in(str(tmp_path / "new")), everything_in(str(days / "built"))
    else:
        refresh(run.root, store, days / "two")
        found, wanted = everything_in(store), everything_in(whole)
    same_numbers(found, wanted)


def gone_but_active(days: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the dataset had nobody else, and users were looked at three at a time."""
    keys = user_keys(hashes_of([*ACTIVE, *NEW]), BLOCK).key
    keys.sort()
    monkeypatch.setattr(vanished, "_stamp_keys", lambda *_: keys)
    monkeypatch.setattr(vanished, "BATCH", 3)


def test_removals_are_kept_batch_by_batch_and_gone_on_with(
    days: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Counts and records agree after each, and the other ranks are not kept waiting: there is no group any more."""
    whole = str(shutil.copytree(store, tmp_path / "whole"))
    gone_but_active(days, monkeypatch)
    refresh(days / "run", whole, days / "two", drop_vanished=True)
    left = everything_in(whole)
    assert {key for key in user_keys(hashes_of([*QUIET, GONE]), BLOCK).key.tolist() if key in left} == set()
    checks, dropping = iter(range(2)), refreshing.drop

    def dying(*arguments: object):
        *others, check = arguments

        def last() -> None:
            assert not distributed.is_initialized()
            check()  # type: ignore[operator]
            if next(checks, None) is None:
                raise KeyboardInterrupt

        dropping(*others, last)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(refreshing, "drop", dying)
        with pytest.raises(KeyboardInterrupt):
            refresh(days / "run", store, days / "two", drop_vanished=True)
    name, between = open_store(store).generations()[0].name, everything_in(store)
    users = sum(key in between for key in user_keys(hashes_of([*QUIET, GONE]), BLOCK).key.tolist())
    assert users == len(QUIET) + 1 - 2 * 3
    counts = totals_of(open_store(store), name)
    assert (counts["records"], counts["bytes"]) == (len(between), sum(map(len, between.values())))
    refresh(days / "run", store, days / "two", drop_vanished=True)
    assert everything_in(store) == left
    assert open_store(store).generations()[0].counts == open_store(whole).generations()[0].counts


def test_redis_is_refreshed_as_a_folder_is(days: Path, store: str, server: RedisServer):
    url = f"{server.url}?namespace=days"
    build(days / "run", url, SMALL)
    reports = [refresh(days / "run", one, days / "two", drop_vanished=True) for one in (url, store)]
    assert everything_in(url) == everything_in(store)
    (redis, folder) = [report.built.counts for report in reports if report is not None]
    assert redis == folder


def test_options_of_a_build_and_of_a_refresh_are_told_apart(capsys: pytest.CaptureFixture[str]):
    for given in (("--refresh", "--no-switch"), ("--older-than", "3"), ("--generation", "g")):
        with pytest.raises(SystemExit):
            main(["run", "--store", "lmdb:store", *given])
        assert "--name and --no-switch are of a build" in capsys.readouterr().err
