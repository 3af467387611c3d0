"""Attention of a request's candidates to a window of events, at a cost of Σ window lengths.

Two forms with one signature: :func:`naive_window_attention` is the definition, a loop over requests;
:func:`window_attention` cuts every window into chunks of events and every candidate list into tiles, attends tile by
chunk in one batched product a head, and merges a tile's chunks by the rule of online softmax (Milakov & Gimelshein
2018; split keys as in FlashDecoding). Only the last chunk of a window is padded, so that time and memory follow Σ L and
not R × max L. A pair of a tile and a chunk is a *unit* of work.

:func:`frozen_attention` is the same for queries and keys that take no gradient (soft routing by frozen vectors). It
goes over the units in blocks that fit a CPU's cache, and its backward makes the weights again, so that nothing of size
queries × events is ever held. :func:`window_logsumexp` is that walk for the normaliser alone.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, offsets_of, segment_sum


def naive_window_attention(
    q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The definition: see :func:`window_attention`."""
    out = torch.zeros([q.size(0), q.size(1), v.size(2)], dtype=q.dtype, device=q.device)
    first_pair = 0
    for r in range(start.numel()):
        a, b = int(start[r]), int(end[r])
        rows = slice(int(q_offsets[r]), int(q_offsets[r + 1]))
        if a < b:
            logits = torch.einsum("nhd,lhd->nhl", q[rows], k[a:b]) / math.sqrt(q.size(2))
            if bias is not None:
                logits = logits + bias[first_pair : first_pair + b - a].t()
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
) -> Tensor:
    """Multi-head softmax attention of the candidates of request r to the events ``[start[r], end[r])``.

    Args:
        q: `[N, h, d]` queries, the candidates of request r in rows ``q_offsets[r] : q_offsets[r + 1]``.
        q_offsets: `[R + 1]` int64.
        k: `[T, h, d]` keys, v: `[T, h, dv]` values. Windows may overlap.
        start, end: `[R]` int64.
        bias: `[P, h]` added to the scaled logits of every pair (request, event), request after request.
        chunk: events attended to at once; 0: the mean window's length to the next power of two, between 16 and 128.

    Returns:
        `[N, h, dv]`; zero for candidates of an empty window.
    """
    heads, d = q.size(1), q.size(2)
    length = end - start
    if chunk == 0:
        events = int(length.sum())
        chunk = 16
        while chunk < 128 and chunk * length.numel() < events:
            chunk *= 2
    per_request = q_offsets[1:] - q_offsets[:-1]
    width = int(torch.ceil(per_request.sum() / max(per_request.numel(), 1)).clamp(1, 128))  # candidates in a tile
    plan = _units(q_offsets, start, end, width, chunk)
    tiles, units, request = plan.row.size(0), plan.tile.numel(), plan.request
    offset = torch.zeros([units, chunk, 1], dtype=q.dtype, device=q.device)
    offset = offset.masked_fill(~plan.real_key.unsqueeze(2), float("-inf"))
    if bias is not None:
        pair = offsets_of(length)[:-1][request].unsqueeze(1) + plan.within
        offset = offset + bias.index_select(0, pair.flatten()).view(units, chunk, heads)
    event = (start[request].unsqueeze(1) + plan.within).flatten()

    q_tile = q.index_select(0, plan.row.flatten()).view(tiles, width, heads, d)
    q_tile = (q_tile / math.sqrt(d)).permute(0, 2, 3, 1).flatten(1)  # [tiles, h · d · width]
    q_of = q_tile.index_select(0, plan.tile).view(units, heads, d, width).unbind(1)
    k_of = k.flatten(1).index_select(0, event).view(units, chunk, heads, d).unbind(2)
    v_of = k_of
    if v is not k:  # keys that are values are gathered once
        v_of = v.flatten(1).index_select(0, event).view(units, chunk, heads, v.size(2)).unbind(2)
    offset_of = offset.expand(units, chunk, heads).unbind(2)
    out: list[Tensor] = []
    for head in range(heads):
        # in place where autograd allows: the cost is memory traffic. [units, chunk, width]
        logits = torch.bmm(k_of[head], q_of[head]).add_(offset_of[head].unsqueeze(2))
        top = logits.detach().amax(1)
        weight = logits.sub_(top.unsqueeze(1)).exp_()
        summed = torch.bmm(weight.transpose(1, 2), v_of[head])
        out.append(_merge(top, weight.sum(1), summed, plan.tile, tiles))
    return torch.stack(out, 2)[plan.real_row]


