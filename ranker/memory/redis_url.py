"""Where a Redis server or cluster is, under which names a store lies in it, and the bytes of its keys.

Keys: ``NAMESPACE:current``, a hash of generations' names by versions (:attr:`MemoryVersions.key`);
``NAMESPACE:generations``, ``NAMESPACE:done:GENERATION``, ``NAMESPACE:lease:GENERATION``; and of records

    NAMESPACE ":" GENERATION ":{" 8 hexadecimal digits of the key's upper half "}" 4 bytes of its lower half, big-endian

The braces are Redis' hash tag: a cluster keeps all records of one user and block in one slot.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt
from redis.connection import parse_url

from ranker.memory.keys import U64
from ranker.memory.store import StoreError, named

DEFAULT_NAMESPACE = "memory"
CURRENT = "current"
Bytes = npt.NDArray[np.uint8]
_HEX = np.frombuffer(b"".join(b"%02x" % i for i in range(256)), np.uint8).reshape(256, 2)


@dataclass(frozen=True)
class RedisUrl:
    """client: the URL as redis-py reads it, of scheme redis or rediss."""

    client: str = field(repr=False)
    namespace: str
    cluster: bool
    host: str
    port: int
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None

    @classmethod
    def parse(cls, url: str) -> RedisUrl:
        """From what the user gives; the namespace is `?namespace=NAME` or `#NAME`.

        Raises:
            StoreError: it is no such URL.
        """
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        namespace = named(query.pop("namespace", parts.fragment or DEFAULT_NAMESPACE), "namespace")
        scheme, _, cluster = parts.scheme.partition("+")
        client = urlunsplit((scheme, parts.netloc, parts.path, urlencode(query), ""))
        try:
            options: dict[str, Any] = dict(parse_url(client))
            tls = _tls(options) if scheme == "rediss" else None
        except (ValueError, OSError, ssl.SSLError) as error:
            raise StoreError(f"{shown(url)}: {error}; correct the URL") from error
        if cluster and options.get("db", 0):
            raise StoreError(f"{shown(url)}: a cluster has database 0 alone; use ?namespace=NAME")
        return cls(
            client,
            namespace,
            bool(cluster),
            options.get("host", "localhost"),
            options.get("port", 6379),
            options.get("db", 0),
            options.get("username"),
            options.get("password"),
            tls,
        )

    def key(self, *parts: str) -> str:
        """One of the store's own keys."""
        return ":".join((self.namespace, *parts))

    def prefix(self, generation: str) -> bytes:
        """What every record's key of a generation begins with."""
        return f"{self.namespace}:{generation}:{{".encode()


def shown(url: str) -> str:
    """The URL without its password, for messages."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    where = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, f"{parts.username or ''}:***@{where}", *parts[2:]))


def key_rows(prefix: bytes, keys: U64) -> Bytes:
    """Names of records `[U, bytes]`."""
    halves = np.ascontiguousarray(keys).astype(">u8").view(np.uint8).reshape(-1, 8)
    start = len(prefix)
    rows = np.empty([len(keys), start + 13], np.uint8)
    rows[:, :start] = np.frombuffer(prefix, np.uint8)
    rows[:, start : start + 8] = _HEX[halves[:, :4]].reshape(-1, 8)
    rows[:, start + 8] = ord("}")
    rows[:, start + 9 :] = halves[:, 4:]
    return rows


def key_names(prefix: bytes, keys: U64) -> list[bytes]:
    """The same as byte strings."""
    rows = key_rows(prefix, keys)
    return rows.view(f"V{rows.shape[1]}").reshape(-1).tolist()


def key_of(name: bytes) -> int:
    """The key whose record has this name."""
    return int(name[-13:-5], 16) << 32 | int.from_bytes(name[-4:], "big")


def _tls(options: dict[str, Any]) -> ssl.SSLContext:
    """By redis-py's parameters of the URL."""
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"), capath=options.get("ssl_ca_path"))
    checks = str(options.get("ssl_cert_reqs", "required"))
    context.check_hostname = str(options.get("ssl_check_hostname", True)).lower() not in ("false", "0", "no")
    if checks != "required":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE if checks == "none" else ssl.CERT_OPTIONAL
    if "ssl_certfile" in options:
        context.load_cert_chain(options["ssl_certfile"], options.get("ssl_keyfile"), options.get("ssl_password"))
    return context
