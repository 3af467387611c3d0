"""From bytes to memories: records of one size at once, each one judged. :mod:`ranker.memory.record` has the layout.

Nothing that comes from a store is trusted: a record that is cut, changed, another's or of another model is a lost one.
A read of a healthy store finds records of one kind, all of them sound, which one comparison of their headers tells;
only where it fails are the records judged one by one.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ranker.longseq.stored import Stored
from ranker.memory.keys import I64, U32, U64
from ranker.memory.record import HEADER_BYTES, SCALED, Dtype, Floats, checksums, kind_of, scales_of, size_of
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
    """Records of one kind: values `[n, V]`, exact `[n, E]`, time and as_of `[n]`."""

    values: Tensor
    exact: Floats
    time: I64
    as_of: I64


def decode(
    found: Sequence[bytes | None],
    fingerprints: U32,
    versions: MemoryVersions | None = None,
    order: I64 | None = None,
) -> Decoded:
    """Records of their bytes, None for one that is not there. No bytes whatever make it raise.

    Args:
        found: U of them; fingerprints: `[U]`, of the keys they were asked by.
        versions: those that are wanted; None: any.
        order: `[U]`, which of the asked each of `found` is; None: they are in the order of the asked.
    """
    rows, present = order, found
    if not all(found):  # the quickest look for a None
        there = np.array([i for i, value in enumerate(found) if value is not None], np.int64)
        rows, present = there if order is None else order[there], [value for value in found if value is not None]
    alike = _all_alike(present, rows, fingerprints, versions)  # type: ignore[arg-type]
    if alike is None:
        rows = np.arange(len(found)) if rows is None else rows
        return _judged(present, rows, fingerprints, versions)  # type: ignore[arg-type]
    asked, count = len(found), len(present)
    by_place = None if rows is None else rows.argsort()
    values, exact, time, as_of = _part(*alike, by_place)
    if rows is None or count == asked:
        lengths = np.empty([asked, 2], np.int64)
        lengths[:, 0], lengths[:, 1] = alike[2:]
    else:
        lengths, time_of_found, time = np.zeros([asked, 2], np.int64), time, np.zeros(asked, np.int64)
        lengths[rows], time[rows[by_place]] = alike[2:], time_of_found
    # records of one size follow one another as the asked do, whatever is lost between them
    stored = _stored(values.reshape(-1), exact.reshape(-1), lengths, time)
    return Decoded(stored, Outcomes(count, asked - count), as_of)


def _all_alike(
    present: Sequence[bytes], rows: I64 | None, fingerprints: U32, versions: MemoryVersions | None
) -> tuple[U64, Dtype, int, int] | None:
    """The words `[n, W]` of records that are all sound, current, their keys' own and of one kind, and that kind: its
    dtype, V and E; None where one record is not so.

    Args:
        present: n of them; rows: `[n]`, their places among the asked; None: they are the asked.
    """
    size = len(present[0]) if present else 0
    data = bytearray().join(present)
    if size < HEADER_BYTES or size % 8 or set(map(len, present)) != {size}:
        return None
    words = np.ndarray((len(present), size // 8), _U8, data)
    stated = words[:, : HEADER_BYTES // 8]
    _, start, model, codebook, _, _, lengths = stated[0].tolist()
    kind = _kind_of(start & 0xFFFFFFFF, lengths, size)
    if kind is None or (versions is not None and versions != (model, codebook)):
        return None
    due = np.empty_like(stated)  # the first record's, but for what each has of its own
    due[:] = stated[0]
    due[:, 0] = checksums(words)
    due.view(_U4)[:, 3] = fingerprints if rows is None else fingerprints[rows]
    due[:, 4:6] = stated[:, 4:6]
    return (words, *kind) if stated.tobytes() == due.tobytes() else None


@lru_cache(maxsize=256)
def _kind_of(start: int, lengths: int, size: int) -> tuple[Dtype, int, int] | None:
    """dtype, V and E of records that state these; None where no record of this size can."""
    kind = kind_of(start, lengths)
    return kind if kind is not None and size_of(*kind) == size else None


def _judged(present: Sequence[bytes], rows: I64, fingerprints: U32, versions: MemoryVersions | None) -> Decoded:
    """Each record on its own merits, as if none were like another."""
    parts: list[tuple[I64, _Part]] = []
    old = collision = 0
    for some, size, data in _by_size(present):
        if size < HEADER_BYTES or size % 8:
            continue
        of_size, words = rows[some], np.frombuffer(data, "<u8").reshape(len(some), -1)
        whole = checksums(words) == words[:, 0]
        current = whole
        if versions is not None:
            current = whole & (words[:, 2] == np.uint64(versions.model)) & (words[:, 3] == np.uint64(versions.codebook))
        own = current & (words[:, 1] >> np.uint64(32) == fingerprints[of_size])
        sound, recent = int(np.count_nonzero(whole)), int(np.count_nonzero(current))
        old, collision = old + sound - recent, collision + recent - int(np.count_nonzero(own))
        parts += _by_kind(of_size[own], words[own])
    as_of = np.concatenate([np.zeros(0, np.int64), *(part.as_of for _, part in parts)])
    corrupt = len(present) - len(as_of) - old - collision
    outcomes = Outcomes(len(as_of), len(fingerprints) - len(present), old, corrupt, collision)
    return Decoded(_joined(parts, len(fingerprints)), outcomes, as_of)


def _by_size(present: Sequence[bytes]) -> Generator[tuple[I64, int, bytearray]]:
    """Places of the records of one size, that size, and their bytes one after another."""
    of_record = np.array(list(map(len, present)), np.int64)
    for size in sorted(set(of_record.tolist())):
        some = np.flatnonzero(of_record == size)
        yield some, size, bytearray().join([present[i] for i in some.tolist()])


def _by_kind(rows: I64, words: U64) -> Generator[tuple[I64, _Part]]:
    """Records `[n, W]` by what they state of themselves; none of those that state what cannot be."""
    start, lengths = words[:, 1].astype(np.uint32), words[:, 6]
    for kind in sorted(set(zip(start.tolist(), lengths.tolist(), strict=True))):
        if (stated := _kind_of(*kind, 8 * words.shape[1])) is not None:
            alike = (start == kind[0]) & (lengths == kind[1])
            yield rows[alike], _part(words[alike], *stated)


def _part(words: U64, dtype: Dtype, values: int, exact: int, order: I64 | None = None) -> _Part:
    """Numbers of records `[n, W]`, in `order` `[n]`; as_of in none."""
    start = HEADER_BYTES + 4 * exact
    kept = _columns(words, HEADER_BYTES, start, _F4, order) if exact else np.empty([len(words), 0], np.float32)
    as_of, time = words[:, 4].astype(np.int64), words[:, 5].astype(np.int64)
    time = time if order is None else time.take(order)
    if dtype == "float32":
        return _Part(torch.from_numpy(_columns(words, start, start + 4 * values, _F4, order)), kept, time, as_of)
    if dtype == "float16":  # to float32 by PyTorch: NumPy has no fast way
        numbers = torch.from_numpy(_columns(words, start, start + 2 * values, _F2, order)).float()
        return _Part(numbers, kept, time, as_of)
    middle = start + 2 * scales_of(values)
    scale = _columns(words, start, middle, _F2, order).astype(np.float32)
    integers = _columns(words, middle, middle + values, _I1, order).astype(np.float32)
    if values % SCALED:
        integers *= scale.repeat(SCALED, 1)[:, :values]
    else:
        blocks = integers.reshape(len(words), -1, SCALED)
        blocks *= scale[:, :, None]
    return _Part(torch.from_numpy(integers), kept, time, as_of)


_Type = tuple[np.dtype[Any], np.dtype[Any]]
_U8, _U4 = np.dtype("<u8"), np.dtype("<u4")
_F4, _F2, _I1 = ((np.dtype(f"<{name}"), np.dtype(name)) for name in ("f4", "f2", "i1"))
"""of numbers as records have them, and as this machine has them"""


def _columns(words: U64, start: int, end: int, type_: _Type, order: I64 | None) -> npt.NDArray[Any]:
    """The numbers between two bytes of each record `[n, columns]`, in this order, side by side."""
    numbers = words.view(np.uint8)[:, start:end].view(type_[0])
    return np.ascontiguousarray(numbers if order is None else numbers.take(order, 0), type_[1])


def _joined(parts: list[tuple[I64, _Part]], count: int) -> Stored:
    """Records at their places; zeros between them."""
    lengths, time = np.zeros([count, 2], np.int64), np.zeros(count, np.int64)
    for rows, part in parts:
        lengths[rows] = part.values.shape[1], part.exact.shape[1]
        time[rows] = part.time
    ends = lengths.cumsum(0) if count else np.zeros([1, 2], np.int64)
    starts = ends - lengths if count else ends
    values, exact = np.empty(int(ends[-1, 0]), np.float32), np.empty(int(ends[-1, 1]), np.float32)
    for rows, part in parts:
        values[starts[rows, 0, None] + np.arange(part.values.shape[1])] = part.values.numpy()
        exact[starts[rows, 1, None] + np.arange(part.exact.shape[1])] = part.exact
    return _stored(torch.from_numpy(values), exact, lengths, time)


def _stored(values: Tensor, exact: Floats, lengths: I64, time: I64) -> Stored:
    return Stored(values, torch.from_numpy(exact), torch.from_numpy(lengths), torch.from_numpy(time))
