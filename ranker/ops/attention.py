"""Attention of a request's candidates to a window of events, at a cost of Σ window lengths.

Two forms with one signature: :func:`naive_window_attention` is the definition, a loop over requests;
:func:`window_attention` cuts every window into chunks of events and every candidate list into tiles, attends tile by
chunk in one batched product a head, and merges a tile's chunks by the rule of online softmax (Milakov & Gimelshein
2018; split keys as in FlashDecoding). Only the last chunk of a window is padded, so that time and memory follow Σ L and
not R × max L. A pair of a tile and a chunk is a *unit* of work; requests with nearly the same window share tiles.

One request alone, as a server has it, with a window that is not long, needs none of this and is one product a head.
"""

import math

import torch
from torch import Tensor

from ranker.ops.jagged import offsets_of, segments_of
from ranker.ops.padded import exporting, with_spare
from ranker.ops.take_rows import take_rows
from ranker.ops.unit_softmax import unit_softmax
from ranker.ops.units import in_units, merge, out_of_units, shared_windows, sizes_of, units_of


def naive_window_attention(
    q: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    bias: Tensor | None = None,
    chunk: int = 0,
    seen: Tensor | None = None,
) -> Tensor:
    """The definition: see :func:`window_attention`. `chunk` is not looked at."""
    out = torch.zeros([q.size(0), q.size(1), v.size(2)], dtype=q.dtype, device=q.device)
    first_pair = 0
    for r in range(start.numel()):
        a, b = int(start[r]), int(end[r])
        rows = slice(int(q_offsets[r]), int(q_offsets[r + 1]))
        if a < b:
            logits = torch.einsum("nhd,lhd->nhl", q[rows], k[a:b]) / math.sqrt(q.size(2))
            if bias is not None:
                logits = logits + bias[first_pair : first_pair + b - a].t()
            if seen is not None:
                hidden = torch.arange(b - a, device=q.device) >= seen[rows].unsqueeze(1)
                logits = logits.masked_fill(hidden.unsqueeze(1), float("-inf"))
            out[rows] = torch.einsum("nhl,lhd->nhd", torch.softmax(logits, -1), v[a:b])
        first_pair += b - a
    return out


