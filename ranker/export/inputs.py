"""A batch as the inputs of exported files, by name: of the whole ranker, of the user encoder, of the candidate ranker.

The user encoder needs histories, and the groups that candidates probe them with; the candidate ranker needs the latest
events alone, and for each candidate the number of its group's record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch, names
from features.selection import FeatureSpec
from ranker.blocks import compresses, per_probe
from ranker.config import TrainConfig
from ranker.model import Plain
from ranker.ops.jagged import offsets_of, segments_of
from ranker.ops.probing import distinct_probes

Inputs = dict[str, Tensor | dict[str, Tensor]]


@dataclass(frozen=True)
class File:
    """An exported file by its name in the folder. `of`: what it does, and so which inputs it takes."""

    name: str
    of: Literal["ranker", "user_encoder", "candidate_ranker"]


@dataclass(frozen=True)
class StoredBlock:
    """A block whose memory a store keeps. `number`: its place in ``model.long``; `probe`: the feature that it has a
    record for each value of, or None where a request has one record; `column`: where that feature stands among
    ``features.codes``."""

    number: int
    type: str
    probe: str | None = None
    column: int = -1


def no_pair_because(config: TrainConfig) -> str | None:
    """Why a ranker cannot be two files with a store between them; None where it can."""
    if not config.model.long:
        return "model.long is empty: there is no memory to keep"
    others = [f"model.long[{i}] ({block.type})" for i, block in enumerate(config.model.long) if not compresses(block)]
    if others:
        return f"{', '.join(others)}: reads the history itself for every candidate, so that no store can stand for it"
    return None


def stored_blocks(config: TrainConfig, spec: FeatureSpec) -> list[StoredBlock]:
    """The blocks of a ranker whose memory a store keeps, in their order; searches and target attention left out."""
    found: list[StoredBlock] = []
    for i, block in enumerate(config.model.long):
        if per_probe(block):
            probe: str = block.probe  # type: ignore[union-attr]
            found.append(StoredBlock(i, block.type, probe, names(spec.codes).index(probe)))
        elif compresses(block):
            found.append(StoredBlock(i, block.type))
    return found


def inputs_of(batch: RequestBatch) -> dict[str, Tensor]:
    """The whole ranker's."""
    return _pooled(batch) | _keyed("sequence", batch) | {name: getattr(batch, name) for name in Plain._fields}


def probes_of(batch: RequestBatch, blocks: Sequence[StoredBlock]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What candidates ask of the blocks that have a record for each group.

    Returns:
        The distinct (request, code) `[Q]`, ascending by request, as `NUMBER.code` and `NUMBER.request`; and which of
        them each candidate reads `[N]`, as `NUMBER.probe`.
    """
    asked: dict[str, Tensor] = {}
    records: dict[str, Tensor] = {}
    for block in blocks:
        if block.probe is not None:
            code, request, probe, _ = distinct_probes(batch.candidate_codes[:, block.column], batch.offsets)
            asked |= {f"{block.number}.code": code, f"{block.number}.request": request}
            records[f"{block.number}.probe"] = probe
    return asked, records


def encoder_inputs_of(batch: RequestBatch, probes: dict[str, Tensor]) -> Inputs:
    """The user encoder's. probes: what is asked, as of :func:`probes_of`."""
    history = sum(key.startswith("history:") for key in batch.sequence.keys())  # noqa: SIM118  no dictionary
    return {
        "history_values": batch.sequence.values()[: history * batch.event_time.numel()],
        "history_lengths": batch.sequence.lengths()[: history * batch.requests],
        "event_dense": batch.event_dense,
        "event_codes": batch.event_codes,
        "event_time": batch.event_time,
        "now": batch.now,
        "start": batch.start,
        "end": batch.end,
        "probes": probes,
    }


def ranker_inputs_of(batch: RequestBatch, spec: FeatureSpec, short_length: int | None) -> dict[str, Tensor]:
    """The candidate ranker's, all but `memory`.

    Args:
        short_length: latest events that it needs; 0: all; None: no event, where the model has no short history.
    """
    start = batch.start if short_length == 0 else torch.maximum(batch.start, batch.end - (short_length or 0))
    event = _within(start, batch.end, batch.event_time.numel())
    first = torch.searchsorted(event, start)
    return (
        _pooled(batch)
        | _latest(batch, spec, event)
        | {"request_dense": batch.request_dense, "candidate_dense": batch.candidate_dense}
        | {"event_dense": batch.event_dense[event], "event_time": batch.event_time[event]}
        | {"now": batch.now, "start": first, "end": first + batch.end - start, "offsets": batch.offsets}
    )


def without_history(batch: RequestBatch, spec: FeatureSpec) -> RequestBatch:
    """The same requests of users who have no events."""
    features = len(spec.sequence) + len(spec.event) + len(spec.content)
    lengths = batch.sequence.lengths().clone()
    lengths[: features * batch.requests] = 0
    values = batch.sequence.values()[features * batch.event_time.numel() :]
    sequence = KeyedJaggedTensor(batch.sequence.keys(), values, lengths=lengths)
    of_events = ("event_dense", "event_codes", "event_time")
    none = {name: getattr(batch, name)[:0] for name in of_events}
    zero = torch.zeros_like(batch.start)
    return batch._replace(sequence=sequence, start=zero, end=zero, history_length=zero, **none)


def short_length_of(config: TrainConfig) -> int | None:
    """Latest events that the candidate ranker needs, as of :func:`ranker_inputs_of`."""
    return None if config.model.short is None else config.model.short.length


def _pooled(batch: RequestBatch) -> dict[str, Tensor]:
    return _keyed("request", batch) | _keyed("candidate", batch)


def _keyed(name: str, batch: RequestBatch) -> dict[str, Tensor]:
    kjt = getattr(batch, name)
    return {f"{name}_values": kjt.values(), f"{name}_lengths": kjt.lengths()}


def _within(start: Tensor, end: Tensor, events: int) -> Tensor:
    """The events of T that some window has, ascending."""
    one = torch.ones_like(start)
    edges = torch.zeros([events + 1], dtype=torch.int64).index_add(0, start, one).index_add(0, end, -one)
    return (torch.cumsum(edges, 0)[:-1] > 0).nonzero().squeeze(1)


def _latest(batch: RequestBatch, spec: FeatureSpec, event: Tensor) -> dict[str, Tensor]:
    """The sequence features of some events, without content, and of all candidates."""
    events, learned = batch.event_time.numel(), len(spec.sequence) + len(spec.event)
    history = learned + len(spec.content)
    lengths = batch.sequence.lengths().view(-1, batch.requests)
    row = segments_of(offsets_of(lengths[0]))  # every feature has one id an event
    of_row = torch.bincount(row[event], minlength=batch.requests).to(lengths.dtype)
    values = batch.sequence.values()
    of_events = values[: learned * events].view(learned, events)[:, event].flatten()
    return {
        "sequence_values": torch.cat([of_events, values[history * events :]]),
        "sequence_lengths": torch.cat([of_row.repeat(learned), lengths[history:].flatten()]),
    }
