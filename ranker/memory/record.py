"""A record as bytes, the same on every machine: little-endian, a header of 56 bytes, then the numbers.

========  =====  ==================================================================================
offset    type   field
========  =====  ==================================================================================
0         u64    checksum of all that follows
8         u16    magic, 0x4D52 ("RM")
10        u8     format, 1
11        u8     dtype of values: 0 float32, 1 float16, 2 int8
12        u32    fingerprint of :mod:`ranker.memory.keys`: two records that met in one key differ in it
16        u64    version of the model
24        u64    version of the codebooks
32        i64    as of: the time, in milliseconds, whose history the record holds
40        i64    `Stored.time`
48        u32    V, how many `values`
52        u32    E, how many `exact`
56               E float32; int8 only: ⌈V / 32⌉ float16 scales; V values; zeros up to a multiple of 8 bytes
========  =====  ==================================================================================

An int8 value times the scale of its 32 is the number; the scale is the largest magnitude of the 32 over 127, rounded up
to float16, so that a value is at most half a scale off.

The checksum of the words w_1 … w_{W-1}, 8 bytes each, w_0 being the checksum itself, is

    W · γ + Σ_i (w_i ^ (w_i >> 32)) · K_i  modulo 2^64,    K_i = mix(i · γ) | 1

with γ and `mix` of :mod:`ranker.memory.keys`. x ^ (x >> 32) and products with odd numbers are permutations, so that any
change within one word is recognised, for certain; changes of several words with the chance that random 64 bits differ.

Records of one size are written and read together, without a Python loop over records.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from features.errors import UserError
from ranker.memory.keys import GAMMA, I64, U64, mix
from ranker.memory.versions import MemoryVersions

Dtype = Literal["float32", "float16", "int8"]
"""how values are kept"""
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
WIDTH: dict[Dtype, int] = {"float32": 4, "float16": 2, "int8": 1}
"""bytes of a value"""
HEADER_BYTES, SCALED = 56, 32
MAGIC, FORMAT = 0x4D52, 1
START = MAGIC | FORMAT << 16
"""the lower 24 bits of the second word"""
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
_ALL = 2**64 - 1
_HALF = np.uint64(32)


class RecordError(UserError):
    """Numbers that no record can hold."""


class Header(NamedTuple):
    """What a record says of itself."""

    dtype: Dtype
    fingerprint: int
    versions: MemoryVersions
    as_of_ms: int
    time: int
    values: int
    exact: int


def scales_of(values: int) -> int:
    """Scales of so many int8 values."""
    return -(-values // SCALED)


def size_of(dtype: Dtype, values: int, exact: int = 0) -> int:
    """Bytes of a record: a multiple of 8.

    >>> [size_of(dtype, 64) for dtype in DTYPES]
    [312, 184, 128]
    """
    scales = 2 * scales_of(values) if dtype == "int8" else 0
    return HEADER_BYTES + -(-(4 * exact + scales + WIDTH[dtype] * values) // 8) * 8


@lru_cache(maxsize=256)
def _factors(words: int) -> U64:
    """W · γ, then K_1 … K_{W-1}."""
    factors = mix(np.arange(words, dtype=np.uint64) * np.uint64(GAMMA)) | np.uint64(1)
    factors[0] = words * GAMMA & _ALL
    return factors


def checksums(words: U64) -> U64:
    """Of records of W words each, `[U, W]`: `[U]`. The first word counts for nothing."""
    mixed = words >> _HALF
    mixed ^= words
    mixed[:, 0] = 1
    return mixed @ _factors(words.shape[1])


def kind_of(start: int, lengths: int) -> tuple[Dtype, int, int] | None:
    """dtype, V and E that a record states: the lower 32 bits of its second word, and its seventh; None for another
    magic, format or dtype."""
    number = start >> 24
    if start & 0xFFFFFF != START or number >= len(DTYPES):
        return None
    return DTYPES[number], lengths & 0xFFFFFFFF, lengths >> 32


def as_of_of(records: Sequence[bytes | None]) -> I64:
    """The time that each record states as that of its history `[U]`, unchecked; 0 where there is no record."""
    parts = [b"" if record is None else record[32:40] for record in records]
    return np.frombuffer(b"".join(part.ljust(8, b"\0") for part in parts), "<i8").astype(np.int64)


def header_of(record: bytes) -> Header | None:
    """A whole record's header; None for one that is not whole."""
    if len(record) < HEADER_BYTES or len(record) % 8:
        return None
    words = np.frombuffer(record, "<u8")
    kind = kind_of(int(words[1]) & 0xFFFFFFFF, int(words[6]))
    if kind is None or size_of(*kind) != len(record) or checksums(words[None])[0] != words[0]:
        return None
    as_of_ms, time = words[4:6].view("<i8").tolist()
    versions = MemoryVersions(int(words[2]), int(words[3]))
    return Header(kind[0], int(words[1]) >> 32, versions, as_of_ms, time, kind[1], kind[2])