def window_attention(
    q: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    bias: Tensor | None = None,
    chunk: int = 0,
    seen: Tensor | None = None,
) -> Tensor:
    """Multi-head softmax attention of the candidates of request r to the events ``[start[r], end[r])``.

    Args:
        q: `[N, h, d]` queries, the candidates of request r in rows ``q_offsets[r] : q_offsets[r + 1]``.
        q_offsets: `[R + 1]` int64.
        k: `[T, h, d]` keys, v: `[T, h, dv]` values. Windows may overlap.
        start, end: `[R]` int64.
        bias: `[P, h]` added to the scaled logits of every pair (request, event), request after request.
        chunk: events attended to at once; 0: the mean window's length to the next power of two, between 16 and 128.
        seen: `[N]` int64, how many of its window's events a candidate attends to, the first ones, at least one; None:
            all.

    Returns:
        `[N, h, dv]`; zero for candidates of an empty window.
    """
    plain = chunk == 0 and seen is None
    if (torch.jit.is_scripting() or not exporting()) and plain and _alone(q, start, end, bias):
        return _one_window(q, k[int(start) : int(end)], v[int(start) : int(end)], bias)
    queries, heads, d = q.size(0), q.size(1), q.size(2)
    if not torch.jit.is_scripting() and exporting():
        keys = with_spare(k)
        k, v = keys, keys if v is k else with_spare(v)
        q, bias = with_spare(q), None if bias is None else with_spare(bias)
    shared = shared_windows(q_offsets, start, end)
    width, mean_chunk = sizes_of(shared.q_offsets, shared.start, shared.end)
    chunk = chunk if chunk > 0 else mean_chunk
    plan = units_of(shared.q_offsets, shared.start, shared.end, width, chunk)
    tiles, units = plan.row.size(0), plan.tile.numel()
    event = (shared.start[plan.request].unsqueeze(1) + plan.within).flatten()
    low, high = shared.low, shared.high
    joined = low.numel() > 0
    if seen is not None:
        low = low if joined else torch.zeros_like(seen)
        high = low + seen
    hidden: Tensor | None = None  # [units, chunk, width]
    if joined or seen is not None:
        within = plan.within.unsqueeze(2)
        hidden = (within < in_units(low, plan)) | (within >= in_units(high, plan)) | ~plan.real_key.unsqueeze(2)
    offset: Tensor | None = None  # [units, chunk, 1 or width, 1 or heads]
    if bias is not None:
        # a pair's place: its request's first, and how far the event is in the request's window
        first_pair = offsets_of(end - start)[:-1]
        if joined:
            first_pair = first_pair.index_select(0, segments_of(q_offsets)) - shared.low
            pair = in_units(first_pair, plan) + plan.within.unsqueeze(2)
            if hidden is not None:
                pair = pair.masked_fill(hidden, 0)
        else:
            pair = (first_pair[plan.request].unsqueeze(1) + plan.within).unsqueeze(2)
        offset = bias.index_select(0, pair.flatten()).view(units, chunk, pair.size(2), heads)
    if hidden is None:
        padding = torch.zeros([units, chunk, 1, 1], dtype=q.dtype, device=q.device)
        padding = padding.masked_fill_(~plan.real_key.view(units, chunk, 1, 1), float("-inf"))
        offset = padding if offset is None else offset + padding
    if offset is not None:
        offset = offset.expand(units, chunk, offset.size(2), heads)

    q_tile = q.index_select(0, plan.row.flatten()).view(tiles, width, heads, d)
    q_tile = (q_tile / math.sqrt(d)).permute(0, 2, 3, 1).flatten(1)  # [tiles, h · d · width]
    q_of = _by_head(q_tile.index_select(0, plan.tile).view(units, heads, d, width), 1)
    k_of = _by_head(take_rows(k.flatten(1), event).view(units, chunk, heads, d), 2)
    v_of = k_of
    if v is not k:  # keys that are values are gathered once
        v_of = _by_head(take_rows(v.flatten(1), event).view(units, chunk, heads, v.size(2)), 2)
    out: list[Tensor] = []
    for head in range(heads):
        added = None if offset is None else offset.select(3, head)
        found = unit_softmax(q_of[head], k_of[head], v_of[head], added, hidden)
        out.append(merge(found.top, found.total, found.summed, plan.tile, tiles))
    return out_of_units(torch.stack(out, 2), plan, q_offsets, queries)


def _by_head(x: Tensor, dim: int) -> list[Tensor]:
    """Each head's part of `x`, whose dimension `dim` counts heads: of a single head a view, whose gradient is not
    copied."""
    return [x.squeeze(dim)] if x.size(dim) == 1 else list(x.unbind(dim))


def _alone(q: Tensor, start: Tensor, end: Tensor, bias: Tensor | None, most_pairs: int = 1 << 19) -> bool:
    """Whether there is but one request, whose logits are a few MiB; and not of events which a bias of −∞ hides one and
    all: their softmax is none."""
    if start.numel() != 1 or q.size(0) * int(end - start) > most_pairs:
        return False
    return bias is None or bias.size(0) == 0 or float(bias.detach().amax(0).amin()) > float("-inf")


def _one_window(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Of all queries `[N, h, d]` to all keys `[L, h, d]`: `[N, h, dv]`; zero where L is 0."""
    q, k, scale = q.transpose(0, 1), k.permute(1, 2, 0), 1 / math.sqrt(q.size(2))
    if bias is None:
        logits = torch.bmm(q * scale, k)
    else:
        logits = torch.baddbmm(bias.t().unsqueeze(1).to(q.dtype), q, k, alpha=scale)
    return torch.bmm(torch.softmax(logits, -1), v.transpose(0, 1)).transpose(0, 1)  # [h, N, L] · [h, L, dv]
