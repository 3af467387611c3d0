"""Stores that tests of memories share: folders, a real Redis server, a real cluster."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.ranker.memory.days import built_days
from tests.redis_servers import CLI, SERVER, RedisServer, redis_cluster, redis_server


@pytest.fixture(scope="module")
def days(once: Callable[..., Path]) -> Path:
    """Both days, and what was built on them."""
    return built_days(once)


@pytest.fixture
def store(days: Path, tmp_path: Path) -> str:
    """A copy to change of the first day's store."""
    return str(shutil.copytree(days / "built", tmp_path / "store"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[RedisServer]:
    """A server that the module's tests share, each in a namespace of its own."""
    if SERVER is None:
        pytest.skip("no redis-server on this machine")
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Generator[RedisServer]:
    """A server that the test may stop and kill."""
    if SERVER is None:
        pytest.skip("no redis-server on this machine")
    with redis_server(tmp_path / "redis") as running:
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Generator[list[RedisServer]]:
    """Three masters that share the slots."""
    if SERVER is None or CLI is None:
        pytest.skip("no redis-server or redis-cli on this machine")
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture(params=["lmdb", "redis", "cluster"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind."""
    name = tmp_path.name.replace("[", "-").replace("]", "")
    kinds: dict[str, Callable[[], str]] = {
        "lmdb": lambda: f"lmdb:{tmp_path / 'store'}",
        "redis": lambda: f"{request.getfixturevalue('server').url}?namespace={name}",
        "cluster": lambda: f"redis+cluster://127.0.0.1:{request.getfixturevalue('cluster')[0].port}#{name}",
    }
    return kinds[request.param]()


@pytest.fixture
def own_cluster(tmp_path: Path) -> Generator[list[RedisServer]]:
    """A cluster that the test may change."""
    if SERVER is None or CLI is None:
        pytest.skip("no redis-server or redis-cli on this machine")
    with redis_cluster(tmp_path / "cluster") as nodes:
        yield nodes
