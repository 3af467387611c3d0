"""From bytes to memories: records of one size at once, each one judged. :mod:`ranker.memory.record` has the layout.

Nothing that comes from a store is trusted: a record that is cut, changed, another's or of another model is a lost one.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ranker.longseq.stored import Stored
from ranker.memory.keys import I64, U32, U64
from ranker.memory.record import HEADER_BYTES, SCALED, WIDTH, Dtype, Floats, checksums, kind_of, scales_of, size_of
from ranker.memory.versions import MemoryVersions


class Outcomes(NamedTuple):
    """What became of the records that were asked for."""

    found: int = 0
    missing: int = 0
    old_version: int = 0
    """of another model or other codebooks"""
    corrupt: int = 0
    """of a wrong size, mark or checksum"""
    collision: int = 0
    """whole, but of another user, block or code"""


class Decoded(NamedTuple):
    """stored: all asked records in order, in float32, a lost one of lengths 0 and 0; outcomes: how many of which;
    as_of: of those that were found, in no order, the time whose history each holds, in milliseconds."""

    stored: Stored
    outcomes: Outcomes
    as_of: I64


class _Part(NamedTuple):
    """Records of one kind: places among the asked `[n]`, values `[n, V]`, exact `[n, E]`, time and as_of `[n]`."""

    rows: I64
    values: Floats
    exact: Floats
    time: I64
    as_of: I64


def decode(found: Sequence[bytes | None], fingerprints: U32, versions: MemoryVersions | None = None) -> Decoded:
    """Records of their bytes, None for one that is not there. No bytes whatever make it raise.

    Args:
        found: U of them; fingerprints: `[U]`, of the keys they were asked by.
        versions: those that are wanted; None: any.
    """
    parts: list[_Part] = []
    present = old = collision = 0
    for rows, size, data in _by_size(found):
        present += len(rows)
        if size < HEADER_BYTES or size % 8:
            continue
        words = np.frombuffer(data, "<u8").reshape(len(rows), -1)
        whole = checksums(words) == words[:, 0]
        current = whole
        if versions is not None:
            current = whole & (words[:, 2] == np.uint64(versions.model)) & (words[:, 3] == np.uint64(versions.codebook))
        own = current & (words[:, 1] >> np.uint64(32) == fingerprints[rows])
        if (mine := int(np.count_nonzero(own))) < len(rows):
            sound, recent = int(np.count_nonzero(whole)), int(np.count_nonzero(current))
            old, collision = old + sound - recent, collision + recent - mine
            rows, words = rows[own], words[own]
        parts += _by_kind(rows, words)
    as_of = parts[0].as_of if len(parts) == 1 else np.concatenate([np.zeros(0, np.int64), *(p.as_of for p in parts)])
    corrupt = present - len(as_of) - old - collision
    outcomes = Outcomes(len(as_of), len(found) - present, old, corrupt, collision)
    return Decoded(_joined(parts, len(found)), outcomes, as_of)


def _by_size(found: Sequence[bytes | None]) -> Generator[tuple[I64, int, bytearray]]:
    """Places of the records of one size, that size, and their bytes one after another."""
    rows, present = np.arange(len(found)), found
    if None in found:
        rows = np.flatnonzero([value is not None for value in found])
        present = [value for value in found if value is not None]
    distinct = set(map(len, present))  # type: ignore[arg-type]
    if len(distinct) == 1:
        yield rows, distinct.pop(), bytearray().join(present)  # type: ignore[arg-type]
        return
    of_record = np.array(list(map(len, present)), np.int64)  # type: ignore[arg-type]
    for size in sorted(distinct):
        alike = np.flatnonzero(of_record == size)
        yield rows[alike], size, bytearray().join([present[i] for i in alike.tolist()])  # type: ignore[misc]


def _by_kind(rows: I64, words: U64) -> Generator[_Part]:
    """Records `[n, W]` by what they state of themselves; none of those that state what cannot be."""
    if len(rows) == 0:
        return
    start, lengths = words[:, 1].astype(np.uint32), words[:, 6]
    if (start == start[0]).all() and (lengths == lengths[0]).all():
        kinds = [(int(start[0]), int(lengths[0]))]
    else:
        kinds = sorted(set(zip(start.tolist(), lengths.tolist(), strict=True)))
    for kind in kinds:
        if (stated := kind_of(*kind)) is None or size_of(*stated) != 8 * words.shape[1]:
            continue
        if len(kinds) > 1:
            alike = (start == kind[0]) & (lengths == kind[1])
            yield _part(rows[alike], words[alike], *stated)
        else:
            yield _part(rows, words, *stated)


def _part(rows: I64, words: U64, dtype: Dtype, values: int, exact: int) -> _Part:
    data = words.view(np.uint8)
    start = HEADER_BYTES + 4 * exact
    kept = data[:, HEADER_BYTES:start].view("<f4").astype(np.float32)
    as_of, time = words[:, 4].astype(np.int64), words[:, 5].astype(np.int64)
    if dtype != "int8":
        numbers = data[:, start : start + WIDTH[dtype] * values].view("<f4" if dtype == "float32" else "<f2")
        return _Part(rows, widened(numbers), kept, time, as_of)
    scales = scales_of(values)
    scale = data[:, start : start + 2 * scales].view("<f2")
    integers = data[:, start + 2 * scales : start + 2 * scales + values].view(np.int8).astype(np.float32)
    return _Part(rows, integers * widened(scale).repeat(SCALED, 1)[:, :values], kept, time, as_of)


def widened(numbers: npt.NDArray[Any]) -> Floats:
    """float16 or float32 as float32, by PyTorch: NumPy has no fast way."""
    native = numbers if sys.byteorder == "little" else numbers.astype(numbers.dtype.newbyteorder("="))
    return torch.from_numpy(native).float().contiguous().numpy()


def _joined(parts: list[_Part], count: int) -> Stored:
    if len(parts) == 1 and len(parts[0].rows) == count:
        (_, values, exact, time, _), lengths = parts[0], np.empty([count, 2], np.int64)
        lengths[:] = values.shape[1], exact.shape[1]
        return _stored(values.reshape(-1), exact.reshape(-1), lengths, time)
    lengths, time = np.zeros([count, 2], np.int64), np.zeros(count, np.int64)
    for part in parts:
        lengths[part.rows] = part.values.shape[1], part.exact.shape[1]
        time[part.rows] = part.time
    ends = lengths.cumsum(0) if count else np.zeros([1, 2], np.int64)
    starts = ends - lengths if count else ends
    values, exact = np.empty(int(ends[-1, 0]), np.float32), np.empty(int(ends[-1, 1]), np.float32)
    for part in parts:
        values[starts[part.rows, 0, None] + np.arange(part.values.shape[1])] = part.values
        exact[starts[part.rows, 1, None] + np.arange(part.exact.shape[1])] = part.exact
    return _stored(values, exact, lengths, time)


def _stored(values: Floats, exact: Floats, lengths: I64, time: I64) -> Stored:
    return Stored(torch.from_numpy(values), torch.from_numpy(exact), torch.from_numpy(lengths), torch.from_numpy(time))