def frozen_attention(
    q: Tensor, q_offsets: Tensor, k: Tensor, bias: Tensor, v: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """softmax(q kᵀ + bias) v over the windows, one head, where only `v` takes a gradient.

    Args:
        q: `[N, d]` queries, already scaled; those of request r in rows ``q_offsets[r] : q_offsets[r + 1]``.
        q_offsets: `[R + 1]` int64.
        k: `[T, d]` keys, bias: `[T]` added to the logits of a key, v: `[T, dv]` values. Windows may overlap.
        start, end: `[R]` int64.

    Returns:
        `[N, dv]`; zero for queries of an empty window. Time follows queries × events, memory queries + events.
    """
    q, k = _with_bias(q.detach(), k.detach(), bias.detach(), v.dtype)
    if torch.jit.is_scripting():
        return _frozen_forward(q, q_offsets, k, v, start, end)[0]
    return _FrozenAttention.apply(q, q_offsets, k, v, start, end)  # pyright: ignore[reportReturnType]


def window_logsumexp(
    q: Tensor, q_offsets: Tensor, k: Tensor, bias: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """log Σ e^(q kᵀ + bias) over each query's window `[N]`, and the key of its greatest term `[N]`.

    Arguments as in :func:`frozen_attention`. Of equal terms the first; −inf and −1 for an empty window. No gradients.
    """
    q, k = _with_bias(q.detach(), k.detach(), bias.detach(), q.dtype)
    plan = _cached_units(q_offsets, start, end)
    tile, key = _in_tiles(q, plan), _keys(plan, start, k.size(0) - 1)
    tiles, width = plan.row.size(0), plan.row.size(1)
    top = torch.zeros([plan.tile.numel(), width], dtype=q.dtype, device=q.device)
    total, best = torch.zeros_like(top), torch.zeros([plan.tile.numel(), width], dtype=torch.int64, device=q.device)
    size = _block(plan)
    for a in range(0, plan.tile.numel(), size):
        logits = _logits(tile, k, plan.tile[a : a + size], key[a : a + size])
        greatest, place = logits.max(2)
        top[a : a + size] = greatest
        total[a : a + size] = logits.sub_(greatest.unsqueeze(2)).exp_().sum(2)
        best[a : a + size] = key[a : a + size].gather(1, place)
    index = plan.tile.unsqueeze(1).expand_as(top)
    tile_top, scale = _rescale(top, plan.tile, tiles)
    logsumexp = segment_sum(total * scale, plan.tile, tiles).log() + tile_top
    best = best.masked_fill(top < tile_top.index_select(0, plan.tile), k.size(0))
    first = torch.full([tiles, width], k.size(0), dtype=torch.int64, device=q.device)
    first = first.scatter_reduce(0, index, best, "amin")
    return logsumexp[plan.real_row], first.masked_fill(tile_top.isneginf(), -1)[plan.real_row]


class _FrozenAttention(torch.autograd.Function):
    """Keeps one number per query, log Σ e^logit, from which the backward pass makes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
        out, logsumexp = _frozen_forward(q, q_offsets, k, v, start, end)
        ctx.save_for_backward(q, q_offsets, k, start, end, logsumexp)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, q_offsets, k, start, end, logsumexp = ctx.saved_tensors
        # the logits come out less log Σ e^logit, and e^ of them are the weights
        q = torch.cat([q[:, :-1], -logsumexp.unsqueeze(1)], 1)
        plan = _cached_units(q_offsets, start, end)
        tile, key = _in_tiles(q, plan), _keys(plan, start, k.size(0) - 1)
        grad_tile = _in_tiles(gradients[0], plan).masked_fill(~plan.real_row.unsqueeze(2), 0.0)
        grad_v = grad_tile.new_zeros([k.size(0), grad_tile.size(2)])
        size = _block(plan)
        for a in range(0, plan.tile.numel(), size):
            unit_tile, of = plan.tile[a : a + size], key[a : a + size]
            weight = _logits(tile, k, unit_tile, of).exp_()
            summed = torch.bmm(weight.transpose(1, 2), grad_tile.index_select(0, unit_tile))
            grad_v.index_add_(0, of.flatten(), summed.flatten(0, 1))
        return None, None, None, grad_v[:-1], None, None


def _frozen_forward(
    q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """The output `[N, dv]` and log Σ e^logit `[N]`, of queries and keys :func:`_with_bias`."""
    plan = _cached_units(q_offsets, start, end)
    tile, key = _in_tiles(q, plan), _keys(plan, start, k.size(0) - 1)
    tiles, width = plan.row.size(0), plan.row.size(1)
    tops, totals = [q.new_zeros([0, width])], [q.new_zeros([0, width])]
    sums = [v[:0].unsqueeze(1).expand(0, width, v.size(1))]  # of v: TorchScript goes by what took a gradient before
    size = _block(plan)
    for a in range(0, plan.tile.numel(), size):
        of = key[a : a + size]
        logits = _logits(tile, k, plan.tile[a : a + size], of)
        top = logits.amax(2)
        weight = logits.sub_(top.unsqueeze(2)).exp_()
        tops.append(top)
        totals.append(weight.sum(2))
        place = of.flatten().clamp(max=v.size(0) - 1)
        sums.append(torch.bmm(weight, v.index_select(0, place).view(of.size(0), of.size(1), v.size(1))))
    top, total = torch.cat(tops), torch.cat(totals)
    out = _merge(top, total, torch.cat(sums), plan.tile, tiles)
    tile_top, scale = _rescale(top, plan.tile, tiles)
    logsumexp = segment_sum(total * scale, plan.tile, tiles).log() + tile_top
    return out[plan.real_row], logsumexp[plan.real_row]


class _Units(NamedTuple):
    """Tiles of queries, and the units of every tile with the chunks of its window, in the order of tiles.

    row, real_row: `[tiles, width]` the query of each place, and whether it is one (other places repeat the last).
    tile, request: `[units]`; within, real_key: `[units, chunk]` the key of each place, counted from the window's start.
    """

    row: Tensor
    real_row: Tensor
    tile: Tensor
    request: Tensor
    within: Tensor
    real_key: Tensor


def _units(q_offsets: Tensor, start: Tensor, end: Tensor, width: int, chunk: int) -> _Units:
    """Queries cut into tiles of `width`, windows into chunks of `chunk`."""
    tile_rank, tile_request = _split(q_offsets[1:] - q_offsets[:-1], width)
    row = (q_offsets[:-1][tile_request] + tile_rank * width).unsqueeze(1) + torch.arange(width, device=start.device)
    last_row = q_offsets[1:][tile_request].unsqueeze(1) - 1
    length = end - start
    unit_chunk, tile = _split(length[tile_request], chunk)
    request = tile_request[tile]
    within = unit_chunk.unsqueeze(1) * chunk + torch.arange(chunk, device=start.device)
    last = length[request].unsqueeze(1) - 1
    return _Units(
        torch.minimum(row, last_row), row <= last_row, tile, request, torch.minimum(within, last), within <= last
    )


def _cached_units(q_offsets: Tensor, start: Tensor, end: Tensor) -> _Units:
    """Tiles of at most 256 queries, equal for the request with most; chunks of 16 to 256 keys by the mean window."""
    most = int((q_offsets[1:] - q_offsets[:-1]).max()) if q_offsets.numel() > 1 else 0
    pieces = max((most + 255) // 256, 1)
    length = end - start
    keys = int(length.sum())
    chunk = 16
    while chunk < 256 and chunk * length.numel() < keys:
        chunk *= 2
    return _units(q_offsets, start, end, max((most + pieces - 1) // pieces, 1), chunk)


def _in_tiles(x: Tensor, plan: _Units) -> Tensor:
    """Rows `[N, d]` of queries as tiles `[tiles, width, d]`."""
    return x.index_select(0, plan.row.flatten()).view(plan.row.size(0), plan.row.size(1), x.size(1))


def _keys(plan: _Units, start: Tensor, padding: int) -> Tensor:
    """The key of each place `[units, chunk]`; `padding` where there is none."""
    key = start.index_select(0, plan.request).unsqueeze(1) + plan.within
    return key.masked_fill(~plan.real_key, padding)


def _block(plan: _Units) -> int:
    """Units at a time: logits of 1 MiB in float32 on a CPU, whose cache they stay in, and of 256 MiB elsewhere."""
    logits = (1 << 18) if plan.row.device.type == "cpu" else (1 << 26)
    return max(logits // (plan.row.size(1) * plan.within.size(1)), 1)


def _with_bias(q: Tensor, k: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Operands `[N, d + 2]` and `[T + 1, d + 2]` whose product has the bias added, less the last column of `q`, now 0.

    The further key is for padding: no query gives it any weight.
    """
    d = k.size(1)
    keys = torch.empty([k.size(0) + 1, d + 2], dtype=dtype, device=k.device)
    keys[:-1, :d] = k
    keys[:-1, d] = bias
    keys[-1, :d] = 0.0
    keys[-1, d] = float("-inf")
    keys[:, d + 1] = 1.0
    queries = torch.zeros([q.size(0), d + 2], dtype=dtype, device=q.device)
    queries[:, :d] = q
    queries[:, d] = 1.0
    return queries, keys


def _logits(tile: Tensor, k: Tensor, unit_tile: Tensor, key: Tensor) -> Tensor:
    """`[n, width, chunk]` of n units: tiles `[tiles, width, d]` of queries by the keys `[n, chunk]` of their chunks."""
    of_key = k.index_select(0, key.flatten()).view(key.size(0), key.size(1), k.size(1))
    return torch.bmm(tile.index_select(0, unit_tile), of_key.transpose(1, 2))


def _rescale(top: Tensor, unit_tile: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Each tile's greatest logit `[tiles, width]`, and the factor e^(top − greatest) `[units, width]` of its units."""
    index = unit_tile.unsqueeze(1).expand_as(top)
    greatest = torch.full([tiles, top.size(1)], float("-inf"), dtype=top.dtype, device=top.device)
    greatest = greatest.scatter_reduce(0, index, top, "amax")
    return greatest, torch.exp(top - greatest.index_select(0, unit_tile))


def _split(lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut segments into pieces of `size`: each piece's rank in its segment, and its segment, ascending."""
    pieces = (lengths + size - 1) // size
    return expand_windows(torch.zeros_like(pieces), pieces)


def _merge(top: Tensor, total: Tensor, summed: Tensor, unit_tile: Tensor, tiles: int) -> Tensor:
    """Softmax over a tile's units from each unit's own: every unit is rescaled to the tile's greatest logit.

    Args:
        top, total: `[units, width]` greatest logit, and sum of e^(logit − top).
        summed: `[units, width, dv]` values weighted by e^(logit − top).

    Returns:
        `[tiles, width, dv]`, zero for a tile without units.
    """
    scale = _rescale(top, unit_tile, tiles)[1]
    total = segment_sum(total * scale, unit_tile, tiles)
    summed = segment_sum(summed * scale.unsqueeze(2), unit_tile, tiles)
    return summed / total.clamp(min=1e-30).unsqueeze(2)
