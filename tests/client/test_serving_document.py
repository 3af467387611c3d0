"""What docs/serving.md tells those who write a reader of their own is so: its examples, and its rules on any record."""

from __future__ import annotations

import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranker.longseq.stored import Stored
from ranker.memory.encode import encode
from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.record import DTYPES, Dtype
from ranker.memory.versions import MemoryVersions

DOCUMENT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
VERSIONS = MemoryVersions(0x1122334455667788, 0x99AABBCCDDEEFF00)
GAMMA, ALL = 0x9E3779B97F4A7C15, 2**64 - 1


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & ALL
    z = (z ^ z >> 27) * 0x94D049BB133111EB & ALL
    return z ^ z >> 31


def mix32(x: int) -> int:
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ x >> 16


def key_and_print(user: str, block: int, code: int) -> tuple[int, int]:
    """As the document says, one at a time."""
    h, g = struct.unpack("<QQ", hashlib.md5(f"memory#{user}".encode()).digest())
    step = (block + 1) * GAMMA
    key = mix(h + step & ALL) ^ mix32(code & 0xFFFFFFFF ^ mix32(code >> 32))
    return key, (mix(g + step & ALL) + code * GAMMA & ALL) >> 32


def checksum(record: bytes) -> int:
    words = struct.unpack(f"<{len(record) // 8}Q", record)
    total = len(words) * GAMMA
    for i, word in enumerate(words[1:], 1):
        total += (word ^ word >> 32) * (mix(i * GAMMA & ALL) | 1)
    return total & ALL


def numbers(record: bytes) -> tuple[list[float], list[float]]:
    """`values` and `exact` of a record."""
    values, exact = struct.unpack_from("<II", record, 48)
    start = 56 + 4 * exact
    kept = list(struct.unpack_from(f"<{exact}f", record, 56))
    if (dtype := record[11]) < 2:
        return list(struct.unpack_from(f"<{values}{'fe'[dtype]}", record, start)), kept
    scales = struct.unpack_from(f"<{-(-values // 32)}e", record, start)
    integers = struct.unpack_from(f"<{values}b", record, start + 2 * len(scales))
    return [scales[i // 32] * integer for i, integer in enumerate(integers)], kept


def records_in_the_document() -> dict[str, bytes]:
    """The columns of the last table."""
    block = DOCUMENT.rsplit("```", 2)[1].split("\n\n")[1].splitlines()
    columns = list(zip(*(line.split() for line in block), strict=True))
    return {column[0]: bytes.fromhex("".join(column[1:])) for column in columns}


def test_the_documents_key():
    stated = re.search(r"^h (\w{16})  g (\w{16})  key (\w{16})  print (\w{8})$", DOCUMENT, re.MULTILINE)
    assert stated is not None
    users = hashes_of(["u-17"])
    keys = keys_of(users, 1, np.array([0]), np.array([7]))
    found = [*(f"{half:016x}" for half in users[0].tolist()), f"{keys.key[0]:016x}", f"{keys.fingerprint[0]:08x}"]
    assert list(stated.groups()) == found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_documents_records(dtype: Dtype):
    stored = Stored(
        torch.tensor([1, -0.5, 0.25]), torch.tensor([-1.5]), torch.tensor([[3, 1]]), torch.tensor([1_700_000_000_000])
    )
    prints = np.array([key_and_print("u-17", 1, 7)[1]], np.uint32)
    record = records_in_the_document()[dtype]
    assert encode(stored, prints, VERSIONS, 1_700_000_500_000, dtype).values == [record]
    assert struct.unpack_from("<Q", record) == (checksum(record),)
    assert numbers(record)[1] == [-1.5]
    assert numbers(record)[0] == pytest.approx([1, -0.5, 0.25], abs=0 if dtype != "int8" else 1 / 254 + 1e-3)


@given(st.text(), st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_any_key_is_made_as_the_document_says(user: str, block: int, code: int):
    keys = keys_of(hashes_of([user]), block, np.array([0]), np.array([code]))
    assert key_and_print(user, block, code) == (int(keys.key[0]), int(keys.fingerprint[0]))


@given(st.data(), st.sampled_from(DTYPES), st.integers(0, 100), st.integers(0, 9), st.integers(-(2**63), 2**63 - 1))
def test_any_record_is_read_as_the_document_says(data: st.DataObject, dtype: Dtype, values: int, exact: int, time: int):
    floats = st.floats(-1000, 1000, width=32)
    wanted = data.draw(st.lists(floats, min_size=values, max_size=values))
    kept = data.draw(st.lists(floats | st.just(float("-inf")), min_size=exact, max_size=exact))
    stored = Stored(torch.tensor(wanted), torch.tensor(kept), torch.tensor([[values, exact]]), torch.tensor([time]))
    (record,) = encode(stored, np.array([5], np.uint32), VERSIONS, 42, dtype).values
    head = struct.unpack_from("<QHBBIQQqqII", record)
    assert head == (checksum(record), 0x4D52, 1, DTYPES.index(dtype), 5, *VERSIONS, 42, time, values, exact)
    found, exactly = numbers(record)
    assert exactly == kept
    greatest = max(map(abs, wanted), default=0.0)
    step = {"float32": 0.0, "float16": greatest / 2**11 + 1e-7, "int8": greatest / 254 * 1.002 + 1e-7}[dtype]
    assert found == pytest.approx(wanted, rel=0, abs=step)
