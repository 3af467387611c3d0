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
"""

import math

import torch
from torch import Tensor

from ranker.ops.query_tiles import in_tiles, of_tiles, out_of_tiles, tiles_of


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
        bias: `[P, h]` of every pair (request, event), request after request.
        places: bound on the scores in memory.
        group: neighbours that are compared by their greatest score.

    Returns:
        `[N, h, K]` int64, the best first; −1 where a window has fewer events.
    """
    q, k, heads, d = q.detach(), k.detach(), q.size(1), q.size(2)
    tiles = tiles_of(q_offsets, elements=q.size(0))
    length, order = torch.sort(of_tiles(end - start, tiles), descending=True, stable=True)
    first = of_tiles(start, tiles)[order]
    first_pair = of_tiles(torch.cumsum(end - start, 0) - (end - start), tiles)[order]
    q_tile = (in_tiles(q, tiles)[order] / math.sqrt(d)).permute(2, 0, 3, 1).contiguous()  # [h, t, d, w]
    width = q_tile.size(3)
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
        offset = torch.zeros([active, chunk, 1], dtype=q.dtype, device=q.device)
        offset = offset.masked_fill((place >= left.unsqueeze(1)).unsqueeze(2), float("-inf"))
        if bias is not None:
            pair = (first_pair[:active].unsqueeze(1) + within).flatten()
            offset = offset + bias.detach().index_select(0, pair).view(active, chunk, heads)
        offset = offset.expand(active, chunk, heads)
        for head in range(heads):
            score = torch.bmm(k_of[:, :, head], q_tile[head, :active]).add_(offset[:, :, head : head + 1])
            keys = torch.cat([best[head, :active], _candidates(score, top, done, group)], 2)
            best[head, :active] = torch.topk(keys, top, 2)[0]
        done += chunk
        active = int((length > done).sum())

    found = torch.arange(top, device=q.device) < length.view(-1, 1, 1)
    event = torch.where(found, (best & 0xFFFFFFFF) + first.view(-1, 1, 1), torch.full_like(best, -1))
    event = event.index_select(1, torch.argsort(order)).permute(1, 2, 0, 3)  # [t, w, h, K]
    return out_of_tiles(event.flatten(2), tiles).view(-1, heads, top)


def _chunk(mean_left: int, queries: int, places: int) -> int:
    """Events to score at once: a power of two near what windows have left on average; at least 64."""
    chunk = 64
    while 3 * chunk <= 2 * mean_left and 2 * chunk * queries <= places:
        chunk *= 2
    return chunk


def _candidates(score: Tensor, top: int, done: int, group: int) -> Tensor:
    """Keys of the places that can be among the `top` best of scores `[t, C, w]`: `[t, w, m]`."""
    tiles, chunk, width = score.size(0), score.size(1), score.size(2)
    place = torch.arange(chunk, device=score.device)
    if chunk < 2 * group * top or chunk % group > 0:
        return score_keys(score.transpose(1, 2).contiguous(), place + done)
    grouped = score.view(tiles, chunk // group, group, width)
    greatest = grouped.amax(2).transpose(1, 2).contiguous()  # [t, w, C / group]
    key = torch.topk(score_keys(greatest, place[: chunk // group]), top, 2, sorted=False)[0]
    best = (key & 0xFFFFFFFF).transpose(1, 2).unsqueeze(2)  # [t, top, 1, w]
    of_best = grouped.gather(1, best.expand(tiles, top, group, width)).permute(0, 3, 1, 2)
    place = best.permute(0, 3, 1, 2) * group + place[:group]  # [t, w, top, group]
    return score_keys(of_best.contiguous(), place + done).flatten(2)
