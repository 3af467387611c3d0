"""The training example: a batch of requests, each with one history and many candidates.

Symbols: R requests, N candidates, H distinct histories, T events of them all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.selection import Feature, FeatureSpec


class RequestBatch(NamedTuple):
    """A batch of requests as TorchRec reads it.

    request: ids at stride R. candidate: ids at stride N.
    sequence: at stride R, keys ``history:NAME`` (row h holds distinct history h, h < H ≤ R; the rest are empty) and
        ``candidate:NAME`` (row r holds the candidates of request r), so that both share one table and one look-up. For
        a vector, ``history:NAME`` holds the items' dense indices themselves, unknown ones and dropped ones too.
        Requests of one user whose windows overlap or touch share a distinct history.
    request_dense `[R, ·]`, candidate_dense `[N, ·]`, event_dense `[T, ·]`: float32.
    event_codes `[T, codes]`, candidate_codes `[N, codes]`: int64, ids that no table reads.
    event_time `[T]`, now `[R]`: int64 milliseconds.
    start, end: `[R]` int64, request r's events are ``[start[r], end[r])`` of T.
    offsets: `[R + 1]` int64, request r's candidates.
    labels: `[N, tasks]` float32.
    user `[R]`, item `[N]`, history_length `[R]` (events before the request, uncut), oracles `[N, ·]`: for evaluation.
    """

    request: KeyedJaggedTensor
    candidate: KeyedJaggedTensor
    sequence: KeyedJaggedTensor
    request_dense: Tensor
    candidate_dense: Tensor
    event_dense: Tensor
    event_codes: Tensor
    candidate_codes: Tensor
    event_time: Tensor
    now: Tensor
    start: Tensor
    end: Tensor
    offsets: Tensor
    labels: Tensor
    user: Tensor
    item: Tensor
    history_length: Tensor
    oracles: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> RequestBatch:
        """The same batch on `device`."""
        return RequestBatch(**{name: x.to(device, non_blocking=non_blocking) for name, x in self._asdict().items()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of its tensors until `stream` is through with them."""
        for x in self:
            x.record_stream(stream)  # type: ignore[arg-type]

    @property
    def requests(self) -> int:
        """R."""
        return self.start.numel()

    @property
    def candidates(self) -> int:
        """N."""
        return self.labels.size(0)


def sequence_keys(spec: FeatureSpec) -> list[str]:
    """Keys of the `sequence` KeyedJaggedTensor in their order."""
    history = [f"history:{f.name}" for f in (*spec.sequence, *spec.event, *spec.content)]
    return history + [f"candidate:{f.name}" for f in spec.sequence]


def names(features: tuple[Feature, ...]) -> list[str]:
    """The features' names, the keys of a pooled KeyedJaggedTensor."""
    return [f.name for f in features]


def from_tensors(spec: FeatureSpec, tensors: dict[str, Tensor]) -> RequestBatch:
    """A batch from plain tensors by name: keyed ones as ``FIELD.values``, ``FIELD.lengths``, others as ``FIELD``."""

    def keyed(field: str, keys: list[str]) -> KeyedJaggedTensor:
        return KeyedJaggedTensor(keys=keys, values=tensors[f"{field}.values"], lengths=tensors[f"{field}.lengths"])

    plain = {name: tensors[name] for name in RequestBatch._fields if name not in ("request", "candidate", "sequence")}
    return RequestBatch(
        request=keyed("request", names(spec.request)),
        candidate=keyed("candidate", names(spec.candidate)),
        sequence=keyed("sequence", sequence_keys(spec)),
        **plain,
    )


def to_tensors(batch: RequestBatch) -> dict[str, Tensor]:
    """The plain tensors that :func:`from_tensors` makes the same batch of."""
    tensors: dict[str, Tensor] = {}
    for name, x in batch._asdict().items():
        if isinstance(x, KeyedJaggedTensor):
            tensors |= {f"{name}.values": x.values(), f"{name}.lengths": x.lengths()}
        else:
            tensors[name] = x
    return tensors
