"""Search: of a window of events, the K that each candidate's scores are greatest for, at a cost of Σ window lengths.

:func:`naive_topk_windows` is the definition, a loop; :func:`topk_windows` scores chunk after chunk of all windows at
once and keeps the best K so far, so that the scores never stand in memory together: at most 4 M of them (`places`), or
64 a query where there are more than 65,536 queries. For 500 candidates × 100,000 events and one head that is 100 MB
beside the inputs, where all scores with their keys would be 600 MB.

What is compared are *keys*: an integer that orders scores first and the place in the window second, so that of equal
scores the more recent event wins, the same on every machine. Equal means equal in steps of 2^-14, far less than a
softmax over scores can tell: the last bits of a product depend on how a batch was cut into products, and a request must
find the same events alone and in a batch.

Making keys and choosing among them costs ten times the products, so of a long chunk only groups of 16 neighbours are
compared, by their greatest score, and then the events of the K best groups. That is exact: an event of the K best is in
one of the K groups whose best event is best, since each of those holds an event that beats all of any group after them.

Requests with nearly the same window share tiles (:mod:`ranker.ops.units`): a chunk's events are gathered once for all
their candidates, each of which sees its own part.
"""

import math

import torch
from torch import Tensor

from ranker.ops.jagged import offsets_of, segments_of
from ranker.ops.query_tiles import Tiles, in_tiles, of_tiles, out_of_tiles, tiles_of
from ranker.ops.units import shared_windows


def score_keys(score: Tensor, place: Tensor) -> Tensor:
    """int64 keys that order scores, in steps of 2^-14 between ±2^15, and equal ones by place, which is below 2^31."""
    steps = (score.float() * (1 << 14)).round_().clamp_(-(1 << 29), 1 << 29).long()
    # what is not there comes after all that is
    return (steps.masked_fill_(score == float("-inf"), -(1 << 30)) << 32) + place


def naive_topk_windows(
    q: Tensor, q_offsets: Tensor, k: Tensor, start: Tensor, end: Tensor, top: int, bias: Tensor | None = None
) -> Tensor:
    """The definition: see :func:`topk_windows`."""
    event = torch.full([q.size(0), q.size(1), top], -1)
    first_pair = 0
    for r in range(start.numel()):
        a, b = int(start[r]), int(end[r])
        for n in range(int(q_offsets[r]), int(q_offsets[r + 1])):
            for h in range(q.size(1)):
                score = k[a:b, h].to(q.dtype) @ q[n, h] / math.sqrt(q.size(2))
                if bias is not None:
                    score = score + bias[first_pair : first_pair + b - a, h]
                key = score_keys(score, torch.arange(b - a)).tolist()
                best = sorted(range(b - a), key=lambda i: -key[i])[:top]
                event[n, h, : len(best)] = torch.tensor(best, dtype=torch.int64) + a
        first_pair += b - a
    return event


