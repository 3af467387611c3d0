"""Keys are the same everywhere, and tell users, blocks and codes apart."""

from __future__ import annotations

import doctest
import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ranker.memory import keys as module
from ranker.memory.keys import Keys, collisions_of, hashes_of, keys_of, keys_of_one, user_keys

M = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def literal(user: str, block: int, code: int) -> tuple[int, int]:
    """The docstring's equations, one number at a time."""

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & M
        z = (z ^ z >> 27) * 0x94D049BB133111EB & M
        return z ^ z >> 31

    def mix32(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ x >> 16

    digest = hashlib.md5(("memory#" + user).encode()).digest()
    h, g = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    key = mix(h + (block + 1) * GAMMA & M) ^ mix32(code & 0xFFFFFFFF ^ mix32(code >> 32))
    return key, (mix(g + (block + 1) * GAMMA & M) + code * GAMMA & M) >> 32


def test_vectors_of_the_docstring():
    assert doctest.testmod(module).failed == 0


@given(
    users=st.lists(st.text(max_size=8), min_size=1, max_size=4),
    block=st.integers(0, 40),
    codes=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1)), min_size=1, max_size=6),
)
def test_keys_are_the_documented_ones(users: list[str], block: int, codes: list[int]):
    request = np.arange(len(codes)) % len(users)
    found = keys_of(hashes_of(users), block, request, np.array(codes))
    wanted = [literal(users[r], block, code) for r, code in zip(request.tolist(), codes, strict=True)]
    assert list(zip(found.key.tolist(), found.fingerprint.tolist(), strict=True)) == wanted


@given(users=st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=5), block=st.integers(0, 9))
def test_a_record_a_user_is_that_of_code_0(users: list[int | str], block: int):
    hashes, count = hashes_of(users), len(users)
    alone, coded = user_keys(hashes, block), keys_of(hashes, block, np.arange(count), np.zeros(count, np.int64))
    assert alone.key.tolist() == coded.key.tolist()
    assert alone.fingerprint.tolist() == coded.fingerprint.tolist()


@given(
    user=st.one_of(st.booleans(), st.integers(), st.text(max_size=5)),
    block=st.integers(0, 40),
    codes=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1)), max_size=6),
)
def test_keys_of_one_user_are_those_of_many(user: int | str, block: int, codes: list[int]):
    code = np.array(codes, np.int64)
    alone, wanted = keys_of_one(user, block, code), keys_of(hashes_of([user]), block, np.zeros_like(code), code)
    assert alone.key.tolist() == wanted.key.tolist()
    assert alone.fingerprint.tolist() == wanted.fingerprint.tolist()


def test_an_integer_and_its_text_are_one_id():
    assert hashes_of([42, True]).tolist() == hashes_of(["42", "1"]).tolist()


def test_codes_of_one_user_and_block_never_meet():
    codes = np.concatenate([np.arange(200_000), np.arange(2**32 - 200_000, 2**32)])
    keys = keys_of(hashes_of(["a"]), 3, np.zeros(len(codes), np.int64), codes)
    assert len(np.unique(keys.key)) == len(codes)
    assert collisions_of(keys) == (len(codes), 0)


def test_records_of_a_user_and_block_lie_side_by_side():
    keys = keys_of(hashes_of(["a", "b"]), 0, np.repeat([0, 1], 500), np.tile(np.arange(500), 2))
    assert len(np.unique(keys.key >> np.uint64(32))) == 2


def test_two_million_records_of_many_users_do_not_meet():
    hashes, request, code = hashes_of(range(20_000)), np.repeat(np.arange(20_000), 50), np.tile(np.arange(50), 20_000)
    parts = [keys_of(hashes, block, request, code) for block in (0, 1)]
    assert collisions_of(parts) == (2_000_000, 0)


def test_records_that_meet_are_counted_and_repeated_ones_are_not():
    key, fingerprint = np.array([1, 1, 2, 3, 3, 3], np.uint64), np.array([5, 6, 5, 7, 7, 8], np.uint32)
    assert collisions_of(Keys(key, fingerprint)) == (5, 4)
    assert collisions_of([]) == (0, 0)
