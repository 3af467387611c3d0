"""The 64-bit key of a record, and a fingerprint by which a reader notices that two records met in one key.

Any language makes the same ones. All sums and products are of unsigned 64-bit integers, modulo 2^64::

    D      = MD5("memory#" + text)              text: the raw user id in UTF-8, an integer in decimal
    h, g   = bytes 0 … 7, bytes 8 … 15 of D     each little-endian
    γ      = 0x9E3779B97F4A7C15
    mix(z)   : z ^= z >> 30, z *= 0xBF58476D1CE4E5B9, z ^= z >> 27, z *= 0x94D049BB133111EB, z ^= z >> 31
    mix32(x) : x ^= x >> 16, x *= 0x85EBCA6B, x ^= x >> 13, x *= 0xC2B2AE35, x ^= x >> 16, modulo 2^32
    key    = mix(h + (block + 1) · γ) ^ mix32(low ^ mix32(high))      low, high: the halves of code
    print  = (mix(g + (block + 1) · γ) + code · γ) >> 32              32 bits

block: the block's number in ``model.long``; code: the probe's, 0 where the block has one record a user. `mix` is
SplitMix64's, `mix32` MurmurHash3's finaliser, in both of which every input has an output of its own. So

- the upper half of a key is the user's and the block's alone: records of one request lie side by side in a sorted
  store, and in one slot of a cluster;
- codes below 2^32 of one user and block never meet in one key; keys of different users meet as random ones do, n²/2^65
  pairs among n records, and in 2^-32 of those pairs the fingerprints agree, too.

The salt keeps keys apart from the hashes that :mod:`features.hashing` makes of the same ids.

>>> keys = keys_of(hashes_of(["u-17", 42]), 0, np.array([0, 0, 1, 1]), np.array([0, 7, 7, 2**40 + 7]))
>>> [f"{key:016x}" for key in keys.key.tolist()]
['2ca228c3c7849de9', '2ca228c3df4d332d', 'c3c4c035e13816c5', 'c3c4c03531b5e15d']
>>> [f"{fingerprint:08x}" for fingerprint in keys.fingerprint.tolist()]
['81e0b4d3', 'd56508e6', '2c1143b1', '768d58b1']
>>> [f"{half:016x}" for half in hashes_of(["42"])[0].tolist()]
['0af7d1d398ab5615', '9ad3b18cfdc43cf3']
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

SALT = "memory#"
RULE = (
    "D = MD5('memory#' + text); h, g = bytes 0-7, 8-15 of D, little-endian; G = 0x9E3779B97F4A7C15; "
    "key = mix(h + (block + 1) G) ^ mix32(code & 0xFFFFFFFF ^ mix32(code >> 32)); "
    "fingerprint = (mix(g + (block + 1) G) + code G) >> 32; mix: SplitMix64, mix32: MurmurHash3's fmix32; modulo 2^64; "
    "text: the raw user id in UTF-8, integers in decimal, true and false as 1 and 0"
)
"""for manifests"""
GAMMA = 0x9E3779B97F4A7C15
_GAMMA = np.uint64(GAMMA)
_ALL = 2**64 - 1
_UPPER = slice(1 if sys.byteorder == "little" else 0, None, 2)
"""of 64-bit numbers as pairs of 32-bit ones: the upper halves"""


class Keys(NamedTuple):
    """key: `[U]` uint64; fingerprint: `[U]` uint32; of U records."""

    key: U64
    fingerprint: U32


def hashes_of(users: Iterable[int | str]) -> U64:
    """h and g of raw user ids: `[R, 2]`. 42 and "42" are one id."""
    return np.frombuffer(b"".join(map(_digest, users)), "<u8").reshape(-1, 2).astype(np.uint64, copy=False)


def _digest(user: int | str) -> bytes:
    """D."""
    text = str(int(user)) if isinstance(user, bool) else str(user)
    return hashlib.md5((SALT + text).encode(), usedforsecurity=False).digest()


def mix(z: U64) -> U64:
    """SplitMix64's finaliser: a permutation of 64-bit integers."""
    z = z ^ (z >> np.uint64(30))
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _mix_one(z: int) -> int:
    """:func:`mix` of one number: in Python's integers a fifth of what operations on arrays of two cost."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _ALL
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _ALL
    return z ^ z >> 31


def mix32(x: U32) -> U32:
    """MurmurHash3's finaliser: a permutation of 32-bit integers, 0 among those that stay."""
    x = x ^ (x >> np.uint32(16))
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


_MIXED = mix32(np.arange(1 << 14, dtype=np.uint32)).astype(np.uint64)
"""of the codes that most codebooks have: one look-up for eight operations on small arrays, where each costs alike"""


def keys_of(users: U64, block: int, request: I64, code: I64) -> Keys:
    """Keys of the records of one block.

    Args:
        users: `[R, 2]` of :func:`hashes_of`.
        block: number in ``model.long``.
        request: `[U]`, each record's user, as a row of `users`.
        code: `[U]`, of its probe.
    """
    own, print_ = mix(users + np.uint64((block + 1) * GAMMA & _ALL))[request].T
    return _coded(own, print_, code)


def keys_of_one(user: int | str, block: int, code: I64) -> Keys:
    """The same for one user's raw id, as most requests are of one."""
    digest, step = _digest(user), (block + 1) * GAMMA
    h, g = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return _coded(np.uint64(_mix_one(h + step & _ALL)), np.uint64(_mix_one(g + step & _ALL)), code)


def _coded(own: U64 | np.uint64, print_: U64 | np.uint64, code: I64) -> Keys:
    """Keys of mix(h + …), mix(g + …) and the codes `[U]`."""
    codes = np.ascontiguousarray(code, np.int64).view(np.uint64)
    greatest = int(np.maximum.reduce(codes, initial=0))
    if greatest < len(_MIXED):
        mixed = _MIXED[codes]
    else:
        low = codes.astype(np.uint32)
        if greatest >> 32:
            low ^= mix32((codes >> np.uint64(32)).astype(np.uint32))  # mix32(0) is 0
        mixed = mix32(low).astype(np.uint64)
    mixed ^= own
    prints = codes * _GAMMA
    prints += print_
    return Keys(mixed, prints.view(np.uint32)[_UPPER])


def user_keys(users: U64, block: int) -> Keys:
    """Keys of a block that has one record a user, which is of code 0: the same without codes."""
    seeds = mix(users + np.uint64((block + 1) * GAMMA & _ALL))
    return Keys(seeds[:, 0].copy(), (seeds[:, 1] >> np.uint64(32)).astype(np.uint32))


class Collisions(NamedTuple):
    """records: distinct (key, fingerprint); met: those whose key is another's, too."""

    records: int
    met: int


def collisions_of(keys: Sequence[Keys] | Keys) -> Collisions:
    """How many records of a set meet in one key: a later one would overwrite an earlier one.

    A record that is listed twice counts once.
    """
    parts = [keys] if isinstance(keys, Keys) else list(keys)
    none = np.zeros(0, np.uint64)
    key = np.concatenate([none, *(part.key for part in parts)])
    fingerprint = np.concatenate([none, *(part.fingerprint.astype(np.uint64) for part in parts)])
    order = np.lexsort((fingerprint, key))
    key, fingerprint = key[order], fingerprint[order]
    same_key = key[1:] == key[:-1]
    repeated = np.concatenate([np.zeros(min(len(key), 1), bool), same_key & (fingerprint[1:] == fingerprint[:-1])])
    _, count = np.unique(key[~repeated], return_counts=True)
    return Collisions(int(count.sum()), int(count[count > 1].sum()))
