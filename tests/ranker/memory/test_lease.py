"""Of two who would write a generation, one does, in every kind of store."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from ranker.memory.store import StoreError, open_store
from tests.redis_servers import RedisServer

ROOT = Path(__file__).parents[3]
HOLDS = """
import sys, time
from ranker.memory.store import open_store
with open_store(sys.argv[1]).lease("monday", float(sys.argv[2])) as lease:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        lease.check()
        print("still held", flush=True)
    except Exception as error:
        print(error, flush=True)
"""


def elsewhere(url: str, seconds: float = 60.0) -> subprocess.Popen[str]:
    """A process that holds the lease till it is told to check it."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, url, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_until_the_first_is_done(url: str):
    store = open_store(url)
    with store.lease("monday") as lease:
        with pytest.raises(StoreError, match="wait until it is done with generation 'monday'"), store.lease("monday"):
            pass
        with store.lease("tuesday"):
            lease.check()
    with store.lease("monday") as again:
        again.check()


def test_a_refused_process_is_told_who_writes(url: str):
    other = elsewhere(url)
    try:
        with pytest.raises(StoreError, match=f"is being written by process {other.pid} of "):
            open_store(url).lease("monday").__enter__()
    finally:
        out, _ = other.communicate("\n", timeout=60)
    assert out == "still held\n"
    with open_store(url).lease("monday"):
        pass


def test_a_lease_ends_with_what_it_was_held_for(url: str):
    with pytest.raises(ZeroDivisionError), open_store(url).lease("monday"):
        _ = 1 / 0
    with open_store(url).lease("monday"):
        pass


def test_the_lease_of_a_killed_process_ends(url: str):
    other = elsewhere(url, 1.0)
    other.send_signal(signal.SIGKILL)
    other.wait()
    end = time.monotonic() + 30
    while True:
        try:
            with open_store(url).lease("monday"):
                return
        except StoreError:
            assert "redis" in url
            assert time.monotonic() < end
            time.sleep(0.1)


def test_a_lease_in_redis_is_renewed_while_it_is_held(server: RedisServer):
    url = f"{server.url}?namespace=renewed"
    with open_store(url).lease("monday", 0.6) as lease:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            with pytest.raises(StoreError), open_store(url).lease("monday"):
                pass
            time.sleep(0.1)
        lease.check()


def test_a_stalled_holder_notices_that_another_writes_and_leaves_its_lease_alone(server: RedisServer):
    url = f"{server.url}?namespace=stalled"
    other = elsewhere(url, 0.6)
    other.send_signal(signal.SIGSTOP)
    client = redis.Redis.from_url(server.url)
    while client.exists("stalled:lease:monday"):
        time.sleep(0.05)
    with open_store(url).lease("monday") as lease:
        other.send_signal(signal.SIGCONT)
        out, _ = other.communicate("\n", timeout=60)
        assert "another may write now; start the command again" in out
        lease.check()


def test_an_expired_lease_is_lost_though_nobody_took_it(server: RedisServer):
    url = f"{server.url}?namespace=expired"
    with open_store(url).lease("monday") as lease:
        redis.Redis.from_url(server.url).delete("expired:lease:monday")
        for _ in range(2):
            with pytest.raises(StoreError, match="did not renew its lease"):
                lease.check()


def test_a_lease_without_its_server_is_no_lease(own_server: RedisServer):
    with open_store(own_server.url).lease("monday", 4.0) as lease:
        own_server.kill()
        with pytest.raises(StoreError, match="see that the server is there"):
            lease.check()


def test_a_lease_of_a_folder_that_was_removed_is_lost(tmp_path: Path):
    with open_store(str(tmp_path)).lease("monday") as lease:
        lease.check()
        shutil.rmtree(tmp_path / "generations" / "monday")
        with pytest.raises(StoreError, match="was dropped or replaced while it was written"):
            lease.check()
