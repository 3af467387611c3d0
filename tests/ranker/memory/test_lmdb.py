"""LMDB among processes: killed writers and readers, many writers, forks, growth, damage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmdb
import pytest
import torch

from ranker.memory import lmdb_store
from ranker.memory.lmdb_reader import LOCKING
from ranker.memory.reader import MemoryReader
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
    monkeypatch.setattr(lmdb_store, "FIRST_MAP_BYTES", 1 << 17)
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
    monkeypatch.setattr(lmdb_store, "FIRST_MAP_BYTES", 1 << 18)
    monkeypatch.setattr(lmdb_store, "COMMIT_BYTES", 1 << 20)
    store = open_store(str(tmp_path))
    build(store, generation_of(), range(5_000))
    assert store.size("monday").records == 5_000 * CODES
    assert store.size("monday").bytes > 1 << 20


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
    with pytest.raises(StoreError, match=r"cannot be read .*; build the generation again"):
        open_store(url).generations()
