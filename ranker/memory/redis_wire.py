"""One connection to one Redis server, every operation of which ends by a deadline.

redis-py bounds each read from the socket, not an answer of many reads; here what is left of the request's budget bounds
each one. It knows the few replies that look-ups need (RESP2, https://redis.io/docs/latest/develop/reference/protocol-spec).
A connection on which anything failed must be closed: a late answer would be taken for that of the next request.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence

from ranker.memory.names import Address, Resolved
from ranker.memory.redis_url import RedisUrl

RECEIVED_BYTES = 1 << 16
Reply = bytes | int | None | list["Reply"]


class ReplyError(Exception):
    """What a server says instead of an answer."""


class Wire:
    """Connected, authenticated, and in the URL's database.

    Args:
        resolved: addresses of the server, tried in this order.
        deadline: of :func:`time.monotonic`.

    Raises:
        OSError: no connection, TimeoutError where none in time, socket.gaierror where the name has no address.
        ReplyError: the server refuses.
    """

    def __init__(self, url: RedisUrl, address: Address, resolved: Sequence[Resolved], deadline: float) -> None:
        self._data, self._at = b"", 0
        self._socket = _connected(address, resolved, url.tls, deadline)
        greeting: list[bytes] = []
        if url.password is not None or url.username is not None:
            names = [] if url.username is None else [url.username.encode()]
            greeting.append(packed(b"AUTH", *names, (url.password or "").encode()))
        if url.db:
            greeting.append(packed(b"SELECT", str(url.db).encode()))
        try:
            if greeting:
                self.send(b"".join(greeting), deadline)
                for _ in greeting:
                    self.receive(deadline)
        except BaseException:
            self.close()
            raise

    def send(self, commands: bytes, deadline: float) -> None:
        """Commands as :func:`packed` makes them."""
        self._socket.settimeout(_left(deadline))
        self._socket.sendall(commands)

    def receive(self, deadline: float) -> Reply:
        """The answer to the next of the commands.

        Raises:
            OSError: it did not come, TimeoutError where not in time.
            ReplyError: the server refuses; the answers to later commands still come.
        """
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"*":
            count = int(rest)
            return None if count < 0 else self._array(count, deadline)
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._bulk(size, deadline)
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            raise ReplyError(rest.decode(errors="replace"))
        raise ConnectionError(f"no reply of Redis: {line[:40]!r}")

    def close(self) -> None:
        """Forget the connection, with what may still come by it."""
        self._socket.close()

    def _array(self, count: int, deadline: float) -> list[Reply]:
        """Bulk strings, as most are, without a call for each."""
        values: list[Reply] = []
        for _ in range(count):
            data, at = self._data, self._at
            end = data.find(b"\r\n", at)
            if end < 0 or data[at] != 36:  # "$"
                values.append(self.receive(deadline))
                continue
            size = int(data[at + 1 : end])
            start = end + 2
            if size < 0:
                self._at = start
                values.append(None)
            elif start + size + 2 <= len(data):
                self._at = start + size + 2
                values.append(data[start : start + size])
            else:
                self._at = start
                values.append(self._bulk(size, deadline))
        return values

    def _bulk(self, size: int, deadline: float) -> bytes:
        while len(self._data) - self._at < size + 2:
            self._more(deadline)
        start = self._at
        self._at += size + 2
        return self._data[start : start + size]

    def _line(self, deadline: float) -> bytes:
        while (end := self._data.find(b"\r\n", self._at)) < 0:
            self._more(deadline)
        line = self._data[self._at : end]
        self._at = end + 2
        return line

    def _more(self, deadline: float) -> None:
        # at the deadline, what has come already is still taken: another server may have used up the time
        self._socket.settimeout(max(deadline - time.monotonic(), 0))
        if not (received := self._socket.recv(RECEIVED_BYTES)):
            raise ConnectionError("the server closed the connection")
        self._data, self._at = self._data[self._at :] + received, 0


def packed(*words: bytes) -> bytes:
    """A command.

    >>> packed(b"GET", b"memory:current")
    b'*2\\r\\n$3\\r\\nGET\\r\\n$14\\r\\nmemory:current\\r\\n'
    """
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def _left(deadline: float) -> float:
    """Seconds until then.

    Raises:
        TimeoutError: there are none.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("no time left")
    return left


def _connected(
    address: Address, resolved: Sequence[Resolved], tls: ssl.SSLContext | None, deadline: float
) -> socket.socket:
    """To the first of the addresses that accepts."""
    name = address[0]
    failure = socket.gaierror(f"{name}: no address") if name else ConnectionError("no server")
    for family, where in resolved:
        plain = socket.socket(family, socket.SOCK_STREAM)
        try:
            plain.settimeout(_left(deadline))
            plain.connect(where)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is None:
                return plain
            plain.settimeout(_left(deadline))
            return tls.wrap_socket(plain, server_hostname=name)
        except OSError as error:
            plain.close()
            failure = error
    raise failure
