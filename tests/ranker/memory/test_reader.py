"""The reader's answers are the candidate ranker's `memory`, whatever it is asked and whatever it finds."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from ranker.longseq.stored import Stored
from ranker.memory.counters import MemoryCounters, Read
from ranker.memory.encode import encode
from ranker.memory.keys import hashes_of, user_keys
from ranker.memory.reader import MemoryReader
from ranker.memory.store import StoreError, open_store
from tests.ranker.memory.stored_memories import CODES, VERSIONS, build, expected, generation_of, probes_of, put

Per = Literal["request", "probe"]
BLOCKS: dict[int, Per] = {0: "probe", 2: "request", 3: "request"}


def ragged(users: int) -> Stored:
    """A record a user: as many values as her number, one exact number, a time."""
    lengths = torch.stack([torch.arange(users), torch.ones(users, dtype=torch.int64)], 1)
    values = torch.cat([torch.full([user], float(user)) for user in range(users)] or [torch.zeros(0)])
    return Stored(values, -torch.arange(users).float(), lengths, 1_000 * torch.arange(users))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Ten users; block 0 by probe, blocks 2 and 3 by request, of which 3 has the first five users alone."""
    store = open_store(str(tmp_path))
    generation = generation_of(blocks=BLOCKS)
    writer = store.begin(generation)
    put(writer, range(10))
    for block, users in ((2, 10), (3, 5)):
        keys = user_keys(hashes_of(range(users)), block)
        writer.put_many(keys.key, encode(ragged(users), keys.fingerprint, VERSIONS, 7, "float32").values)
    writer.done("all")
    writer.close()
    store.finish(generation.model_copy(update={"finished_ms": 1}))
    store.switch(generation.name)
    return str(tmp_path)


def test_all_blocks_of_all_requests_are_one_answer(url: str):
    reader = MemoryReader(url, BLOCKS, VERSIONS)
    memory = reader.read([9, 4, 11], probes_of(3))
    parts = {f"{block}.{part}" for block in BLOCKS for part in ("values", "exact", "lengths", "time")}
    assert memory.keys() == parts
    assert memory["0.lengths"][:, 0].tolist() == [4] * 2 * CODES + [0] * CODES
    assert torch.equal(memory["0.values"], expected([9, 4]))
    assert memory["2.lengths"].tolist() == [[9, 1], [4, 1], [0, 0]]
    assert memory["2.values"].tolist() == [9.0] * 9 + [4.0] * 4
    assert memory["2.exact"].tolist() == [-9.0, -4.0]
    assert memory["2.time"].tolist() == [9_000, 4_000, 0]
    assert memory["3.lengths"].tolist() == [[0, 0], [4, 1], [0, 0]]
    for name, tensor in memory.items():
        assert tensor.dtype == (torch.float32 if name.endswith(("values", "exact")) else torch.int64)
    counted = reader.counters.snapshot()
    assert counted['ranker_memory_records_total{block="0",outcome="found"}'] == 2 * CODES
    assert counted['ranker_memory_records_total{block="3",outcome="missing"}'] == 2
    assert counted["ranker_memory_reads_total"] == counted["ranker_memory_read_seconds_count"] == 1
    assert counted['ranker_memory_read_seconds_bucket{le="+Inf"}'] == 1
    assert counted["ranker_memory_read_seconds_sum"] > 0
    assert counted['ranker_memory_generation_info{generation="monday"}'] == 1


def ages(counters: MemoryCounters) -> dict[str, float]:
    """The histogram, by its edges, with sum and count."""
    prefix = "ranker_memory_age_seconds_"
    counted = {name.removeprefix(prefix): n for name, n in counters.snapshot().items() if name.startswith(prefix)}
    return {name.removeprefix('bucket{le="').removesuffix('"}'): n for name, n in counted.items()}


