"""One job at a time writes a generation, and none takes it back in time, however jobs overlap or end."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
import torch

from features.errors import UserError
from features.instants import iso
from ranker.memory import build as building
from ranker.memory import job_lease
from ranker.memory import refresh as refreshing
from ranker.memory.build import build
from ranker.memory.config import MemoryConfig
from ranker.memory.job_lease import leased
from ranker.memory.lease import FILE, LeaseHeldError
from ranker.memory.redis_store import RedisStore
from ranker.memory.refresh import UNDER_WAY, refresh
from ranker.memory.store import Generation, StoreError, open_store
from ranker.ranks import Ranks
from tests.ranker.memory.built_memories import everything_in
from tests.ranker.memory.days import ACTIVE, NEW, SMALL
from tests.redis_servers import RedisServer

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
ONE_BY_ONE = MemoryConfig(users=1)


def generation_in(store: str) -> Generation:
    """The only one."""
    (generation,) = open_store(store).generations()
    return generation


def test_a_refresh_or_build_of_what_another_job_writes_is_refused(
    days: Path, store: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_lease, "ENDING_S", -1.0)
    before, records = generation_in(store), everything_in(store)
    with open_store(store).lease(before.name):
        with pytest.raises(LeaseHeldError, match=r"wait until it is done with generation .*, or stop it"):
            refresh(days / "run", store, days / "two")
        with pytest.raises(LeaseHeldError, match=r"wait until it is done with generation .*, or stop it"):
            build(days / "run", store, SMALL)
    assert (generation_in(store), everything_in(store)) == (before, records)


@pytest.mark.parametrize("job", ["build", "refresh"])
def test_a_job_that_writes_keeps_others_out(days: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str):
    url, refused = str(tmp_path / "store"), list[str]()
    module = building if job == "build" else refreshing
    if job == "refresh":
        shutil.copytree(days / "built", url)
    covered = module.covered

    def tried(*arguments: object):
        name = generation_in(url).name
        with pytest.raises(LeaseHeldError), open_store(url).lease(name):
            pass
        refused.append(name)
        return covered(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "covered", tried)
    if job == "build":
        build(days / "run", url, SMALL)
    else:
        refresh(days / "run", url, days / "two")
    assert refused == [generation_in(url).name]
    with open_store(url).lease(refused[0]):  # and lets them in at its end
        pass


def test_what_another_refresh_did_before_the_lease_was_taken_counts(
    days: Path, store: str, monkeypatch: pytest.MonkeyPatch
):
    """The day of a generation is looked at when nobody else can change it any more."""
    taking, later = refreshing.leased, generation_in(store).as_of_ms + 86_400_000

    def late(*arguments: object):
        opened = open_store(store)
        opened.finish(generation_in(store).model_copy(update={"as_of_ms": later}))
        return taking(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(refreshing, "leased", late)
    before = everything_in(store)
    with pytest.raises(UserError, match=r"a refresh would take events out of them; give --dataset a newer"):
        refresh(days / "run", store)
    assert (generation_in(store).as_of_ms, everything_in(store)) == (later, before)


def test_a_refresh_that_was_cut_off_is_not_followed_by_an_older_day(
    days: Path, store: str, monkeypatch: pytest.MonkeyPatch
):
    def dying(*_: object):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(refreshing, "replaced", dying)
        with pytest.raises(KeyboardInterrupt):
            refresh(days / "run", store, days / "two", ONE_BY_ONE)
    cut_off = generation_in(store)
    assert iso(cut_off.as_of_ms) > "2020-09-14"
    assert "the same command goes on" in cut_off.notes[UNDER_WAY]
    with pytest.raises(UserError, match=r"a refresh would take events out of them"):
        refresh(days / "run", store)
    report = refresh(days / "run", store, days / "two")
    assert report is not None
    assert report.built.made == len(ACTIVE) + len(NEW)
    assert UNDER_WAY not in generation_in(store).notes


def test_who_has_lost_the_lease_writes_no_more(days: Path, store: str, monkeypatch: pytest.MonkeyPatch):
    writing = refreshing.replaced

    def losing(*arguments: object):
        (Path(store) / "generations" / generation_in(store).name / FILE).unlink()
        return writing(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(refreshing, "replaced", losing)
        with pytest.raises(StoreError, match=r"was dropped or replaced while it was written"):
            refresh(days / "run", store, days / "two", ONE_BY_ONE)
    report = refresh(days / "run", store, days / "two")
    assert report is not None
    assert report.built.made == len(ACTIVE) + len(NEW) - 1


def test_a_job_that_is_started_again_waits_for_the_lease_that_the_killed_one_left(server: RedisServer):
    store = open_store(f"{server.url}?namespace=left")
    assert isinstance(store, RedisStore)
    key = store.at.key("lease", "g")
    redis.Redis(port=server.port).set(key, "token process 1 of elsewhere", px=700)
    with ExitStack() as held:
        began = time.monotonic()
        leased(store, "g", ALONE, held).check()
        assert time.monotonic() - began > 0.5
    store.close()


def test_it_does_not_wait_for_a_holder_who_lives(server: RedisServer):
    """Who has renewed his lease is waited for no longer: well before it could have ended."""
    store = open_store(f"{server.url}?namespace=living")
    began = time.monotonic()
    with (
        store.lease("g", 4.0),
        ExitStack() as held,
        pytest.raises(LeaseHeldError, match="is being written by process"),
    ):
        leased(store, "g", ALONE, held)
    assert time.monotonic() - began < 3.5
    store.close()
