"""What every kind of store promises: generations, marks, one switch for all readers."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.reader import MemoryReader
from ranker.memory.store import StoreError, open_store
from ranker.memory.versions import MemoryVersions
from tests.ranker.memory.stored_memories import (
    CODES,
    VERSIONS,
    build,
    expected,
    generation_of,
    probes_of,
    put,
)
from tests.redis_servers import RedisServer


def reader_of(url: str, versions: MemoryVersions = VERSIONS) -> MemoryReader:
    """In no haste: what it is asked in these tests it must find, however busy the machine."""
    return MemoryReader(url, {0: "probe"}, versions, deadline_ms=10_000, check_every_s=0.02)


def test_what_was_put_is_read(url: str):
    store = open_store(url)
    build(store, generation_of(), range(50))
    reader = reader_of(url)
    memory = reader.read([3, "49", 0], probes_of(3))
    assert torch.equal(memory["0.values"], expected([3, 49, 0]))
    assert memory["0.lengths"].tolist() == [[4, 0]] * 3 * CODES
    assert reader.generation() == "monday"
    assert reader.counters.records("found") == 3 * CODES
    reader.close()
    store.close()


def test_missing_users_and_codes_are_lost_and_counted(url: str):
    build(open_store(url), generation_of(), range(5))
    reader = reader_of(url)
    probes = {"0.request": torch.tensor([0, 0, 1, 2]), "0.code": torch.tensor([2, 99, 1, 7])}
    memory = reader.read([4, 1_000, 0], probes)
    assert memory["0.lengths"].tolist() == [[4, 0], [0, 0], [0, 0], [4, 0]]
    assert memory["0.values"].tolist() == [4, 2, 0, -2, 0, 7, 0, -7]
    assert (reader.counters.records("found"), reader.counters.records("missing")) == (2, 2)
    reader.close()


def test_marks_say_which_units_are_done(url: str):
    store = open_store(url)
    writer = store.begin(generation_of())
    put(writer, range(3))
    writer.done("partition 0", {"users": 3})
    put(writer, range(3, 5))
    writer.close()
    assert store.done("monday") == {"partition 0": {"records": 3 * CODES, "bytes": 3 * CODES * 72, "users": 3}}

    again = store.begin(generation_of())  # what was cut off goes on
    put(again, range(3, 5))
    again.done("partition 1")
    again.close()
    assert store.done("monday").keys() == {"partition 0", "partition 1"}
    assert store.size("monday").records == 5 * CODES
    assert sum(1 for _ in store.records("monday")) == 5 * CODES


def test_a_generation_takes_no_records_of_another_kind(url: str):
    store = open_store(url)
    store.begin(generation_of()).close()
    for change, message in (
        ({"dtype": "int8"}, "has dtype 'float32', and these records 'int8'"),
        ({"model": 4}, "has model"),
        ({"blocks": {0: "request"}}, "has blocks"),
    ):
        with pytest.raises(StoreError, match=message):
            store.begin(generation_of(**change))


def test_an_unfinished_generation_cannot_be_current(url: str):
    store = open_store(url)
    store.begin(generation_of()).close()
    with pytest.raises(StoreError, match="'monday' is not finished; go on with its build"):
        store.switch("monday")
    with pytest.raises(StoreError, match="no generation 'tuesday'; it has monday"):
        store.switch("tuesday")
    assert store.current(VERSIONS) is None
    assert store.currents() == {}


def test_generations_are_listed_kept_and_dropped(url: str):
    store = open_store(url)
    assert store.generations() == []
    build(store, generation_of("b", begun_ms=1, notes={"run": "x"}), range(4))
    build(store, generation_of("a", begun_ms=2), range(2))
    first, second = store.generations()
    assert (first.name, second.name, store.current(VERSIONS)) == ("b", "a", "a")
    assert (first.notes, first.versions, first.finished_ms) == ({"run": "x"}, VERSIONS, 9)
    with pytest.raises(StoreError, match="'a' is the current one"):
        store.drop("a")
    store.drop("b")
    assert [one.name for one in store.generations()] == ["a"]
    with pytest.raises(StoreError, match="no generation 'b'"):
        list(store.records("b"))
    with pytest.raises(StoreError, match="no generation 'b'"):
        store.drop("b")
    assert sum(1 for _ in store.records("a")) == 2 * CODES
    with pytest.raises(StoreError, match="use 1 to 64 letters"):
        store.begin(generation_of("../a"))


def test_get_finds_records_of_any_generation(url: str):
    store = open_store(url)
    build(store, generation_of("a"), [7])
    build(store, generation_of("b"), [8])
    keys = keys_of(hashes_of([7]), 0, np.zeros(CODES, np.int64), np.arange(CODES)).key
    assert None not in store.get("a", keys)
    assert store.get("b", keys) == [None] * CODES


def test_a_reader_sees_one_generation_or_the_other_never_both(url: str):
    """While builds are switched to one after another, every read is wholly of one of them, the newest in the end."""
    store = open_store(url)
    build(store, generation_of("g0"), range(20), shift=0.0)
    reader = reader_of(url)
    wrong: list[list[float]] = []
    reads: list[float] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            values = reader.read(list(range(10)), probes_of(10))["0.values"].view(-1, 4)
            shifts = values[:, 2].unique().tolist()
            reads.extend(shifts)
            if len(shifts) != 1 or len(values) != 10 * CODES:
                wrong.append(shifts)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 4):
        build(store, generation_of(f"g{number}", begun_ms=5 + number), range(20), shift=float(number))
        end = time.monotonic() + 20
        while float(number) not in reads and time.monotonic() < end:
            time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert set(reads) == {0.0, 1.0, 2.0, 3.0}
    assert reader.counters.records("missing") == 0
    reader.close()


def test_a_store_that_comes_later_is_found(url: str):
    reader = reader_of(url)
    assert reader.read([1], probes_of(1))["0.lengths"].tolist() == [[0, 0]] * CODES
    assert reader.counters.snapshot()['ranker_memory_failures_total{reason="no_generation"}'] == 1
    build(open_store(url), generation_of(), range(3))
    time.sleep(0.03)
    assert torch.equal(reader.read([1], probes_of(1))["0.values"], expected([1]))
    reader.close()
    assert reader.read([1], probes_of(1))["0.values"].numel() == 0
    assert reader.counters.snapshot()['ranker_memory_failures_total{reason="closed"}'] == 1


def test_records_of_other_versions_are_lost(url: str):
    store = open_store(url)
    build(store, generation_of(), [0])
    writer = store.begin(generation_of())
    put(writer, [1], versions=VERSIONS._replace(codebook=4))
    writer.close()
    reader = reader_of(url)
    assert reader.read([1], probes_of(1))["0.lengths"].tolist() == [[0, 0]] * CODES
    assert reader.counters.records("old_version") == CODES
    reader.close()


OTHER = VERSIONS._replace(model=4)


def test_two_models_share_a_store_each_with_a_current_generation_of_its_own(url: str):
    store = open_store(url)
    build(store, generation_of("old"), range(3), shift=1)
    old = reader_of(url)
    build(store, generation_of("new", begun_ms=6, model=OTHER.model), range(3), shift=2)
    new = reader_of(url, versions=OTHER)
    assert store.currents() == {OTHER: "new", VERSIONS: "old"}
    time.sleep(0.03)
    for reader, shift in ((old, 1), (new, 2)):
        assert torch.equal(reader.read([1], probes_of(1))["0.values"], expected([1], shift))
    build(store, generation_of("newer", begun_ms=7), range(3), shift=3)
    time.sleep(0.03)
    for reader, shift in ((old, 3), (new, 2)):
        reader.read([1], probes_of(1))  # by which Redis' readers learn of the switch
        assert torch.equal(reader.read([1], probes_of(1))["0.values"], expected([1], shift))
    assert (store.current(VERSIONS), store.current(OTHER)) == ("newer", "new")
    old.close()
    new.close()


def test_a_current_generation_that_is_dropped_leaves_its_models_readers_with_nothing(url: str):
    store = open_store(url)
    build(store, generation_of("old"), range(3), shift=1)
    build(store, generation_of("new", begun_ms=6, model=OTHER.model), range(3), shift=2)
    readers = reader_of(url), reader_of(url, versions=OTHER)
    for reader in readers:
        reader.read([1], probes_of(1))
    with pytest.raises(StoreError, match=r"'old' is the current one of model ffff.* drop it with --current"):
        store.drop("old")
    store.drop("old", current=True)
    time.sleep(0.03)
    for reader in readers:
        reader.read([1], probes_of(1))
    time.sleep(0.03)
    gone, there = (reader.read([1], probes_of(1))["0.values"] for reader in readers)
    assert (store.currents(), [one.name for one in store.generations()]) == ({OTHER: "new"}, ["new"])
    assert (gone.numel(), readers[0].generation()) == (0, None)
    assert readers[0].counters.snapshot()['ranker_memory_failures_total{reason="no_generation"}'] > 0
    assert torch.equal(there, expected([1], 2))
    for reader in readers:
        reader.close()


def test_what_is_being_written_is_not_dropped(url: str):
    store = open_store(url)
    build(store, generation_of("a"), range(3))
    build(store, generation_of("b", begun_ms=6), range(3))
    with store.lease("a"), pytest.raises(StoreError, match="wait until it is done with generation 'a'"):
        store.drop("a")
    store.drop("a")


def test_a_generation_of_which_redis_knows_nothing_readable_is_passed_by_and_can_be_dropped(
    server: RedisServer, capsys: pytest.CaptureFixture[str]
):
    store = open_store(f"{server.url}?namespace=unreadable")
    build(store, generation_of("whole"), range(3))
    store.begin(generation_of("odd")).close()
    server.client().hset("unreadable:generations", "odd", '{"of": "another program"}')
    for _ in range(2):
        assert [one.name for one in store.generations()] == ["whole"]
    assert capsys.readouterr().err.count(f"(`ranker memory drop {store.url} odd`)") == 1
    store.drop("odd")
    assert server.client().hkeys("unreadable:generations") == [b"whole"]