def test_found_records_are_counted_by_their_age(tmp_path: Path):
    """Records of today, of 2 days ago and of a time to come in one generation, as refreshes leave them; a lost record
    has no age."""
    hour_ms = 3_600_000
    now_ms = time.time_ns() // 1_000_000
    store, generation = open_store(str(tmp_path)), generation_of(blocks={2: "request"})
    writer = store.begin(generation)
    for user, as_of in ((0, now_ms - hour_ms // 2), (1, now_ms - 47 * hour_ms), (2, now_ms + 9 * hour_ms)):
        keys = user_keys(hashes_of([user]), 2)
        writer.put_many(keys.key, encode(ragged(1), keys.fingerprint, VERSIONS, as_of, "float32").values)
    writer.close()
    store.finish(generation.model_copy(update={"finished_ms": 1}))
    store.switch(generation.name)
    reader = MemoryReader(str(tmp_path), {2: "request"}, VERSIONS)
    reader.read([0, 1, 2, 3, 0])
    counted = ages(reader.counters)
    total = counted.pop("sum")
    assert counted == {
        **dict.fromkeys(["3600", "10800", "21600", "43200", "86400"], 3),
        **dict.fromkeys(["172800", "259200", "604800", "1209600", "2592000", "7776000", "+Inf", "count"], 4),
    }
    assert total == pytest.approx(48 * 3_600, abs=60)  # and not less for the time to come


def test_the_generation_that_is_read_is_named_whatever_its_name():
    counters = MemoryCounters()
    assert not any("generation" in name for name in counters.snapshot())
    counters.read(0.001, Read({}, generation='a"b\\c\nd'))
    (shown,) = [name for name in counters.snapshot() if "generation" in name]
    assert shown == r'ranker_memory_generation_info{generation="a\"b\\c\nd"}'
    counters.read(0.001, Read({}, "no_generation"))
    assert not any("generation_info" in name for name in counters.snapshot())


def test_two_requests_of_one_user_have_their_own_records(url: str):
    memory = MemoryReader(url, BLOCKS, VERSIONS).read([4, "4"], probes_of(2))
    assert torch.equal(memory["0.values"], expected([4, 4]))
    assert memory["2.values"].tolist() == [4.0] * 8


def test_no_requests_are_no_records(url: str):
    memory = MemoryReader(url, BLOCKS, VERSIONS).read([], probes_of(0))
    assert [memory[f"{block}.lengths"].shape for block in BLOCKS] == [(0, 2)] * 3


def test_a_model_without_memories_reads_none(url: str):
    assert MemoryReader(url, {}, VERSIONS).read([1, 2]) == {}


@pytest.mark.parametrize(
    ("users", "probes"),
    [
        ([1, 2], {}),
        ([1, 2], {"0.code": torch.zeros(5), "0.request": torch.tensor([7, 8, 9, 1, 1])}),
        ([1, 2], {"0.code": torch.arange(5), "0.request": torch.arange(3)}),
        (None, {"0.code": torch.arange(5), "0.request": torch.zeros(5)}),
        ([1, 2], {"0.code": "no tensor", "0.request": None}),
    ],
)
def test_wrong_arguments_of_a_read_raise_nothing(url: str, users: Any, probes: Any, caplog: pytest.LogCaptureFixture):
    reader = MemoryReader(url, BLOCKS, VERSIONS)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            memory = reader.read(users, probes)
            assert memory["2.lengths"].tolist() == [[0, 0]] * (0 if users is None else 2)
            assert memory["0.values"].numel() == 0
    assert reader.counters.snapshot()["ranker_memory_errors_total"] == 3
    assert len(caplog.records) == 1


def test_wrong_arguments_of_the_reader_raise(tmp_path: Path):
    with pytest.raises(ValueError, match="block 0: 'user'; must be a number"):
        MemoryReader(str(tmp_path), {0: "user"}, VERSIONS)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="deadline_ms: 0; must be greater than 0"):
        MemoryReader(str(tmp_path), {0: "request"}, VERSIONS, deadline_ms=0)
    with pytest.raises(StoreError, match="a store of kind 'http'; use lmdb:PATH"):
        MemoryReader("http://x", {0: "request"}, VERSIONS)
    with pytest.raises(StoreError, match=r"redis\+cluster://h:1/3: a cluster has database 0 alone"):
        MemoryReader("redis+cluster://h:1/3", {0: "request"}, VERSIONS)
    with pytest.raises(StoreError, match="namespace 'a:b': use 1 to 64 letters"):
        MemoryReader("redis://h:1/3#a:b", {0: "request"}, VERSIONS)


def test_a_record_that_met_anothers_key_is_no_memory(url: str):
    """Of two users in one key the later one stays; the earlier one is told that it is not hers."""
    store = open_store(url)
    generation = generation_of("b", blocks=BLOCKS)
    keys, others = (user_keys(hashes_of([user]), 2) for user in (1, 2))
    writer = store.begin(generation)
    writer.put_many(keys.key, encode(ragged(1), others.fingerprint, VERSIONS, 7, "float32").values)
    writer.close()
    store.finish(generation.model_copy(update={"finished_ms": 1}))
    store.switch("b")
    reader = MemoryReader(url, {2: "request"}, VERSIONS)
    assert reader.read([1])["2.lengths"].tolist() == [[0, 0]]
    assert reader.counters.records("collision") == 1


def test_readers_of_one_process_share_a_store(url: str):
    readers = [MemoryReader(url, BLOCKS, VERSIONS) for _ in range(3)]
    for reader in readers:
        assert reader.read([4], probes_of(1))["2.values"].tolist() == [4.0] * 4
        reader.close()


def test_a_user_id_is_the_same_whether_number_or_text(tmp_path: Path):
    build(open_store(str(tmp_path)), generation_of(), [42])
    reader = MemoryReader(str(tmp_path), {0: "probe"}, VERSIONS)
    users: list[Any] = [42, "42", np.int64(42)]
    assert torch.equal(reader.read(users, probes_of(3))["0.values"], expected([42, 42, 42]))
