"""Parts of a batch to one batch of plain tensors by name, in NumPy.

Symbols as in :mod:`features.batch`: R requests, N candidates, H distinct histories, T events of them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.selection import Selection
from features.views import Array, Ints

_T = TypeVar("_T")


@dataclass
class Part:
    """One shard's share of a batch: fields as in RequestBatch, feature by feature.

    row_events: `[H]`, events of each distinct history. candidates: `[R]`, of each request.
    request, candidate: values and their numbers a row.
    """

    row_events: Ints
    start: Ints
    end: Ints
    now: Array
    user: Array
    history_length: Ints
    candidates: Ints
    item: Array
    event_time: Array
    request: list[tuple[Array, Ints]] = field(default_factory=list)
    candidate: list[tuple[Array, Ints]] = field(default_factory=list)
    history: list[Array] = field(default_factory=list)
    target: list[Array] = field(default_factory=list)
    request_dense: list[Array] = field(default_factory=list)
    candidate_dense: list[Array] = field(default_factory=list)
    event_dense: list[Array] = field(default_factory=list)
    event_codes: list[Array] = field(default_factory=list)
    candidate_codes: list[Array] = field(default_factory=list)
    labels: list[Array] = field(default_factory=list)
    oracles: list[Array] = field(default_factory=list)


def nothing(selection: Selection) -> Part:
    """A request without history and candidates: what a rank feeds when its own have run out."""
    return without_candidates(selection, 1)


def without_candidates(selection: Selection, requests: int) -> Part:
    """Requests without histories, candidates and features of their own."""
    spec = selection.spec

    def none() -> Ints:
        return np.zeros(0, np.int64)

    def zeros() -> Ints:
        return np.zeros(requests, np.int64)

    return Part(
        row_events=zeros(),
        start=zeros(),
        end=zeros(),
        now=zeros(),
        user=zeros(),
        history_length=zeros(),
        candidates=zeros(),
        item=none(),
        event_time=none(),
        request=[(none(), zeros()) for _ in spec.request],
        candidate=[(none(), none()) for _ in spec.candidate],
        history=[none() for _ in (*spec.sequence, *spec.event, *spec.content)],
        target=[none() for _ in spec.sequence],
        request_dense=[np.zeros(requests, np.float32) for _ in spec.request_dense],
        candidate_dense=[none() for _ in spec.candidate_dense],
        event_dense=[none() for _ in spec.event_dense],
        event_codes=[none() for _ in spec.codes],
        candidate_codes=[none() for _ in spec.codes],
        labels=[none() for _ in selection.labels],
        oracles=[none() for _ in selection.oracles],
    )


def assemble(parts: list[Part], selection: Selection) -> dict[str, Tensor]:
    """One batch of its parts: keyed tensors feature by feature, windows shifted to the common events."""
    spec = selection.spec
    requests = sum(p.start.size for p in parts)
    candidates = sum(p.item.size for p in parts)
    events = [p.event_time.size for p in parts]
    shifts = itertools.accumulate(events[:-1], initial=0)
    unused = requests - sum(p.row_events.size for p in parts)
    rows = np.concatenate([*(p.row_events for p in parts), np.zeros(unused, np.int64)])
    per_request = np.concatenate([p.candidates for p in parts])
    offsets = np.concatenate([[0], per_request.cumsum()])
    windows = [(p.start + shift, p.end + shift) for p, shift in zip(parts, shifts, strict=True)]
    histories, targets = len(spec.sequence) + len(spec.event) + len(spec.content), len(spec.sequence)
    return {
        **_pooled("request", [p.request for p in parts]),
        **_pooled("candidate", [p.candidate for p in parts]),
        "sequence.values": _long(_by_feature([p.history for p in parts]) + _by_feature([p.target for p in parts])),
        "sequence.lengths": _long([rows] * histories + [per_request] * targets),
        "request_dense": _table([p.request_dense for p in parts], requests, np.float32),
        "candidate_dense": _table([p.candidate_dense for p in parts], candidates, np.float32),
        "event_dense": _table([p.event_dense for p in parts], sum(events), np.float32),
        "event_codes": _table([p.event_codes for p in parts], sum(events), np.int64),
        "candidate_codes": _table([p.candidate_codes for p in parts], candidates, np.int64),
        "event_time": _long([p.event_time for p in parts]),
        "now": _long([p.now for p in parts]),
        "start": _long([start for start, _ in windows]),
        "end": _long([end for _, end in windows]),
        "offsets": _long([offsets]),
        "labels": _table([p.labels for p in parts], candidates, np.float32),
        "user": _long([p.user for p in parts]),
        "item": _long([p.item for p in parts]),
        "history_length": _long([p.history_length for p in parts]),
        "oracles": _table([p.oracles for p in parts], candidates, np.float32),
    }


def _by_feature(columns: Sequence[Sequence[_T]]) -> list[_T]:
    """Each part's columns, feature by feature."""
    return [column for feature in zip(*columns, strict=True) for column in feature]


def _pooled(name: str, columns: list[list[tuple[Array, Ints]]]) -> dict[str, Tensor]:
    ordered = _by_feature(columns)
    return {
        f"{name}.values": _long([values for values, _ in ordered]),
        f"{name}.lengths": _long([lengths for _, lengths in ordered]),
    }


def _long(arrays: Sequence[Array]) -> Tensor:
    """One int64 tensor of all arrays, converted while copying; a lone int64 array that a part owns is not copied."""
    if not arrays:
        return torch.empty(0, dtype=torch.int64)
    if len(arrays) == 1:
        return torch.from_numpy(arrays[0].astype(np.int64, copy=not arrays[0].flags.writeable))
    return torch.from_numpy(np.concatenate(arrays, dtype=np.int64, casting="unsafe"))


def _table(columns: list[list[Array]], rows: int, kind: npt.DTypeLike) -> Tensor:
    """`[rows, features]` of each part's columns."""
    out = np.empty((rows, len(columns[0])), kind)
    for i in range(out.shape[1]):
        np.concatenate([part[i] for part in columns], out=out[:, i], casting="unsafe")
    return torch.from_numpy(out)


class Packed(NamedTuple):
    """A batch as one piece of memory, `[bytes]` uint8, which costs processes less to hand over than a score of tensors.

    layout: name, type and shape of each tensor in their order.
    """

    memory: Tensor
    layout: list[tuple[str, torch.dtype, tuple[int, ...]]]


def pack(tensors: dict[str, Tensor]) -> Packed:
    """All tensors in one piece of memory, the wider types first, so that each lies where its type may."""
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    # an empty tensor that NumPy made has strides of 0, of which torch makes no bytes
    memory = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in ordered if tensor.numel()])
    return Packed(memory, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered])


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The tensors as views of the piece."""
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in packed.layout]
    pieces = packed.memory.split(sizes)
    return {
        name: piece.view(dtype).view(shape) for (name, dtype, shape), piece in zip(packed.layout, pieces, strict=True)
    }
