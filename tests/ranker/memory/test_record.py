"""Records keep their numbers, and a record that is not what was written is not taken for one that is."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranker.longseq.stored import Stored
from ranker.memory import decode as decoding
from ranker.memory import record as module
from ranker.memory.decode import Decoded, Outcomes, decode
from ranker.memory.encode import encode
from ranker.memory.keys import U32
from ranker.memory.record import DTYPES, HEADER_BYTES, Dtype, RecordError, header_of, size_of
from ranker.memory.versions import MemoryVersions

VERSIONS = MemoryVersions(2**64 - 1, 3)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SIZES = st.lists(st.tuples(st.integers(0, 70), st.integers(0, 5)), max_size=6)


def stored_of(sizes: list[tuple[int, int]], scale: float = 1.0, seed: int = 0) -> Stored:
    """Records of these numbers of values and exact ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
    exact = torch.randn(int(lengths[:, 1].sum()), generator=generator)
    exact[::3] = -torch.inf
    values = scale * torch.randn(int(lengths[:, 0].sum()), generator=generator)
    return Stored(values, exact, lengths, torch.arange(len(sizes)) - 2)


def prints_of(count: int) -> U32:
    return np.arange(count, dtype=np.uint32) * np.uint32(2_654_435_761)


def test_examples_of_the_docstring():
    assert doctest.testmod(module).failed == 0


def test_the_layout_is_the_documented_one():
    stored = Stored(torch.tensor([1.5, -2.0, 3.0]), torch.tensor([7.0]), torch.tensor([[3, 1]]), torch.tensor([-9]))
    (record,) = encode(stored, np.array([0xABCD1234], np.uint32), MemoryVersions(1, 2), 5, "float16").values
    u64 = lambda at: int.from_bytes(record[at : at + 8], "little")  # noqa: E731
    assert record[8:16] == b"RM\x01\x01\x34\x12\xcd\xab"
    assert [u64(at) for at in (16, 24, 32, 40)] == [1, 2, 5, 2**64 - 9]
    assert record[48:56] == b"\x03\0\0\0\x01\0\0\0"
    assert record[56:] == np.float32(7).tobytes() + np.array([1.5, -2, 3], "<f2").tobytes() + bytes(6)

    # the checksum, word by word
    gamma, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def factor(i: int) -> int:
        z = i * gamma & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return (z ^ z >> 31) | 1

    words = [u64(at) for at in range(0, len(record), 8)]
    total = len(words) * gamma + sum((w ^ w >> 32) * factor(i) for i, w in enumerate(words) if i)
    assert words[0] == total & mask


@given(sizes=SIZES, data=st.data())
def test_float32_comes_back_bit_for_bit(sizes: list[tuple[int, int]], data: st.DataObject):
    stored = stored_of(sizes)
    count = stored.values.numel()
    stored = stored._replace(values=torch.tensor(data.draw(st.lists(FINITE, min_size=count, max_size=count))))
    records = encode(stored, prints_of(len(sizes)), VERSIONS, 11, "float32").values
    assert [len(one) for one in records] == [size_of("float32", *size) for size in sizes]
    found = decode(records, prints_of(len(sizes)), VERSIONS)
    assert found.outcomes == Outcomes(found=len(sizes))
    assert found.as_of.tolist() == [11] * len(sizes)
    assert found.stored.values.view(torch.int32).tolist() == stored.values.float().view(torch.int32).tolist()
    for part in ("exact", "lengths", "time"):
        assert torch.equal(getattr(found.stored, part), getattr(stored, part))


@given(sizes=SIZES, scale=st.sampled_from([1e-9, 1e-3, 1.0, 3e4, 1e6]), seed=st.integers(0, 99))
def test_less_precision_is_bounded(sizes: list[tuple[int, int]], scale: float, seed: int):
    stored = stored_of(sizes, scale, seed)
    for dtype in ("float16", "int8"):
        found = decode(encode(stored, prints_of(len(sizes)), VERSIONS, 11, dtype).values, prints_of(len(sizes))).stored
        assert torch.equal(found.exact, stored.exact)
        start = 0
        for values, _ in sizes:
            was, now = stored.values[start : start + values], found.values[start : start + values]
            start += values
            if dtype == "float16":
                assert torch.equal(now, was.clamp(-65504, 65504).half().float())
            for i in range(0, values if dtype == "int8" else 0, 32):
                largest = was[i : i + 32].abs().max()
                # half a scale: the largest over 127, rounded up to float16, whose subnormals are 2^-24 apart
                scale_at_most = largest / 127 * (1 + 2**-10) + 2**-24
                assert (now[i : i + 32] - was[i : i + 32]).abs().max() <= scale_at_most / 2 * (1 + 1e-5)


