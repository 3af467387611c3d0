"""LMDB among processes: killed writers and readers, many writers, forks, growth, damage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch

from ranker.memory import lmdb_environment, lmdb_store, lmdb_writer
from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.lmdb_environment import LOCKING
from ranker.memory.reader import MemoryReader
from ranker.memory.record import size_of
from ranker.memory.store import StoreError, open_store
from ranker.memory.verify import verify
from tests.ranker.memory.stored_memories import CODES, VERSIONS, build, expected, generation_of, probes_of, put

ROOT = Path(__file__).parents[3]


def reader_of(url: str) -> MemoryReader:
    return MemoryReader(url, {0: "probe"}, VERSIONS, check_every_s=0.02)


def start(module: str, *arguments: object) -> subprocess.Popen[str]:
    """`python -m tests.ranker.memory.MODULE`, with its lines to be read."""
    command = [sys.executable, "-m", f"tests.ranker.memory.{module}", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_killed_writer_leaves_whole_units_and_can_be_gone_on_with(tmp_path: Path):
    url = f"lmdb:{tmp_path}"
    writer = start("writing", url, "monday", 0, 300, 0)
    assert [said(writer) for _ in range(3)] == ["0", "1", "2"]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    store = open_store(url)
    done = store.done("monday")
    assert {"0.0", "0.1", "0.2"} <= done.keys()
    found = verify(store, generation_of())
    assert found.bad == 0
    assert found.records >= len(done) * 300 * CODES
    for mark in done.values():
        assert mark["records"] == 300 * CODES
    again = store.begin(generation_of())
    put(again, range(300 * len(done), 300 * len(done) + 300))
    again.done("next")
    again.close()
    store.finish(generation_of(finished_ms=3))
    store.switch("monday")
    users = list(range(300 * len(done) + 300))
    assert torch.equal(reader_of(url).read(users, probes_of(len(users)))["0.values"], expected(users))


def test_processes_write_one_generation_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each of them grows the map, which the others take over."""
    url = f"lmdb:{tmp_path}"
    monkeypatch.setattr(lmdb_environment, "FIRST_MAP_BYTES", 1 << 17)
    store = open_store(url)
    mine = store.begin(generation_of())
    writers = [start("writing", url, "monday", 300 * (1 + i), 150, 2) for i in range(2)]
    for user in range(0, 300, 30):
        put(mine, range(user, user + 30))
        mine.done(str(user))
    mine.close()
    for writer in writers:
        assert writer.wait(120) == 0
    assert len(store.done("monday")) == 10 + 4
    found = verify(store, generation_of())
    assert (found.records, found.bad, found.overwritten) == (900 * CODES, 0, 0)


def test_the_map_grows_as_it_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lmdb_environment, "FIRST_MAP_BYTES", 1 << 18)
    monkeypatch.setattr(lmdb_writer, "COMMIT_BYTES", 1 << 20)
    store = open_store(str(tmp_path))
    build(store, generation_of(), range(5_000))
    assert store.size("monday").records == 5_000 * CODES
    assert store.size("monday").bytes > 1 << 20


@pytest.mark.parametrize(("commits", "full"), [(1, 0.95), (20, 0.64)])
def test_pages_are_filled(tmp_path: Path, commits: int, full: float):
    """Wholly by one commit; by many of them about as B-trees are by records in no order, ln 2, though those of a user,
    some pages of them, lie side by side."""
    store, size = open_store(str(tmp_path)), size_of("float16", 64)
    writer = store.begin(generation_of())
    for users in np.array_split(np.arange(200), commits):
        for user in users:
            keys = keys_of(hashes_of([user]), 0, np.zeros(100, np.int64), np.arange(100)).key
            writer.put_many(keys, [bytes(size)] * 100)
        writer.done(str(users[0]))
    writer.close()
    env = lmdb.open(str(tmp_path / "generations" / "monday"), readonly=True, max_dbs=2)
    with env.begin() as txn:
        pages = txn.stat(env.open_db(b"records", txn, create=False))
    env.close()
    of_record = size + 8 + 10  # its key, and what LMDB keeps of it
    assert pages["entries"] * of_record > full * pages["leaf_pages"] * pages["psize"]


def test_a_record_that_was_put_twice_is_the_later_one(tmp_path: Path):
    store = open_store(str(tmp_path))
    build(store, generation_of(), range(3), shift=1)
    build(store, generation_of(), range(1, 3), shift=2)
    values = reader_of(str(tmp_path)).read([0, 1, 2], probes_of(3))["0.values"].view(3, CODES, 4)
    assert values[:, :, 2].tolist() == [[1] * CODES, [2] * CODES, [2] * CODES]


