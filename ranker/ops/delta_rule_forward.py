"""The chunked delta rule where no autograd watches: the equations of :mod:`ranker.ops.delta_rule_chunks`, a cache-sized
block of chunks at a time, from the inputs to the outputs.

A block has chunks of one rank or of a few: when its four factors are there, so are the states before its first rank,
and the scan goes on through it. Only what a backward pass reads leaves the cache.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.chunks import Chunks, rows_of
from ranker.ops.delta_rule_chunks import Writes, block_size, decays_of
from ranker.ops.delta_rule_stops import Stops, Within, part_terms
from ranker.ops.triangular_inverse import unit_lower_inverse


class Pass(NamedTuple):
    """A forward pass. o: `[T, h, dv]`; states: `[R, h, dk, dv]` the last ones, or `[P, h, dk, dv]` those at the stops.

    For a backward pass, of every chunk: before: `[M · h, dk, dv]` the state that it begins with; transition: `[M · h,
    dk, dk]`; reader: `[M · h, C, dk]`; and to_stop: `[P · h, dk, dk]` the transition from the state before its chunk to
    each stop, in the order of :class:`~ranker.ops.delta_rule_stops.Stops`.
    """

    o: Tensor
    states: Tensor
    before: Tensor
    transition: Tensor
    reader: Tensor
    to_stop: Tensor


class Piece(NamedTuple):
    """The chunks of one rank in a block, times heads: rows ``first : end`` of `[M · h, ...]`. Those of the rank before
    them begin at row `earlier` (−1: there is none); `later` of them have a chunk of the next rank, from row `next` on,
    and `sequence` is the first one's place among the sequences times heads, the longest first."""

    first: int
    end: int
    earlier: int
    later: int
    next: int
    sequence: int