def test_numbers_beyond_float16_are_clamped_and_counted():
    values, lengths = torch.tensor([1e5, -7e4, 65504.0, 1.0]), torch.tensor([[4, 0]])
    stored = Stored(values, torch.zeros(0), lengths, torch.zeros(1).long())
    for dtype, count, held in (("float16", 2, [65504, -65504, 65504, 1]), ("float32", 0, [1e5, -7e4, 65504, 1])):
        encoded = encode(stored, prints_of(1), VERSIONS, 0, dtype)
        assert encoded.clamped == count
        assert decode(encoded.values, prints_of(1)).stored.values.tolist() == held
    huge = stored._replace(values=torch.tensor([1e8, 1.0, 1.0, 1.0]))
    encoded = encode(huge, prints_of(1), VERSIONS, 0, "int8")
    assert encoded.clamped == 1
    assert decode(encoded.values, prints_of(1)).stored.values[0] == 65504 * 127


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_refused(bad: float):
    stored = stored_of([(2, 1), (2, 1), (2, 1)])
    stored.values[3] = bad
    with pytest.raises(RecordError, match=f"record 1: value {bad}, one of 1 that no store may keep"):
        encode(stored, prints_of(3), VERSIONS, 0, "float16")
    stored = stored_of([(2, 1), (2, 1)])
    stored.exact[1] = torch.nan
    with pytest.raises(RecordError, match="record 1: exact number nan"):
        encode(stored, prints_of(2), VERSIONS, 0, "float16")


@given(dtype=st.sampled_from(DTYPES), at=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_a_changed_byte_is_recognised(dtype: Dtype, at: int, flip: int):
    records = encode(stored_of([(40, 2)] * 3), prints_of(3), VERSIONS, 11, dtype).values
    worse = changed(records[1], at, flip)
    found = decode([records[0], worse, records[2]], prints_of(3), VERSIONS)
    assert found.outcomes == Outcomes(found=2, corrupt=1)
    assert found.stored.lengths.tolist() == [[40, 2], [0, 0], [40, 2]]
    assert header_of(worse) is None


@given(dtype=st.sampled_from(DTYPES), sizes=SIZES.filter(bool), data=st.data())
def test_cut_swapped_and_random_bytes_are_recognised(dtype: Dtype, sizes: list[tuple[int, int]], data: st.DataObject):
    count = len(sizes)
    records = encode(stored_of(sizes), prints_of(count), VERSIONS, 11, dtype).values
    which = data.draw(st.integers(0, count - 1))
    whole = records[which]
    worse = data.draw(
        st.one_of(
            st.integers(0, len(whole) - 1).map(lambda n: whole[:n]),
            st.binary(max_size=200),
            st.just(bytes(len(whole))),
            st.just(whole + bytes(8)),
            st.just(whole + whole),
            st.just(whole[:8] + whole[16:24] + whole[8:16] + whole[24:]),
        )
    )
    found = decode([*records[:which], worse, *records[which + 1 :]], prints_of(count), VERSIONS)
    assert found.outcomes == Outcomes(found=count - 1, corrupt=1)
    assert found.stored.lengths[which].tolist() == [0, 0]
    others = [i for i in range(count) if i != which]
    assert torch.equal(found.stored.lengths[others], torch.tensor(sizes).view(-1, 2)[others])


HARMS: dict[str, Callable[[bytes, int], bytes | None]] = {
    "missing": lambda record, at: None,
    "empty": lambda record, at: b"",
    "cut": lambda record, at: record[:-8],
    "longer": lambda record, at: record + bytes(8),
    "changed": lambda record, at: changed(record, at, 1 + at % 255),
}


@st.composite
def reads(draw: st.DrawFn, harm: str) -> tuple[list[bytes | None], U32]:
    """What a read may find: records of one kind or of several, some, none or all of which suffered a harm."""
    sizes, dtypes = draw(SIZES.filter(bool)), draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2))
    if draw(st.booleans()):
        sizes, dtypes = sizes[:1] * draw(st.integers(1, 6)), dtypes[:1]
    stored, prints, count = stored_of(sizes), prints_of(len(sizes)), len(sizes)
    records = [encode(stored, prints, VERSIONS, 11, dtype).values for dtype in dtypes]
    suffering = draw(st.one_of(st.just([True] * count), st.lists(st.booleans(), min_size=count, max_size=count)))
    others = prints + np.uint32(harm == "another's")
    versions = MemoryVersions(5, 3) if harm == "older" else VERSIONS
    worse = [encode(stored, others, versions, 12, dtype).values for dtype in dtypes]
    found: list[bytes | None] = [
        (worse if suffers else records)[i % len(dtypes)][i] for i, suffers in enumerate(suffering)
    ]
    if harm in HARMS:
        at = draw(st.integers(0, 10_000))
        found = [HARMS[harm](value, at) if suffers else value for value, suffers in zip(found, suffering, strict=True)]
    return found, prints


