"""Whatever Redis does, a read ends in time, raises nothing, counts what was lost, and never takes an old answer."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ranker.memory.reader import MemoryReader
from ranker.memory.store import StoreError, open_store
from tests.free_ports import free_port
from tests.ranker.memory.stored_memories import CODES, VERSIONS, build, expected, generation_of, probes_of, put
from tests.redis_servers import CLI, SERVER, RedisServer, redis_server

SLACK_S = 0.5
"""a loaded machine runs us late; a read that waits for the server takes seconds"""


def reader_of(url: str, deadline_ms: float = 100, retry_after_s: float = 0.3) -> MemoryReader:
    return MemoryReader(url, {0: "probe"}, VERSIONS, deadline_ms, check_every_s=60, retry_after_s=retry_after_s)


def failures(reader: MemoryReader) -> dict[str, float]:
    """By reason."""
    prefix = 'ranker_memory_failures_total{reason="'
    counted = reader.counters.snapshot().items()
    return {name.removeprefix(prefix).removesuffix('"}'): n for name, n in counted if name.startswith(prefix)}


def lost(reader: MemoryReader, user: int = 1) -> bool:
    """Read a user; whether all was lost, as it should be told."""
    memory = reader.read([user], probes_of(1))
    assert memory["0.lengths"].shape == (CODES, 2)
    if memory["0.values"].numel() == 0:
        assert memory["0.lengths"].count_nonzero() == 0
        return True
    assert torch.equal(memory["0.values"], expected([user]))
    return False


def until_found(reader: MemoryReader, user: int = 1) -> None:
    end = time.monotonic() + 20
    while lost(reader, user):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_server_that_is_absent_at_the_start_is_counted_and_found_later(tmp_path: Path):
    if SERVER is None:
        pytest.skip("no redis-server on this machine")
    server = RedisServer(tmp_path)
    reader = reader_of(server.url)
    assert lost(reader)
    assert failures(reader) == {"connection": 1}
    assert lost(reader)
    assert failures(reader) == {"connection": 1, "backing_off": 1}
    assert reader.counters.records("unavailable") == 2 * CODES
    try:
        server.start()
        build(open_store(server.url), generation_of(), range(3))
        until_found(reader)
    finally:
        server.kill()


def test_a_killed_server_is_lost_records_until_it_is_back(own_server: RedisServer):
    store = open_store(own_server.url)
    build(store, generation_of(), range(3))
    reader = reader_of(own_server.url)
    until_found(reader)
    own_server.kill()
    before = time.monotonic()
    assert all([lost(reader) for _ in range(20)])
    assert time.monotonic() - before < SLACK_S
    store.close()
    own_server.start()
    build(store, generation_of(), range(3))
    until_found(reader)


def test_a_restart_between_two_reads_costs_none(own_server: RedisServer):
    """Connections that died idling are made anew within the read."""
    build(open_store(own_server.url), generation_of(), range(3))
    reader = reader_of(own_server.url, deadline_ms=5_000)
    until_found(reader)
    own_server.kill()
    own_server.start()
    build(open_store(own_server.url), generation_of(), range(3))
    assert not lost(reader)
    assert failures(reader) == {}


def test_a_stalled_server_costs_one_deadline(own_server: RedisServer):
    build(open_store(own_server.url), generation_of(), range(100))
    reader = reader_of(own_server.url, retry_after_s=3.0)
    until_found(reader)
    before_it = failures(reader)
    found, unavailable = reader.counters.records("found"), reader.counters.records("unavailable")
    own_server.send(signal.SIGSTOP)
    before = time.monotonic()
    assert lost(reader, 1)
    assert 0.1 <= time.monotonic() - before < 0.1 + SLACK_S
    before = time.monotonic()
    assert all([lost(reader, 2) for _ in range(30)])
    assert time.monotonic() - before < SLACK_S
    for reason, count in (("timeout", 1), ("backing_off", 30)):
        assert failures(reader)[reason] == before_it.get(reason, 0) + count
    assert reader.counters.records("found") == found
    assert reader.counters.records("unavailable") == unavailable + 31 * CODES
    own_server.send(signal.SIGCONT)
    until_found(reader, 3)


def test_no_late_answer_is_taken_for_another_requests(own_server: RedisServer):
    """The server is stopped and let go again and again while threads read different users: what `lost` checks is that
    whatever is found is the asked user's."""
    build(open_store(own_server.url), generation_of(), range(100))
    reader = reader_of(own_server.url, deadline_ms=20, retry_after_s=0.02)
    wrong: list[BaseException] = []
    stop = threading.Event()

    def read(first: int) -> None:
        user = first
        while not stop.is_set():
            user = (user + 7) % 100
            try:
                lost(reader, user)
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=read, args=[first]) for first in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        time.sleep(0.05)
        own_server.send(signal.SIGSTOP)
        time.sleep(0.05)
        own_server.send(signal.SIGCONT)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert failures(reader)["timeout"] > 0
    assert reader.counters.records("found") > 0
    assert reader.counters.records("collision") == 0


