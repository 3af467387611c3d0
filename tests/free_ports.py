"""Ports of the loopback for servers that tests start."""

from __future__ import annotations

import socket

_GIVEN: set[int] = set()


def free_port(at_most: int = 65535) -> int:
    """A port that nothing listens on now, and that this process was not given before: the kernel gives one again at
    once, and two servers that are started later would share it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= at_most and port not in _GIVEN:
            _GIVEN.add(port)
            return port
