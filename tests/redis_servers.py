"""Real Redis servers on free ports of the loopback, each ended with its user."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis

from tests.free_ports import free_port

SERVER, CLI = shutil.which("redis-server"), shutil.which("redis-cli")
START_S = 20.0


class RedisServer:
    """A process that can be killed, stopped in its tracks, and started again with what it had on disk."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        self.folder, self.options, self.port = folder, options, port or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> RedisServer:
        assert SERVER is not None
        command = [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        log = self.folder / "log"
        with log.open("wb") as written:
            self.process = subprocess.Popen(
                [*command, "--dir", str(self.folder), *self.options],
                stdout=written,
                stderr=written,
                stdin=subprocess.DEVNULL,
            )
        end = time.monotonic() + START_S
        while b"Ready to accept connections" not in log.read_bytes():  # at this port, another server may answer
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"redis-server: {log.read_text()}")
            time.sleep(0.02)
        return self

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """At once, whatever it does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, host="127.0.0.1")


@contextmanager
def redis_server(folder: Path, *options: str) -> Generator[RedisServer]:
    """One server."""
    server = RedisServer(folder, *options)
    try:
        yield server.start()
    finally:
        server.kill()


@contextmanager
def redis_cluster(folder: Path, nodes: int = 3) -> Generator[list[RedisServer]]:
    """Masters without replicas, all slots served."""
    assert CLI is not None
    with ExitStack() as held:
        options = (
            "--cluster-enabled",
            "yes",
            "--cluster-node-timeout",
            "1000",
            "--cluster-require-full-coverage",
            "no",
        )
        # the port of the nodes' bus is 10,000 higher
        servers = [RedisServer(folder / str(i), *options, port=free_port(55535)) for i in range(nodes)]
        for server in servers:
            held.callback(server.kill)
            server.start()
        addresses = [f"127.0.0.1:{server.port}" for server in servers]
        subprocess.run(
            [CLI, "--cluster", "create", *addresses, "--cluster-yes"], check=True, capture_output=True, timeout=60
        )
        end = time.monotonic() + START_S
        for server in servers:
            with server.client() as client:
                while client.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
                    if time.monotonic() > end:
                        raise RuntimeError("the cluster's slots are not all served")
                    time.sleep(0.05)
        yield servers