@contextmanager
def forwarding(server: RedisServer, answer: Callable[[bytes], Generator[bytes]]) -> Generator[int]:
    """A port whose connections go to the server, and whose answers come back as `answer` makes them of the server's."""
    listening = socket.create_server(("127.0.0.1", 0))
    open_sockets = [listening]

    def forward(near: socket.socket) -> None:
        far = socket.create_connection(("127.0.0.1", server.port))
        open_sockets.append(far)
        try:
            while asked := near.recv(1 << 16):
                far.sendall(asked)
                far.settimeout(0.05)
                answered = b""
                try:
                    while more := far.recv(1 << 16):
                        answered += more
                except TimeoutError:
                    pass
                for part in answer(answered):
                    near.sendall(part)
        except OSError:
            return  # the reader has gone

    def serve() -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return  # closed at the test's end
            open_sockets.append(near)
            threading.Thread(target=forward, args=[near], daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        for one in open_sockets:
            one.close()


def test_an_answer_that_trickles_ends_at_the_deadline(own_server: RedisServer):
    """Each byte comes well before any socket's timeout; the whole would take seconds."""

    def trickle(answered: bytes) -> Generator[bytes]:
        if len(answered) < 100:  # the generation's name
            yield answered
            return
        for at in range(len(answered)):
            time.sleep(0.01)
            yield answered[at : at + 1]

    build(open_store(own_server.url), generation_of(), range(3))
    with forwarding(own_server, trickle) as port:
        reader = reader_of(f"redis://127.0.0.1:{port}/0", deadline_ms=300)
        before = time.monotonic()
        assert lost(reader)
        assert time.monotonic() - before < 0.3 + SLACK_S
        assert failures(reader) == {"timeout": 1}


def test_what_is_no_redis_is_counted(own_server: RedisServer):
    def other(answered: bytes) -> Generator[bytes]:
        yield b"HTTP/1.1 400 Bad Request\r\n\r\n"

    with forwarding(own_server, other) as port:
        reader = reader_of(f"redis://127.0.0.1:{port}/0", deadline_ms=1_000)
        assert lost(reader)
        assert failures(reader) == {"connection": 1}


def test_passwords_and_databases_are_those_of_the_url(tmp_path: Path):
    if SERVER is None:
        pytest.skip("no redis-server on this machine")
    with redis_server(tmp_path, "--requirepass", "se:cret") as server:
        at = f"127.0.0.1:{server.port}/3"
        build(open_store(f"redis://:se%3Acret@{at}"), generation_of(), range(3))
        reader = reader_of(f"redis://:se%3Acret@{at}", deadline_ms=5_000)
        assert not lost(reader)
        assert lost(reader_of(f"redis://:se%3Acret@127.0.0.1:{server.port}/2", deadline_ms=5_000))
        for url in (f"redis://{at}", f"redis://:wrong@{at}"):
            refused = reader_of(url, deadline_ms=5_000)
            assert lost(refused)
            assert failures(refused) == {"store": 1}
            with pytest.raises(StoreError, match="takes these credentials") as raised:
                open_store(url).generations()
            assert "wrong" not in str(raised.value)


def test_tls(tmp_path: Path):
    if SERVER is None or shutil.which("openssl") is None:
        pytest.skip("no redis-server or openssl on this machine")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key]
    subprocess.run([*made, "-out", certificate, *subject], check=True, capture_output=True)
    port = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    options += ["--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    try:
        with redis_server(tmp_path / "redis", *options):
            url = f"rediss://127.0.0.1:{port}/0?namespace=tls&ssl_ca_certs={certificate}"
            build(open_store(url), generation_of(), range(3))
            assert not lost(reader_of(url, deadline_ms=5_000))
            stranger = reader_of(f"rediss://127.0.0.1:{port}/0?namespace=tls", deadline_ms=5_000)
            assert lost(stranger)  # nobody vouches for the certificate
            assert failures(stranger) == {"connection": 1}
    except RuntimeError as error:
        if "tls" not in str(error).lower():
            raise
        pytest.skip("this redis-server knows no TLS")


def test_a_cluster_without_one_of_its_servers_loses_that_ones_records(own_cluster: list[RedisServer]):
    url = f"redis+cluster://127.0.0.1:{own_cluster[0].port}"
    build(open_store(url), generation_of(), range(60))
    reader = reader_of(url, deadline_ms=5_000)
    users = list(range(60))
    assert torch.equal(reader.read(users, probes_of(60))["0.values"], expected(users))
    own_cluster[2].kill()
    for _ in range(3):
        there = reader.read(users, probes_of(60))["0.lengths"][:, 0].view(60, CODES)
        whole = [user for user in users if there[user].all()]
        assert 20 < len(whole) < 60  # a user's records have one slot
        assert there.count_nonzero() == len(whole) * CODES
    assert torch.equal(reader.read(whole, probes_of(len(whole)))["0.values"], expected(whole))
    assert reader.counters.records("missing") == 0


def test_slots_that_move_are_followed_within_the_read(own_cluster: list[RedisServer]):
    url = f"redis+cluster://127.0.0.1:{own_cluster[0].port}"
    store = open_store(url)
    build(store, generation_of(), range(60))
    reader = reader_of(url, deadline_ms=5_000)
    users = list(range(60))
    assert torch.equal(reader.read(users, probes_of(60))["0.values"], expected(users))
    assert CLI is not None
    ids = [server.client().execute_command("CLUSTER MYID").decode() for server in own_cluster]
    from_to = ["--cluster-from", ids[1], "--cluster-to", ids[2], "--cluster-slots", "1500", "--cluster-yes"]
    reshard = [CLI, "--cluster", "reshard", f"127.0.0.1:{own_cluster[0].port}", *from_to]
    subprocess.run(reshard, check=True, capture_output=True, timeout=120)
    assert torch.equal(reader.read(users, probes_of(60))["0.values"], expected(users))
    assert failures(reader) == {}


def test_a_write_that_fails_is_an_error_of_the_build(tmp_path: Path):
    if SERVER is None:
        pytest.skip("no redis-server on this machine")
    with redis_server(tmp_path, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction") as server:
        store = open_store(server.url)
        writer = store.begin(generation_of())
        with pytest.raises(StoreError, match="has memory left"):
            put(writer, range(10_000))
        assert store.done("monday") == {}
