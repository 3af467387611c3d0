"""From memories to bytes, laid out as :mod:`ranker.memory.record` says: the records of one size at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ranker.longseq.stored import Stored
from ranker.memory.keys import I64, U32
from ranker.memory.record import (
    DTYPES,
    HEADER_BYTES,
    SCALED,
    START,
    Bytes,
    Dtype,
    Floats,
    RecordError,
    checksums,
    scales_of,
    size_of,
)  # fmt: skip
from ranker.memory.versions import MemoryVersions

_LARGEST = np.float32(np.finfo(np.float16).max)


class Encoded(NamedTuple):
    """values: the bytes of each record; clamped: numbers beyond what the dtype holds, now its largest."""

    values: list[bytes]
    clamped: int


def encode(stored: Stored, fingerprints: U32, versions: MemoryVersions, as_of_ms: int | I64, dtype: Dtype) -> Encoded:
    """The bytes of each record of `stored`.

    Args:
        fingerprints: `[U]`, of the records' keys.
        as_of_ms: of all, or `[U]` of each.

    Raises:
        RecordError: a number is not finite (`exact` may hold infinities, but no NaN).
    """
    values = stored.values.detach().to("cpu", torch.float32).numpy()
    exact = stored.exact.detach().to("cpu", torch.float32).numpy()
    lengths, time = stored.lengths.cpu().numpy(), stored.time.cpu().numpy()
    _refuse(~np.isfinite(values), "value", values, lengths[:, 0])
    _refuse(np.isnan(exact), "exact number", exact, lengths[:, 1])
    as_of = np.broadcast_to(np.asarray(as_of_ms, np.int64), len(lengths))
    starts = np.cumsum(lengths, 0) - lengths
    records: list[bytes] = [b""] * len(lengths)
    clamped = 0
    for (v, e), rows in _alike(lengths):
        size = size_of(dtype, v, e)
        words = np.zeros([len(rows), size // 8], "<u8")
        words[:, 1] = np.uint64(START | DTYPES.index(dtype) << 24) | fingerprints[rows].astype("<u8") << np.uint64(32)
        words[:, 2], words[:, 3] = versions
        words[:, 4], words[:, 5] = as_of[rows].view(np.uint64), time[rows].view(np.uint64)
        words[:, 6] = v | e << 32
        data = words.view(np.uint8)
        data[:, HEADER_BYTES : HEADER_BYTES + 4 * e] = _bytes(_of_rows(exact, starts[rows, 1], e), "<f4")
        packed, beyond = _packed(_of_rows(values, starts[rows, 0], v), dtype)
        data[:, HEADER_BYTES + 4 * e : HEADER_BYTES + 4 * e + packed.shape[1]] = packed
        words[:, 0] = checksums(words)
        whole = words.tobytes()
        for row, at in zip(rows.tolist(), range(0, len(whole), size), strict=True):
            records[row] = whole[at : at + size]
        clamped += beyond
    return Encoded(records, clamped)


def _refuse(wrong: npt.NDArray[np.bool_], what: str, numbers: Floats, lengths: I64) -> None:
    if wrong.any():
        at = int(wrong.argmax())
        record = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        raise RecordError(
            f"record {record}: {what} {numbers[at]}, one of {int(wrong.sum()):,} that no store may keep; find out with "
            "`ranker evaluate` whether the checkpoint scores its test split, and build from one that does"
        )


def _alike(lengths: I64) -> list[tuple[tuple[int, int], I64]]:
    """Rows by their lengths `[U, 2]`."""
    if len(lengths) == 0:
        return []
    if (lengths == lengths[0]).all():
        return [((int(lengths[0, 0]), int(lengths[0, 1])), np.arange(len(lengths)))]
    sizes, which = np.unique(lengths, axis=0, return_inverse=True)
    which = which.reshape(-1)
    return [((int(v), int(e)), np.flatnonzero(which == i)) for i, (v, e) in enumerate(sizes)]


def _of_rows(numbers: Floats, starts: I64, width: int) -> Floats:
    """`[rows, width]`, the numbers of each from its start on."""
    return numbers[starts[:, None] + np.arange(width)]


def _bytes(rows: npt.NDArray[Any], dtype: str) -> Bytes:
    """`[rows, bytes]`."""
    return np.ascontiguousarray(rows, dtype).view(np.uint8).reshape(len(rows), -1) if rows.size else _none(len(rows))


def _none(rows: int) -> Bytes:
    return np.zeros([rows, 0], np.uint8)


def _packed(values: Floats, dtype: Dtype) -> tuple[Bytes, int]:
    """Values `[rows, V]` as their bytes, and how many were beyond the dtype's range."""
    if dtype == "float32":
        return _bytes(values, "<f4"), 0
    if dtype == "float16":
        beyond = int((np.abs(values) > _LARGEST).sum())
        return _bytes(torch.from_numpy(values.clip(-_LARGEST, _LARGEST)).half().numpy(), "<f2"), beyond
    rows, width = values.shape
    padded = np.zeros([rows, scales_of(width) * SCALED], np.float32)
    padded[:, :width] = values
    blocks = padded.reshape(rows, -1, SCALED)
    wanted = np.abs(blocks).max(2, initial=0) / np.float32(127)
    scale = wanted.clip(max=_LARGEST).astype(np.float16)
    up = np.nextafter(scale, np.where(scale < _LARGEST, np.float16(np.inf), scale))
    scale = np.where(scale < wanted.clip(max=_LARGEST), up, scale)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))[:, :, None]
    quotients = np.rint(blocks / divisor)
    beyond = int((np.abs(quotients) > 127).sum())
    integers = quotients.clip(-127, 127).astype(np.int8).reshape(rows, -1)[:, :width]
    return np.concatenate([_bytes(scale, "<f2"), _bytes(integers, "i1")], 1), beyond