def changed(record: bytes, at: int, flip: int) -> bytes:
    """One of its bytes is another."""
    at %= len(record)
    return record[:at] + bytes([record[at] ^ flip]) + record[at + 1 :]


def same(one: Decoded, other: Decoded) -> bool:
    """All tensors, outcomes, and the times in any order."""
    alike = all(torch.equal(a, b) for a, b in zip(one.stored, other.stored, strict=True))
    return alike and one.outcomes == other.outcomes and sorted(one.as_of.tolist()) == sorted(other.as_of.tolist())


@pytest.mark.parametrize("harm", ["none", "older", "another's", *HARMS])
@given(data=st.data(), versions=st.sampled_from([VERSIONS, None]))
def test_records_judged_together_are_as_those_judged_one_by_one(
    harm: str, versions: MemoryVersions | None, data: st.DataObject
):
    """And in whatever order they come."""
    found, prints = data.draw(reads(harm))
    together = decode(found, prints, versions)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(decoding, "_all_alike", lambda *_: None)
        assert same(together, decode(found, prints, versions))
    order = np.array(data.draw(st.permutations(range(len(found)))), np.int64)
    assert same(together, decode([found[i] for i in order.tolist()], prints, versions, order))


@pytest.mark.parametrize("dtype", DTYPES)
def test_records_of_one_kind_are_judged_together_whatever_is_missing(dtype: Dtype, monkeypatch: pytest.MonkeyPatch):
    records = encode(stored_of([(64, 1)] * 5), prints_of(5), VERSIONS, 11, dtype).values
    monkeypatch.setattr(decoding, "_judged", None)
    assert decode(records, prints_of(5), VERSIONS).outcomes == Outcomes(found=5)
    some = decode([None, records[1], None, records[3], records[4]], prints_of(5), VERSIONS)
    assert some.outcomes == Outcomes(found=3, missing=2)
    assert some.stored.lengths[:, 0].tolist() == [0, 64, 0, 64, 64]
    assert some.stored.time.tolist() == [0, -1, 0, 1, 2]


def test_records_of_others_and_of_other_models_are_told_apart():
    stored, prints = stored_of([(3, 0)] * 6), prints_of(6)
    mine = encode(stored, prints, VERSIONS, 0, "float32").values
    older = encode(stored, prints, VERSIONS._replace(model=5), 0, "float32").values
    recoded = encode(stored, prints, VERSIONS._replace(codebook=5), 0, "float32").values
    asked = [mine[0], None, older[2], recoded[3], mine[5], mine[1][:-1]]
    found = decode(asked, prints, VERSIONS)
    assert found.outcomes == Outcomes(found=1, missing=1, old_version=2, corrupt=1, collision=1)
    assert found.stored.lengths.tolist() == [[3, 0]] + [[0, 0]] * 5
    assert torch.equal(found.stored.values, stored.values[:3])


def test_records_of_many_sizes_and_dtypes_come_back_in_their_order():
    sizes = [(40, 1), (0, 0), (40, 1), (3, 0), (0, 2), (7, 0)]
    stored, prints = stored_of(sizes), prints_of(6)
    by_dtype = {dtype: encode(stored, prints, VERSIONS, 0, dtype).values for dtype in DTYPES}
    mixed = [by_dtype[DTYPES[i % 3]][i] for i in range(6)]
    found = decode(mixed, prints, VERSIONS)
    assert found.outcomes == Outcomes(found=6)
    assert found.stored.lengths.tolist() == [list(size) for size in sizes]
    assert torch.equal(found.stored.exact, stored.exact)
    torch.testing.assert_close(found.stored.values, stored.values, atol=0.02, rtol=0)


def test_a_header_says_what_a_record_is():
    (record,) = encode(stored_of([(5, 2)]), np.array([77], np.uint32), VERSIONS, -3, "int8").values
    assert header_of(record) == ("int8", 77, VERSIONS, -3, -2, 5, 2)
    assert header_of(record[: HEADER_BYTES - 8]) is None


def test_nothing_asked_is_nothing_found():
    found = decode([], prints_of(0), VERSIONS)
    assert found.outcomes == Outcomes()
    assert found.stored.lengths.shape == (0, 2)
