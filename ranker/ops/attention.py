"""Attention of a request's candidates to a window of events, at a cost of Σ window lengths.

Two forms with one signature: :func:`naive_window_attention` is the definition, a loop over requests;
:func:`window_attention` cuts every window into chunks of `chunk` events and every candidate list into tiles, attends tile by
chunk in one batched product, and merges a tile's chunks by the running-maximum rule of online softmax
(Milakov & Gimelshein 2018; split keys as in FlashDecoding). Only the last chunk of a window is padded, so that time and
memory follow Σ L and not R × max L.
"""

import math

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, offsets_of


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
    chunk: int = 128,
) -> Tensor:
    """Multi-head softmax attention of the candidates of request r to the events ``[start[r], end[r])``.

    Args:
        q: `[N, h, d]` queries, the candidates of request r in rows ``q_offsets[r] : q_offsets[r + 1]``.
        q_offsets: `[R + 1]` int64.
        k: `[T, h, d]` keys, v: `[T, h, dv]` values. Windows may overlap.
        start, end: `[R]` int64.
        bias: `[P, h]` added to the scaled logits of every pair (request, event), request after request.
        chunk: events attended to at once.

    Returns:
        `[N, h, dv]`; zero for candidates of an empty window.
    """
    requests, heads = start.numel(), q.size(1)
    per_request = q_offsets[1:] - q_offsets[:-1]
    width = int(torch.ceil(per_request.sum() / max(requests, 1)).clamp(1, 128))  # candidates in a tile
    tiles_of = (per_request + width - 1) // width
    tile_rank, tile_request = expand_windows(torch.zeros_like(tiles_of), tiles_of)
    tiles = tile_request.numel()
    tile_first = q_offsets[:-1][tile_request] + tile_rank * width
    lane = torch.arange(width, device=q.device)
    rows = tile_first.unsqueeze(1) + lane  # [tiles, width]
    real_row = rows < q_offsets[1:][tile_request].unsqueeze(1)

    chunks_of = ((end - start + chunk - 1) // chunk)[tile_request]
    unit_chunk, unit_tile = expand_windows(torch.zeros_like(chunks_of), chunks_of)
    units = unit_tile.numel()
    unit_request = tile_request[unit_tile]
    within = unit_chunk.unsqueeze(1) * chunk + torch.arange(chunk, device=q.device)  # [units, chunk]
    real = within < (end - start)[unit_request].unsqueeze(1)
    within = torch.where(real, within, torch.zeros_like(within))
    events = (start[unit_request].unsqueeze(1) + within).flatten()

    # u unit, q query of the tile, c event of the chunk, h head
    q_tile = q[torch.where(real_row, rows, torch.zeros_like(rows)).flatten()].view(tiles, width, heads, -1)
    q_unit = q_tile[unit_tile].transpose(1, 2) * (1.0 / math.sqrt(q.size(2)))
    k_unit = k.flatten(1).index_select(0, events).view(units, chunk, heads, -1).permute(0, 2, 3, 1)
    v_unit = v.flatten(1).index_select(0, events).view(units, chunk, heads, -1).transpose(1, 2)
    logits = torch.matmul(q_unit, k_unit)  # [u, h, q, c]
    if bias is not None:
        first_pair = offsets_of(end - start)[:-1][unit_request].unsqueeze(1)
        logits = logits + bias[(first_pair + within).flatten()].view(units, chunk, heads).permute(0, 2, 1).unsqueeze(2)
    logits = logits.masked_fill(~real.view(units, 1, 1, chunk), float("-inf"))

    top = torch.full([tiles, heads, width], float("-inf"), dtype=logits.dtype, device=q.device)
    index = unit_tile.view(-1, 1, 1).expand(units, heads, width)
    top = top.scatter_reduce(0, index, logits.detach().amax(-1), "amax")
    weight = torch.exp(logits - top[unit_tile].unsqueeze(-1))
    total = torch.zeros([tiles, heads, width], dtype=weight.dtype, device=q.device)
    total = total.index_add(0, unit_tile, weight.sum(-1))
    summed = torch.zeros([tiles, heads, width, v.size(2)], dtype=v.dtype, device=q.device)
    summed = summed.index_add(0, unit_tile, torch.matmul(weight, v_unit))
    out = summed / total.unsqueeze(-1).clamp(min=1e-30)
    return out.transpose(1, 2)[real_row]
