"""Batched reads of memories beside raw ones: how much of the store's own speed is left to a server.

    python -m tests.benchmarks.memory_store [--users 1000] [--codes 500] [--repeats 500] [--records 100,200,300,500]

UxSID's records, two rows of 32 numbers each, of `users` users with `codes` codes each. A read asks for so many records
of one user, drawn anew each time: :class:`ranker.memory.reader.MemoryReader` from raw user id and codes to checked
float32 tensors. The named alternatives get their keys ready made and give bytes:

- LMDB: one read transaction, one cursor, ``cursor.getmulti``, or one transaction, ``Transaction.get`` of one key after
  another; keys in the order of the codes;
- Redis: redis-py's ``MGET``, and its pipeline of ``GET``, from a redis-server on the loopback, started and ended here.

The ways alternate, each with a user of its own. share: the alternative's median time over the reader's, which is the
share of its look-ups a second that remains.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb
import numpy as np
import redis
import torch

from ranker.longseq.stored import Stored, store_rows
from ranker.memory.encode import encode
from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.reader import MemoryReader
from ranker.memory.record import DTYPES, Dtype, size_of
from ranker.memory.redis_url import RedisUrl, key_names
from ranker.memory.store import Generation, open_store
from ranker.memory.versions import MemoryVersions
from tests.benchmarks.machine import machine
from tests.redis_servers import SERVER, redis_server

ROWS, WIDTH = 2, 32
VERSIONS = MemoryVersions(1, 2)
Probes = dict[str, torch.Tensor]
Way = Callable[[int, Probes], float]
"""seconds that a read of a user's probes takes"""


def stored_of(codes: int, generator: torch.Generator) -> Stored:
    """One user's records."""
    return store_rows(torch.randn(codes, ROWS, WIDTH, generator=generator))


def build(url: str, dtype: Dtype, users: int, codes: int) -> float:
    """A store of a finished generation named by its dtype; records a second that were encoded and put."""
    store, generator = open_store(url), torch.Generator().manual_seed(0)
    model, codebook = VERSIONS
    generation = Generation(
        name=dtype, model=model, codebook=codebook, dtype=dtype, blocks={0: "probe"}, as_of_ms=0, begun_ms=0
    )
    writer, request, code = store.begin(generation), np.zeros(codes, np.int64), np.arange(codes)
    took = 0.0
    for user in range(users):
        stored = stored_of(codes, generator)
        begin = time.perf_counter()
        keys = keys_of(hashes_of([user]), 0, request, code)
        writer.put_many(keys.key, encode(stored, keys.fingerprint, VERSIONS, 0, dtype).values)
        took += time.perf_counter() - begin
    begin = time.perf_counter()
    writer.done("all")
    took += time.perf_counter() - begin
    writer.close()
    store.finish(generation.model_copy(update={"finished_ms": 1}))
    store.switch(dtype)
    store.close()
    return users * codes / took


def reading(reader: MemoryReader) -> Way:
    """The whole read; every record must be there."""

    def way(user: int, probes: Probes) -> float:
        begin = time.perf_counter()
        memory = reader.read([user], probes)
        took = time.perf_counter() - begin
        if memory["0.values"].numel() != ROWS * WIDTH * probes["0.code"].numel():
            raise RuntimeError(f"records are missing: {reader.counters.snapshot()}")
        return took

    return way


def keys_for(user: int, probes: Probes) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return keys_of(hashes_of([user]), 0, probes["0.request"].numpy(), probes["0.code"].numpy()).key


@contextmanager
def raw_lmdb(folder: Path) -> Iterator[dict[str, Way]]:
    """By LMDB's own interface, with its own settings."""
    env = lmdb.open(str(folder), readonly=True, max_dbs=2, readahead=False, map_size=1 << 40)
    records = env.open_db(b"records", create=False)

    def getmulti(user: int, probes: Probes) -> float:
        names = keys_for(user, probes).astype(">u8").view("V8").tolist()
        begin = time.perf_counter()
        with env.begin(db=records) as txn, txn.cursor() as cursor:
            found = cursor.getmulti(names)
        took = time.perf_counter() - begin
        if len(found) != len(names):
            raise RuntimeError(f"{len(names) - len(found)} of {len(names)} records are missing")
        return took

    def get(user: int, probes: Probes) -> float:
        names = keys_for(user, probes).astype(">u8").view("V8").tolist()
        begin = time.perf_counter()
        with env.begin(db=records) as txn:
            found = [txn.get(name) for name in names]
        took = time.perf_counter() - begin
        if None in found:
            raise RuntimeError(f"{found.count(None)} of {len(names)} records are missing")
        return took

    yield {"getmulti": getmulti, "get": get}
    env.close()