def pieces_of(active: list[int], heads: int, step: int) -> list[list[Piece]]:
    """Of each block of `step` chunks: work follows their number, however many ranks and blocks there are."""
    found: list[list[Piece]] = [[] for _ in range(0, sum(active), step)]
    start, before = 0, -1  # the first chunks of this rank, and of the one before
    for count, following in pairwise([*active, 0]):
        for block in range(start // step, (start + count - 1) // step + 1):
            a, b = max(start, block * step), min(start + count, (block + 1) * step)
            place = a - start
            found[block].append(
                Piece(
                    a * heads,
                    b * heads,
                    (before + place) * heads if before >= 0 else -1,
                    max(0, min(following, b - start) - place) * heads,
                    (start + count + place) * heads,
                    place * heads,
                )
            )
        before, start = start, start + count
    return found


def rows_out(chunks: Chunks, first: int, end: int, heads: int) -> Tensor:
    """As :func:`ranker.ops.chunks.rows_of`, but padding is one row more than the tokens have."""
    head = torch.arange(heads, device=chunks.token.device).view(1, -1, 1)
    rows = chunks.token[first:end].unsqueeze(1) * heads + head
    return rows.masked_fill_(~chunks.real[first:end].unsqueeze(1), chunks.place.numel() * heads).flatten()


def forward_pass(writes: Writes, chunks: Chunks, state: Tensor | None, stops: Stops | None) -> Pass:
    """Outputs and states, and what a backward pass needs."""
    heads, dk, dv, size = writes.k.size(1), writes.k.size(2), writes.v.size(2), chunks.token.size(1)
    tokens, count, requests = writes.k.size(0), chunks.token.size(0), chunks.order.numel()
    q, k, v = writes.q.flatten(0, 1), writes.k.flatten(0, 1), writes.v.flatten(0, 1)
    if state is None:
        last = k.new_zeros([requests * heads, dk, dv])
    else:
        last = state.index_select(0, chunks.order).flatten(0, 1)
    log_decay = writes.log_decay
    reader = k.new_empty([count * heads, size, dk])
    transition = k.new_zeros([count * heads, dk, dk])
    before = k.new_empty([count * heads, dk, dv])
    out = k.new_empty([tokens * heads + 1, dv])
    to_stop: list[Tensor] = [transition[:0]]
    at_stop: list[Tensor] = [before[:0]]
    if count > 0:
        before[: chunks.active[0] * heads] = last[: chunks.active[0] * heads]
    step = block_size(size, heads)
    pieces = pieces_of(chunks.active, heads, step)
    for first in range(0, count, step):
        end = min(first + step, count)
        rows = rows_of(chunks, first, end, heads)
        real = chunks.real[first:end].unsqueeze(1)
        q_block = q.index_select(0, rows).view(-1, size, dk)
        k_block = k.index_select(0, rows).view(-1, size, dk)
        erase = (writes.erase.flatten().index_select(0, rows).view(-1, heads, size) * real).view(-1, size, 1)
        write = (writes.write.flatten().index_select(0, rows).view(-1, heads, size) * real).view(-1, size, 1)
        erased = erase * k_block
        a, p = torch.bmm(erased, k_block.transpose(1, 2)), torch.bmm(q_block, k_block.transpose(1, 2))
        read, step_on = reader[first * heads : end * heads], transition[first * heads : end * heads]
        whole = step_on.diagonal(0, 1, 2)
        kept = k_block
        decays: Within | None = None
        if log_decay is None:
            p.tril_()
            read.copy_(q_block)
            whole.fill_(1.0)
        else:
            decays = decays_of((log_decay.flatten().index_select(0, rows).view(-1, heads, size) * real).flatten(0, 1))
            a.mul_(decays.pair)
            p.mul_(decays.pair)
            erased.mul_(decays.since)
            torch.mul(q_block, decays.since, out=read)
            kept = k_block * decays.until
            whole.copy_(decays.whole.squeeze(2))
        inverse = unit_lower_inverse(a)
        w = torch.bmm(inverse, erased.neg_())
        u = torch.bmm(inverse, v.index_select(0, rows).view(-1, size, dv).mul_(write))
        read.baddbmm_(p, w)
        step_on.baddbmm_(kept.transpose(1, 2), w)
        addition = torch.bmm(kept.transpose(1, 2), u)
        for piece in pieces[first // step]:
            scan(piece, transition, addition[piece.first - first * heads : piece.end - first * heads], before, last)
        begin = before[first * heads : end * heads]
        o = torch.bmm(p, u).baddbmm_(read, begin)
        out.index_copy_(0, rows_out(chunks, first, end, heads), o.view(-1, dv))
        if stops is not None:
            part_transition, part_addition = part_terms(k_block, torch.cat([w, u], 2), decays, stops, first, heads)
            to_stop.append(part_transition)
            at_stop.append(part_addition)
    to_stops = torch.cat(to_stop)
    if stops is None:
        states = last.view(requests, heads, dk, dv).index_select(0, chunks.rank)
    else:
        begin = before.view(-1, heads, dk, dv).index_select(0, stops.chunk).flatten(0, 1)
        states = torch.baddbmm(torch.cat(at_stop), to_stops, begin).view(-1, heads, dk, dv).index_select(0, stops.rank)
    return Pass(out[:-1].view(-1, heads, dv), states, before, transition, reader, to_stops)


def scan(piece: Piece, transition: Tensor, addition: Tensor, before: Tensor, last: Tensor) -> None:
    """S ← transition S + addition, where the next rank reads it, or among the last states where there is none."""
    transition, state = transition[piece.first : piece.end], before[piece.first : piece.end]
    count, later = piece.end - piece.first, piece.later
    if later == count:
        torch.baddbmm(addition, transition, state, out=before[piece.next : piece.next + later])
        return
    after = torch.baddbmm(addition, transition, state)
    before[piece.next : piece.next + later] = after[:later]
    last[piece.sequence + later : piece.sequence + count] = after[later:]