def topk_windows(
    q: Tensor,
    q_offsets: Tensor,
    k: Tensor,
    start: Tensor,
    end: Tensor,
    top: int,
    bias: Tensor | None = None,
    places: int = 1 << 22,
    group: int = 16,
) -> Tensor:
    """The events of ``[start[r], end[r])`` that score highest for each candidate of request r, head by head.

    The score is q · k / √d + bias, the logit of :func:`ranker.ops.attention.window_attention`. Takes no gradient.

    Args:
        q: `[N, h, d]` queries, the candidates of request r in rows ``q_offsets[r] : q_offsets[r + 1]``.
        q_offsets: `[R + 1]` int64.
        k: `[T, h, d]` keys, of any type. Windows may overlap.
        start, end: `[R]` int64.
        top: K.
        bias: `[P, h]` of every pair (request, event), request after request; finite.
        places: bound on the scores in memory.
        group: neighbours that are compared by their greatest score.

    Returns:
        `[N, h, K]` int64, the best first; −1 where a window has fewer events.
    """
    q, k, heads, d = q.detach(), k.detach(), q.size(1), q.size(2)
    shared = shared_windows(q_offsets, start, end)
    tiles = tiles_of(shared.q_offsets, elements=q.size(0))
    length, order = torch.sort(of_tiles(shared.end - shared.start, tiles), descending=True, stable=True)
    first = of_tiles(shared.start, tiles)[order]
    # the window of each query of a tile, `[t, 1, w]` counted from the tile's, or `[t, 1, 1]` of all its queries
    low, high = torch.zeros_like(length).view(-1, 1, 1), length.view(-1, 1, 1)
    if shared.low.numel() > 0:
        low, high = _in_tiles(shared.low, tiles)[order], _in_tiles(shared.high, tiles)[order]
    first_pair = offsets_of(end - start)[:-1]  # [t, 1, w or 1], of the place 0 of a tile's window
    if shared.low.numel() > 0:
        first_pair = _in_tiles(first_pair.index_select(0, segments_of(q_offsets)) - shared.low, tiles)[order]
    else:
        first_pair = of_tiles(first_pair, tiles)[order].view(-1, 1, 1)
    q_tile = (in_tiles(q, tiles)[order] / math.sqrt(d)).permute(2, 0, 1, 3).contiguous()  # [h, t, w, d]
    width = q_tile.size(2)
    best = torch.full([heads, order.numel(), width, top], -(1 << 62), dtype=torch.int64, device=q.device)

    done = 0
    active = int((length > 0).sum())
    while active > 0:
        left = length[:active] - done
        chunk = _chunk(int(left.sum()) // active, active * width, places)
        place = torch.arange(chunk, device=q.device)
        within = torch.minimum(place, left.unsqueeze(1) - 1) + done
        event = (first[:active].unsqueeze(1) + within).flatten()
        k_of = k.index_select(0, event).to(q.dtype).view(active, chunk, heads, d)
        seen = (place + done).view(1, -1, 1)
        hidden = (seen < low[:active]) | (seen >= high[:active])  # [active, chunk, w or 1]
        offset = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        offset = offset.masked_fill_(hidden, float("-inf")).unsqueeze(3)
        if bias is not None:
            pair = (first_pair[:active] + within.unsqueeze(2)).masked_fill_(hidden, 0).flatten()
            offset = offset + bias.detach().index_select(0, pair).view(active, chunk, hidden.size(2), heads)
        offset = offset.expand(active, chunk, hidden.size(2), heads)
        for head in range(heads):
            asked, of_head, added = q_tile[head, :active], k_of[:, :, head], offset[:, :, :, head]
            if chunk < 2 * group * top or chunk % group > 0:
                # few queries as rows: as columns a product with them takes several times as long on a CPU
                score = torch.bmm(asked, of_head.transpose(1, 2)).add_(added.transpose(1, 2))
                keys = score_keys(score, place + done)
            else:
                score = torch.bmm(of_head, asked.transpose(1, 2)).add_(added)
                keys = _of_best_groups(score, top, done, group)
            if done > 0 or keys.size(2) < top:
                keys = torch.cat([best[head, :active], keys], 2)
            best[head, :active] = torch.topk(keys, top, 2)[0]
        done += chunk
        active = int((length > done).sum())

    found = torch.arange(top, device=q.device) < (high - low).transpose(1, 2)  # [t, w or 1, K]
    event = torch.where(found, (best & 0xFFFFFFFF) + first.view(-1, 1, 1), torch.full_like(best, -1))
    event = event.index_select(1, torch.argsort(order)).permute(1, 2, 0, 3)  # [t, w, h, K]
    return out_of_tiles(event.flatten(2), tiles).view(-1, heads, top)


def _in_tiles(x: Tensor, tiles: Tiles) -> Tensor:
    """What each query has `[N]`: `[t, 1, w]`."""
    return in_tiles(x.view(-1, 1, 1), tiles).view(-1, 1, tiles.width)


def _chunk(mean_left: int, queries: int, places: int) -> int:
    """Events to score at once: a power of two near what windows have left on average; at least 64."""
    chunk = 64
    while 3 * chunk <= 2 * mean_left and 2 * chunk * queries <= places:
        chunk *= 2
    return chunk


def _of_best_groups(score: Tensor, top: int, done: int, group: int) -> Tensor:
    """Keys of the places that can be among the `top` best of scores `[t, C, w]`: `[t, w, top · group]`."""
    tiles, chunk, width = score.size(0), score.size(1), score.size(2)
    place = torch.arange(chunk, device=score.device)
    grouped = score.view(tiles, chunk // group, group, width)
    greatest = grouped.amax(2).transpose(1, 2).contiguous()  # [t, w, C / group]
    key = torch.topk(score_keys(greatest, place[: chunk // group]), top, 2, sorted=False)[0]
    best = (key & 0xFFFFFFFF).transpose(1, 2).unsqueeze(2)  # [t, top, 1, w]
    of_best = grouped.gather(1, best.expand(tiles, top, group, width)).permute(0, 3, 1, 2)
    place = best.permute(0, 3, 1, 2) * group + place[:group]  # [t, w, top, group]
    return score_keys(of_best.contiguous(), place + done).flatten(2)
