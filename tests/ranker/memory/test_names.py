"""Whatever the resolver does, a read ends in time; what it said last is what connections are made to."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest

from ranker.memory import names as module
from ranker.memory.names import Names
from ranker.memory.reader import MemoryReader
from ranker.memory.store import open_store
from tests.free_ports import free_port
from tests.ranker.memory.stored_memories import VERSIONS, build, generation_of
from tests.ranker.memory.test_outages import SLACK_S, failures, lost, reader_of, until_found
from tests.redis_servers import RedisServer

PORT = 6379
SYSTEM = socket.getaddrinfo


class Resolver:
    """In the place of the system's: answers for the names that it is given, when it may."""

    def __init__(self, **known: str) -> None:
        self.known, self.answers, self.asked = known, threading.Event(), 0
        self.answers.set()

    def __call__(self, host: str, *args: Any, **others: Any) -> Any:
        if host[0].isdigit() or ":" in host:
            return SYSTEM(host, *args, **others)
        self.asked += 1
        self.answers.wait()
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return SYSTEM(self.known[host], *args, **others)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """This process's resolver from here on; in a test that makes it wait, threads of the process wait with it."""
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    made = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", made)
    return made


@pytest.fixture
def names_of(resolver: Resolver) -> Generator[Callable[..., Names]]:
    """Names of a test alone, which are forgotten at its end."""
    made: list[Names] = []

    def names_of(renew_every_s: float = 1_000) -> Names:
        made.append(Names(renew_every_s))
        return made[-1]

    yield names_of
    for names in made:
        names.forget()


@pytest.fixture
def served(names_of: Callable[..., Names], monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of the test use such names."""
    monkeypatch.setattr("ranker.memory.redis_wires.NAMES", names_of())


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it does before long."""
    end = time.monotonic() + 20
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


def where(names: Names, host: str) -> list[str] | None:
    """Addresses of a name now."""
    found = names.of((host, PORT))
    return None if found is None else [str(one.where[0]) for one in found]


def moved(server: RedisServer) -> str:
    """The URL of a server by a name."""
    return f"redis://cache:{server.port}/0"


@pytest.mark.usefixtures("served")
def test_no_read_waits_for_a_resolver(resolver: Resolver, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "START_S", 0.05)
    resolver.answers.clear()
    try:
        reader = MemoryReader(f"redis://cache:{free_port()}/0", {0: "probe"}, VERSIONS, deadline_ms=20)
        before = time.monotonic()
        assert all([lost(reader) for _ in range(20)])
        assert time.monotonic() - before < SLACK_S
        assert failures(reader) == {"unresolved": 20}
    finally:
        resolver.answers.set()


@pytest.mark.usefixtures("served")
def test_a_name_that_is_told_late_is_found_then(resolver: Resolver, own_server: RedisServer):
    reader = reader_of(moved(own_server))
    assert lost(reader)
    assert failures(reader) == {"unresolved": 1}  # the resolver does not know it
    build(open_store(own_server.url), generation_of(), range(3))
    resolver.known["cache"] = "127.0.0.1"
    until_found(reader)


@pytest.mark.usefixtures("served")
def test_connections_are_made_anew_while_the_resolver_does_not_answer(resolver: Resolver, own_server: RedisServer):
    resolver.known["cache"] = "127.0.0.1"
    build(open_store(own_server.url), generation_of(), range(3))
    reader = reader_of(moved(own_server), deadline_ms=5_000)
    assert not lost(reader)
    resolver.answers.clear()
    try:
        own_server.client().client_kill_filter(_type="normal", skipme=True)
        assert not lost(reader)
        child = os.fork()
        if child == 0:  # with its parent's addresses
            found = False
            try:
                found = not lost(reader)
            finally:
                os._exit(0 if found else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert failures(reader) == {}
    finally:
        resolver.answers.set()


def test_a_name_that_moves_is_followed_and_one_that_is_gone_stays(resolver: Resolver, names_of: Callable[..., Names]):
    names = names_of(0.02)
    resolver.known["cache"] = "127.0.0.1"
    names.begin(("cache", PORT))
    assert where(names, "cache") == ["127.0.0.1"]
    resolver.known["cache"] = "127.0.0.2"
    assert soon(lambda: where(names, "cache") == ["127.0.0.2"])
    del resolver.known["cache"]
    asked = resolver.asked
    assert soon(lambda: resolver.asked > asked + 2)
    assert where(names, "cache") == ["127.0.0.2"]


def test_a_failed_connection_has_its_name_resolved_anew(resolver: Resolver, names_of: Callable[..., Names]):
    names = names_of()
    resolver.known["cache"] = "127.0.0.1"
    names.begin(("cache", PORT))
    resolver.known["cache"] = "127.0.0.2"
    names.doubt(("cache", PORT))
    assert soon(lambda: where(names, "cache") == ["127.0.0.2"])


def test_a_forked_process_renews_its_names(resolver: Resolver, names_of: Callable[..., Names]):
    names = names_of(0.02)
    resolver.known["cache"] = "127.0.0.1"
    names.begin(("cache", PORT))
    child = os.fork()
    if child == 0:
        followed = False
        try:
            names.forked()
            resolver.known["cache"] = "127.0.0.3"
            followed = where(names, "cache") == ["127.0.0.1"] and soon(lambda: where(names, "cache") == ["127.0.0.3"])
        finally:
            os._exit(0 if followed else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("host", "at"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1")])
def test_an_address_needs_no_resolver(resolver: Resolver, host: str, at: str):
    assert where(Names(), host) == [at]
    assert resolver.asked == 0


def test_no_name_is_no_server(resolver: Resolver):
    assert Names().of(("", 0)) == ()
    assert resolver.asked == 0


def test_names_that_are_forgotten_are_asked_for_no_more(resolver: Resolver, names_of: Callable[..., Names]):
    """Nor does the thread stay; one begins with the next name."""
    names, before = names_of(0.02), set(threading.enumerate())
    resolver.known["cache"] = "127.0.0.1"
    names.begin(("cache", PORT))
    (begun,) = set(threading.enumerate()) - before  # those of other tests may end meanwhile
    names.forget()
    assert soon(lambda: not begun.is_alive())
    assert set(threading.enumerate()) <= before
    names.begin(("cache", PORT))
    assert where(names, "cache") == ["127.0.0.1"]