def raw_redis(url: RedisUrl, generation: str, pipelined: bool) -> Way:
    """By redis-py."""
    client = redis.Redis.from_url(url.client)

    def way(user: int, probes: Probes) -> float:
        names = key_names(url.prefix(generation), keys_for(user, probes))
        begin = time.perf_counter()
        if pipelined:
            pipeline = client.pipeline(transaction=False)
            for name in names:
                pipeline.get(name)
            found = pipeline.execute()
        else:
            found = client.mget(names)
        took = time.perf_counter() - begin
        if None in found:
            raise RuntimeError(f"{found.count(None)} of {len(names)} records are missing")
        return took

    return way


def alternate(ways: dict[str, Way], users: int, codes: int, records: int, repeats: int) -> dict[str, list[float]]:
    """Times of each way; the first tenth of the rounds, untimed, warms up."""
    random = np.random.default_rng(records)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + repeats // 10):
        for name, way in ways.items():
            code = torch.from_numpy(np.sort(random.permutation(codes)[:records]))
            took = way(int(random.integers(users)), {"0.request": torch.zeros_like(code), "0.code": code})
            if repeat >= repeats // 10:
                times[name].append(took)
    return times


def report(store: str, dtype: Dtype, records: int, times: dict[str, list[float]]) -> None:
    """One line a way; `read` last, with its share of the others' speed."""
    medians = {name: float(np.median(found)) for name, found in times.items()}
    for name, found in times.items():
        shares = [f"{medians[other] / medians[name]:.2f} of {other}" for other in times if other != name]
        print(
            f"  {store:<6}{dtype:<9}{records:>5} records  {name:<9}{1e3 * medians[name]:>8.3f} ms median "
            f"{1e3 * float(np.percentile(found, 99)):>8.3f} ms p99 {records / medians[name] / 1e3:>8,.0f} k look-ups/s"
            + (f"   share {', '.join(shares)}" if name == "read" else ""),
            flush=True,
        )


def run_lmdb(root: Path, users: int, codes: int, counts: list[int], repeats: int) -> None:
    """Reader and raw look-ups read two copies of one environment: a process may open each but once."""
    for dtype in DTYPES:
        folder = root / dtype
        speed = build(f"lmdb:{folder}", dtype, users, codes)
        print(f"  lmdb  {dtype:<9}{speed:>12,.0f} records/s encoded and put")
        copied = root / f"{dtype}.raw"
        shutil.copytree(folder / "generations" / dtype, copied)
        reader = MemoryReader(f"lmdb:{folder}", {0: "probe"}, VERSIONS)
        with raw_lmdb(copied) as raw:
            for records in counts:
                times = alternate(raw | {"read": reading(reader)}, users, codes, records, repeats)
                report("lmdb", dtype, records, times)
        reader.close()


def run_redis(root: Path, users: int, codes: int, counts: list[int], repeats: int) -> None:
    """One server for all; a generation a dtype."""
    if SERVER is None:
        print("  redis: no redis-server on this machine")
        return
    said = subprocess.run([SERVER, "--version"], check=True, capture_output=True, text=True).stdout
    print(f"  redis: {said.strip()}")
    with redis_server(root) as server:
        url = RedisUrl.parse(server.url)
        for dtype in DTYPES:
            speed = build(server.url, dtype, users, codes)
            print(f"  redis {dtype:<9}{speed:>12,.0f} records/s encoded and put")
            reader = MemoryReader(server.url, {0: "probe"}, VERSIONS, deadline_ms=10_000)
            for records in counts:
                ways = {"MGET": raw_redis(url, dtype, False), "pipeline": raw_redis(url, dtype, True)}
                times = alternate(ways | {"read": reading(reader)}, users, codes, records, repeats)
                report("redis", dtype, records, times)
            reader.close()


def main() -> None:
    """Print machine, sizes, times and shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--codes", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--records", default="100,200,300,500", help="of a read")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    counts = [int(count) for count in options.records.split(",")]
    print(f"machine   {machine('torch', 'numpy', 'lmdb', 'redis', threads=options.threads)}")
    bytes_each = ", ".join(f"{dtype} {size_of(dtype, ROWS * WIDTH)}" for dtype in DTYPES)
    print(f"sizes     {options.users * options.codes:,} records of {ROWS} × {WIDTH} numbers; bytes each: {bytes_each}")
    with tempfile.TemporaryDirectory() as folder:
        run_lmdb(Path(folder) / "lmdb", options.users, options.codes, counts, options.repeats)
        run_redis(Path(folder) / "redis", options.users, options.codes, counts, options.repeats)


if __name__ == "__main__":
    main()
