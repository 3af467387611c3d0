"""Stores of each kind remove records, in order with what is put."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from ranker.memory.store import Generation, MemoryStore, open_store
from tests.redis_servers import SERVER, redis_server

KEYS = np.array([3, 2**63, 2**64 - 1], np.uint64)


@pytest.fixture(params=["lmdb", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Generator[MemoryStore]:
    """An empty one."""
    if request.param == "lmdb":
        yield open_store(f"lmdb:{tmp_path / 'store'}")
        return
    if SERVER is None:
        pytest.skip("no redis-server on this machine")
    with redis_server(tmp_path / "redis") as server:
        store = open_store(f"{server.url}?namespace=removal")
        yield store
        store.close()


def test_removed_records_are_gone_and_others_stay(store: MemoryStore):
    writer = store.begin(
        Generation(name="g", model=1, codebook=0, dtype="float32", blocks={0: "request"}, as_of_ms=0, begun_ms=0)
    )
    writer.put_many(KEYS, [b"a", b"b", b"c"])
    writer.done("first")
    writer.remove_many(KEYS[:2])
    writer.remove_many(np.array([77], np.uint64))
    writer.put_many(KEYS[1:2], [b"again"])
    writer.done("second")
    assert store.get("g", KEYS) == [None, b"again", b"c"]
    assert sorted(store.records("g")) == sorted([(2**63, b"again"), (2**64 - 1, b"c")])
    writer.close()
