"""States of the delta rule in the midst of chunks: after any tokens, of one pass over them all.

The first p tokens of a chunk are a shorter chunk. They take the state S before it to

    S_p = e^(G_p) S + Σ_(i ≤ p) e^(G_p − G_i) k_i v'_iᵀ,

and as v' is linear in S, so is S_p: transition S + addition, with weights e^(G_p − G_i) that are row p of Γ. Notation:
:mod:`ranker.ops.delta_rule_chunks`. A state and its gradient cost about a chunk's last one, O(C) tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.chunks import Chunks


class Within(NamedTuple):
    """Decays within each of B chunks: the running sum G `[B, C]` as factors.

    pair: Γ `[B, C, C]`, zero above the diagonal; since: e^G `[B, C, 1]`; until: e^(G_C − G) `[B, C, 1]`;
    whole: e^(G_C) `[B, 1, 1]`.
    """

    pair: Tensor
    since: Tensor
    until: Tensor
    whole: Tensor


class Stops(NamedTuple):
    """P tokens after which a state is asked for, in the order of their chunks.

    chunk: `[P]` int64; place: `[P]` where in the chunk; order: `[P]` which of the given tokens it is; rank: `[P]` its
    inverse; bounds: the stops of block i, of `step` chunks, are ``bounds[i] : bounds[i + 1]``.
    """

    chunk: Tensor
    place: Tensor
    order: Tensor
    rank: Tensor
    bounds: list[int]
    step: int


class Parts(NamedTuple):
    """The stops of a block of chunks, head after head: n = stops · h. row: `[n]` which of the block's B; place: `[n]`;
    weight: `[n, C, 1]` e^(G_p − G_i), 0 after p; since: `[n, 1, 1]` e^(G_p)."""

    row: Tensor
    place: Tensor
    weight: Tensor
    since: Tensor


def stops_of(at: Tensor, chunks: Chunks, step: int) -> Stops:
    """Where the tokens `at` `[P]` are, in blocks of `step` chunks."""
    size = chunks.token.size(1)
    place = chunks.place.index_select(0, at)
    chunk = torch.div(place, size, rounding_mode="floor")
    chunk, order = torch.sort(chunk, stable=True)
    place = (place % size).index_select(0, order)
    blocks = (chunks.token.size(0) + step - 1) // step
    bounds: list[int] = torch.searchsorted(chunk, torch.arange(blocks + 1, device=at.device) * step).tolist()
    return Stops(chunk, place, order, torch.argsort(order), bounds, step)


def parts_of(stops: Stops, first: int, heads: int, decays: Within | None, like: Tensor) -> Parts:
    """Of the block that begins with chunk `first`, whose keys are `like` `[B, C, dk]`."""
    block, size = first // stops.step, like.size(1)
    a, b = stops.bounds[block], stops.bounds[block + 1]
    head = torch.arange(heads, device=like.device)
    row = ((stops.chunk[a:b] - first).unsqueeze(1) * heads + head).flatten()
    place = stops.place[a:b].repeat_interleave(heads)
    if decays is None:
        lower = torch.ones([size, size], dtype=like.dtype, device=like.device).tril()
        since = torch.ones([row.numel(), 1, 1], dtype=like.dtype, device=like.device)
        return Parts(row, place, lower.index_select(0, place).unsqueeze(2), since)
    at = row * size + place
    return Parts(
        row,
        place,
        decays.pair.flatten(0, 1).index_select(0, at).unsqueeze(2),
        decays.since.flatten(0, 1).index_select(0, at).unsqueeze(2),
    )


def part_terms(
    k: Tensor, wu: Tensor, decays: Within | None, stops: Stops, first: int, heads: int
) -> tuple[Tensor, Tensor]:
    """Of a block's chunks, keys `[B, C, dk]` and W and U `[B, C, dk + dv]`, the transition `[n, dk, dk]` and addition
    `[n, dk, dv]` from the state before the chunk to each of its n stops."""
    dk = k.size(2)
    parts = parts_of(stops, first, heads, decays, k)
    weighted = k.index_select(0, parts.row) * parts.weight
    step = torch.bmm(weighted.transpose(1, 2), wu.index_select(0, parts.row))
    kept = torch.eye(dk, dtype=k.dtype, device=k.device) * parts.since
    return kept + step[:, :, :dk], step[:, :, dk:]