def test_a_killed_reader_keeps_no_pages(tmp_path: Path):
    """Its slot in the lock table is cleared by the next commit, though others read on, so that pages are used again."""
    url = f"lmdb:{tmp_path}"
    store = open_store(url)
    build(store, generation_of(), range(50), shift=1)
    alive = start("reading", url, 50)
    assert said(alive) == "1.0"
    folder = tmp_path / "generations" / "monday"
    dies_within_a_look_up = (
        "import lmdb, os, signal\n"
        f"txn = lmdb.open({str(folder)!r}, readonly=True, max_dbs=2, max_readers={LOCKING['max_readers']}).begin()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", dies_within_a_look_up], check=False).returncode == -signal.SIGKILL
    sizes: list[int] = []
    for _ in range(25):
        writer = store.begin(generation_of())
        put(writer, range(50), shift=1)
        writer.close()
        sizes.append(store.size("monday").bytes)
    assert sizes[-1] < 2 * sizes[3]
    alive.communicate(timeout=60)


def test_a_reader_of_another_process_sees_a_switch_at_once_and_whole(tmp_path: Path):
    url = f"lmdb:{tmp_path}"
    store = open_store(url)
    build(store, generation_of("a"), range(30), shift=1)
    reader = start("reading", url, 30)
    try:
        assert said(reader) == "1.0"
        build(store, generation_of("b"), range(30), shift=2)
        assert said(reader) == "2.0"
        store.drop("a")
        build(store, generation_of("c"), range(30), shift=3)
        assert said(reader) == "3.0"
    finally:
        out, _ = reader.communicate(timeout=60)
    assert out == ""  # nothing but the three


def test_a_forked_process_reads_on_as_its_parent_does(tmp_path: Path):
    build(open_store(str(tmp_path)), generation_of(), range(3))
    reader = reader_of(str(tmp_path))
    wanted = expected([1])
    assert torch.equal(reader.read([1], probes_of(1))["0.values"], wanted)
    child = os.fork()
    if child == 0:
        right = torch.equal(reader.read([1], probes_of(1))["0.values"], wanted)
        os._exit(0 if right and not reader.counters.records("unavailable") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(reader.read([1], probes_of(1))["0.values"], wanted)
    assert reader.counters.records("unavailable") == 0


def test_what_a_process_reads_it_does_not_write(tmp_path: Path):
    store = open_store(str(tmp_path))
    build(store, generation_of(), range(3))
    reader = reader_of(str(tmp_path))
    with pytest.raises(StoreError, match="close this process's readers of it"):
        store.begin(generation_of())
    reader.close()
    store.begin(generation_of()).close()


def test_a_changed_record_is_lost_and_counted(tmp_path: Path):
    store = open_store(str(tmp_path))
    build(store, generation_of(), range(3))
    (key, record), (other, cut) = list(store.records("monday"))[:2]
    env = lmdb.open(str(tmp_path / "generations" / "monday"), max_dbs=2)
    records = env.open_db(b"records")
    with env.begin(write=True, db=records) as txn:
        txn.put(key.to_bytes(8, "big"), record[:-1] + bytes([record[-1] ^ 1]))
        txn.put(other.to_bytes(8, "big"), cut[:-8])
    env.close()
    reader = reader_of(str(tmp_path))
    lengths = reader.read([0, 1, 2], probes_of(3))["0.lengths"]
    assert (lengths[:, 0] == 0).sum() == 2
    assert (reader.counters.records("found"), reader.counters.records("corrupt")) == (3 * CODES - 2, 2)
    found = verify(store, generation_of())
    assert (found.bad, sorted(found.examples)) == (2, [key, other])


def test_a_folder_that_vanishes_or_is_no_store_gives_lost_records(tmp_path: Path):
    url = f"lmdb:{tmp_path / 'store'}"
    build(open_store(url), generation_of(), range(3))
    reader = reader_of(url)
    reader.read([1], probes_of(1))
    shutil.move(tmp_path / "store", tmp_path / "moved")
    time.sleep(0.03)
    assert reader.read([1], probes_of(1))["0.values"].numel() == 0
    shutil.move(tmp_path / "moved", tmp_path / "store")
    time.sleep(0.03)
    assert torch.equal(reader.read([1], probes_of(1))["0.values"], expected([1]))
    reader.close()

    (tmp_path / "store" / "generations" / "monday" / "data.mdb").write_bytes(b"no database" * 1000)
    damaged = reader_of(url)
    assert damaged.read([1], probes_of(1))["0.lengths"].tolist() == [[0, 0]] * CODES
    assert damaged.counters.snapshot()['ranker_memory_failures_total{reason="store"}'] == 1
    with pytest.raises(StoreError, match=r"cannot be read .*; drop it \(`ranker memory drop lmdb:.* monday`\)"):
        open_store(url).size("monday")


def test_a_generation_that_cannot_be_read_is_passed_by_and_can_be_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    store = open_store(str(tmp_path))
    build(store, generation_of("whole"), range(3))
    for name, data in (("half", b""), ("damaged", b"no database" * 1000)):
        (tmp_path / "generations" / name).mkdir()
        (tmp_path / "generations" / name / "data.mdb").write_bytes(data)
    odd = lmdb.open(str(tmp_path / "generations" / "odd"), max_dbs=2)
    about, _ = odd.open_db(b"about"), odd.open_db(b"records")
    with odd.begin(write=True, db=about) as txn:
        txn.put(b"generation", b'{"of": "another program"}')
    odd.close()
    for _ in range(2):
        assert [one.name for one in store.generations()] == ["whole"]
    said = capsys.readouterr().err
    for name, times in (("damaged", 1), ("odd", 1), ("half", 0)):
        assert said.count(f"(`ranker memory drop {store.url} {name}`)") == times
    store.switch("whole")
    with pytest.raises(StoreError, match=r"one that is damaged: `ranker memory drop"):
        store.begin(generation_of("damaged"))
    for name in ("half", "damaged", "odd"):
        store.drop(name)
        assert not (tmp_path / "generations" / name).exists()
    build(store, generation_of("damaged"), range(3))


def test_a_writer_reads_what_other_processes_made_larger_than_its_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lmdb_environment, "FIRST_MAP_BYTES", 1 << 17)
    url = f"lmdb:{tmp_path}"
    store = open_store(url)
    mine = store.begin(generation_of())
    put(mine, [0])
    mine.done("mine")
    assert start("writing", url, "monday", 1, 700, 1).wait(120) == 0
    assert store.done("monday").keys() == {"mine", "1.0"}
    assert store.size("monday").records == 701 * CODES
    mine.close()


def test_a_file_that_grows_beyond_a_servers_map_costs_it_no_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """While four threads read: the map moves between their look-ups."""
    monkeypatch.setattr(lmdb_environment, "RESERVED_BYTES", 1 << 17)
    url = f"lmdb:{tmp_path}"
    build(open_store(url), generation_of(), range(30))
    readers = [reader_of(url) for _ in range(2)]
    stop = threading.Event()
    wrong: list[int] = []

    def read(reader: MemoryReader) -> None:
        while not stop.is_set():
            if not torch.equal(reader.read([7, 29], probes_of(2))["0.values"], expected([7, 29])):
                wrong.append(1)

    threads = [threading.Thread(target=read, args=[reader]) for reader in readers * 2]
    for thread in threads:
        thread.start()
    assert start("writing", url, "monday", 30, 300, 4).wait(120) == 0
    time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert readers[0].counters.records("unavailable") == 0
    assert torch.equal(readers[0].read([1_229], probes_of(1))["0.values"], expected([1_229]))


def test_a_readers_map_has_room_for_a_file_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build(open_store(str(tmp_path)), generation_of(), range(2_000))
    monkeypatch.setattr(lmdb_environment, "RESERVED_BYTES", 1 << 10)
    folder = tmp_path / "generations" / "monday"
    opened = lmdb_environment.opened_for_reading(folder)
    assert opened.env.info()["map_size"] >= 4 * (folder / "data.mdb").stat().st_size


def test_a_generation_that_was_built_again_under_its_name_is_read_anew(tmp_path: Path):
    """Though another reader of this process still holds the removed file."""
    url = f"lmdb:{tmp_path}"
    store = open_store(url)
    build(store, generation_of("blue"), range(3), shift=1)
    held, busy = reader_of(url), reader_of(url)
    for reader in (held, busy):
        assert torch.equal(reader.read([1], probes_of(1))["0.values"], expected([1], 1))
    build(store, generation_of("green"), range(3), shift=2)
    time.sleep(0.03)
    assert torch.equal(busy.read([1], probes_of(1))["0.values"], expected([1], 2))
    store.drop("blue")
    build(store, generation_of("blue"), range(3), shift=3)
    time.sleep(0.03)
    assert torch.equal(busy.read([1], probes_of(1))["0.values"], expected([1], 3))
    assert torch.equal(held.read([1], probes_of(1))["0.values"], expected([1], 3))


def test_removals_are_committed_as_they_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lmdb_writer, "COMMIT_BYTES", 100 * lmdb_writer.REMOVAL_BYTES)
    store = open_store(str(tmp_path))
    build(store, generation_of(), range(20))
    writer = store.begin(generation_of())
    keys = np.array([key for key, _ in store.records("monday")], np.uint64)
    for at in range(0, 150, 10):
        writer.remove_many(keys[at : at + 10])
    assert store.size("monday").records == 20 * CODES - 100
    writer.done("removed")
    assert store.size("monday").records == 20 * CODES - 150


def test_records_may_be_removed_and_put_while_they_are_gone_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a map that has to grow meanwhile."""
    monkeypatch.setattr(lmdb_writer, "COMMIT_BYTES", 1)
    monkeypatch.setattr(lmdb_environment, "FIRST_MAP_BYTES", 1 << 17)
    monkeypatch.setattr(lmdb_store, "BATCH", 10)
    store = open_store(str(tmp_path))
    build(store, generation_of(), range(10))
    before = dict(store.records("monday"))
    writer, seen = store.begin(generation_of()), 0
    for key, _ in store.records("monday"):
        if key in before:
            seen += 1
            writer.remove_many(np.array([key], np.uint64))
            writer.put_many(np.array([2**64 - seen], np.uint64), [b"x" * 10_000])
    writer.close()
    assert seen == len(before)
    assert {key for key, _ in store.records("monday")} == {2**64 - i for i in range(1, seen + 1)}
