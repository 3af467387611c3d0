"""The chunked delta rule with a backward pass written out. It keeps each chunk's first state, transition and reader, no
C × C matrix, and recomputes the rest.

A cache-sized block of chunks at a time, from the last to the first: the scan of the states' gradients, ∂S ← transitionᵀ
∂S + readerᵀ ∂O, goes through the block, and then, with S and ∂S at both ends of its chunks
(:mod:`ranker.ops.delta_rule_chunks` has the notation):

    R = b V − a e^G K S,   V' = (I + A)⁻¹ R,   ∂V' = Pᵀ ∂O + (e^(G_C − G) K) ∂S,   ∂R = (I + A)⁻ᵀ ∂V'
    ∂A = −tril(∂R V'ᵀ, −1),   ∂P = tril(∂O V'ᵀ),   P = tril(Q Kᵀ) ⊙ Γ

and from these the gradients of the inputs. Γ_ij is e^(G_i − G_j), so that G's gradient needs only row and column sums,
which are inner products of the inputs with gradients that are there already. A state S_p asked for in the midst of a
chunk adds transition_pᵀ ∂S_p to ∂S in the scan and, like the last one, a term to ∂V' and to the gradients of K and G.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ranker.ops.chunks import Chunks, chunks_of, rows_of
from ranker.ops.delta_rule_chunks import Writes, block_size, decays_of
from ranker.ops.delta_rule_forward import Piece, forward_pass, pieces_of, rows_out
from ranker.ops.delta_rule_stops import Parts, Stops, Within, parts_of, stops_of
from ranker.ops.triangular_inverse import unit_lower_inverse


class DeltaRule(torch.autograd.Function):
    """``apply`` takes the :class:`~ranker.ops.delta_rule_chunks.Writes`, one by one, and the other arguments of
    :func:`ranker.ops.delta_rule.delta_rule`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Outputs and states."""
        writes, (offsets, chunk, state, at) = Writes(*arguments[:6]), arguments[6:]
        chunks = chunks_of(offsets, chunk)
        stops = None if at is None else stops_of(at, chunks, block_size(chunk, writes.k.size(1)))
        found = forward_pass(writes, chunks, state, stops)
        ctx.save_for_backward(*writes, found.before, found.transition, found.to_stop, found.reader)
        ctx.chunks, ctx.stops, ctx.has_state = chunks, stops, state is not None
        if writes.q.size(0) == 0:
            return found.o.clone(), found.states.clone()  # an input may not be an output
        return found.o, found.states

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the six tensors and of the state to begin with."""
        q, k, v, erase, write, log_decay, before, transition, to_stop, reader = ctx.saved_tensors
        writes = Writes(q, k, v, erase, write, log_decay)
        d_o, d_states = gradients
        requests = ctx.chunks.order.numel()
        if q.size(0) == 0:
            zeros = [None if x is None else torch.zeros_like(x) for x in writes]
            d_state = d_states if ctx.stops is None else d_states.new_zeros([requests, *d_states.shape[1:]])
            return *zeros, None, None, d_state if ctx.has_state else None, None
        blocks = _Blocks(writes, ctx.chunks, ctx.stops, d_o)
        d_last, d_stop = d_states, None
        if ctx.stops is not None:
            d_last = d_states.new_zeros([requests, *d_states.shape[1:]])
            d_stop = d_states[ctx.stops.order].flatten(0, 1)
        d_state, of_inputs = blocks.gradients(d_last, d_stop, before, transition, to_stop, reader)
        return *of_inputs, None, None, d_state if ctx.has_state else None, None


class _Blocks:
    """The inputs and their gradients, by blocks of chunks."""

    def __init__(self, writes: Writes, chunks: Chunks, stops: Stops | None, d_o: Tensor) -> None:
        self.heads, self.chunks, self.stops, self.decay = writes.k.size(1), chunks, stops, writes.log_decay is not None
        present = [x for x in (*writes, d_o) if x is not None]
        self.given = [x.flatten(0, 1) for x in present]
        rows = self.given[0].size(0) + 1  # and one for padding
        self.found = [x.new_empty([rows, *x.shape[1:]]) for x in self.given[:-1]]
        size, count = chunks.token.size(1), chunks.token.size(0)
        self.lower = torch.ones(size, size, dtype=d_o.dtype, device=d_o.device).tril()
        self.below = self.lower.tril(-1)
        step = block_size(size, self.heads)
        pieces = pieces_of(chunks.active, self.heads, step)
        self.blocks = [(i * step, min((i + 1) * step, count), of_block) for i, of_block in enumerate(pieces)]

    def gradients(
        self,
        d_last: Tensor,
        d_stop: Tensor | None,
        before: Tensor,
        transition: Tensor,
        to_stop: Tensor,
        reader: Tensor,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Of the first states `[R, h, dk, dv]`, and of q, k, v, erase, write and log decay, as these have come."""
        heads, size = self.heads, self.lower.size(0)
        d_first = d_last[self.chunks.order].flatten(0, 1)
        d_after = torch.empty_like(before)
        for first, end, pieces in reversed(self.blocks):
            rows, real = rows_of(self.chunks, first, end, heads), self.chunks.real[first:end]
            taken = [x.index_select(0, rows).view(-1, size, *x.shape[1:]) for x in self.given]
            if not bool(real.all()):
                real = real.repeat_interleave(heads, 0)
                for x in taken[3:]:  # strengths, decays and gradients of padding are zero
                    x.mul_(real.unsqueeze(2) if x.dim() == 3 else real)
            at = slice(first * heads, end * heads)
            read = torch.bmm(reader[at].mT, taken[-1])
            if self.stops is not None and d_stop is not None:
                block = first // self.stops.step
                a, b = self.stops.bounds[block], self.stops.bounds[block + 1]
                row = (self.stops.chunk[a:b] - first).unsqueeze(1) * heads + torch.arange(heads, device=read.device)
                row = row.flatten()
                read.index_add_(0, row, torch.bmm(to_stop[a * heads : b * heads].mT, d_stop[a * heads : b * heads]))
            for piece in reversed(pieces):
                scan(piece, transition, read[piece.first - at.start : piece.end - at.start], d_after, d_first)
            to = rows_out(self.chunks, first, end, heads)
            for x, found in zip(self.of_block(taken, before[at], d_after[at], d_stop, first), self.found, strict=True):
                found.index_copy_(0, to, x.flatten(0, 1))
        of_inputs: list[Tensor | None] = [x[:-1].unflatten(0, (-1, heads)) for x in self.found]
        return d_first.view_as(d_last)[self.chunks.rank], of_inputs if self.decay else [*of_inputs, None]

    def of_block(self, taken: list[Tensor], s: Tensor, d_s: Tensor, d_stop: Tensor | None, first: int) -> list[Tensor]:
        """Gradients of a block's q, k, v `[B, C, d]`, erase, write and, with decay, log decay `[B, C]`, from these and
        the outputs', and the states before and their gradients after each chunk."""
        q, k, v, d_o = *taken[:3], taken[-1]
        erase, write = taken[3].unsqueeze(2), taken[4].unsqueeze(2)
        decays = decays_of(taken[5]) if self.decay else None

        erased = erase * k
        a, p = torch.bmm(erased, k.mT), torch.bmm(q, k.mT)
        found = torch.bmm(k, s)  # what each key finds of the state before the chunk
        lower, below, kept, since_o = self.lower, self.below, k, d_o
        if decays is not None:
            a *= decays.pair
            found *= decays.since
            lower, below = decays.pair, decays.pair * self.below
            kept, since_o = k * decays.until, d_o * decays.since
        p *= lower
        inverse = unit_lower_inverse(a)
        written = torch.bmm(inverse, write * v - erase * found)  # V'
        d_written = torch.bmm(p.mT, d_o).baddbmm_(kept, d_s)
        parts, d_part = self.parts(d_stop, first, decays, k)
        if parts is not None:
            weighted = k.index_select(0, parts.row) * parts.weight
            d_written.index_add_(0, parts.row, torch.bmm(weighted, d_part))
        d_r = torch.bmm(inverse.mT, d_written)
        d_a = torch.bmm(d_r, written.mT).mul_(below)  # −∂A ⊙ Γ / a
        d_p = torch.bmm(d_o, written.mT).mul_(lower)  # ∂P ⊙ Γ

        row = torch.bmm(d_a, k)
        d_q = torch.bmm(d_p, k).baddbmm_(since_o, s.mT)
        column = torch.bmm(d_p.mT, q).baddbmm_(d_a.mT, erased, alpha=-1)
        d_kept = torch.bmm(written, d_s.mT)
        d_found = erase * d_r
        if decays is not None:
            d_kept *= decays.until
            d_found *= decays.since
        column += d_kept
        d_weighted = d_part
        if parts is not None:
            d_weighted = torch.bmm(written.index_select(0, parts.row), d_part.mT).mul_(parts.weight)
            column.index_add_(0, parts.row, d_weighted)
        d_gap = (k * column).sum(2)
        d_k = column.baddbmm_(d_found, s.mT, alpha=-1).addcmul_(erase, row, value=-1)
        d_erase = ((k * row).sum(2) + (d_r * found).sum(2)).neg_()
        d_write = (d_r * v).sum(2)
        out = [d_q, d_k, d_r.mul_(write), d_erase, d_write]
        if decays is not None:
            d_running = erase.squeeze(2) * d_erase + (q * d_q).sum(2) - d_gap
            d_running[:, -1] += (k * d_kept).sum([1, 2]) + decays.whole.flatten() * (s * d_s).sum([1, 2])
            if parts is not None:  # e^(G_p) multiplies all of a state after place p
                d_place = (k.index_select(0, parts.row) * d_weighted).sum([1, 2])
                d_place += (parts.since * s.index_select(0, parts.row) * d_part).sum([1, 2])
                d_running.index_put_((parts.row, parts.place), d_place, accumulate=True)
            out.append(d_running.flip(1).cumsum(1).flip(1))
        return out

    def parts(self, d_stop: Tensor | None, first: int, decays: Within | None, k: Tensor) -> tuple[Parts | None, Tensor]:
        """The stops of a block, None where it has none, and the gradients of their states `[n, dk, dv]`."""
        if self.stops is None or d_stop is None:
            return None, k
        block = first // self.stops.step
        a, b = self.stops.bounds[block], self.stops.bounds[block + 1]
        if a == b:
            return None, k
        return parts_of(self.stops, first, self.heads, decays, k), d_stop[a * self.heads : b * self.heads]


def scan(piece: Piece, transition: Tensor, read: Tensor, d_after: Tensor, d_first: Tensor) -> None:
    """∂S ← transitionᵀ ∂S + read, from after the piece's chunks to after those of the rank before, or to the first
    states. Sequences that end here come in, from the same place."""
    count, later, sequence = piece.end - piece.first, piece.later, piece.sequence
    if later < count:
        d_after[piece.first + later : piece.end] = d_first[sequence + later : sequence + count]
    at, into = slice(piece.first, piece.end), d_first[sequence : sequence + count]
    if piece.earlier >= 0:
        into = d_after[piece.earlier : piece.earlier + count]
    torch.baddbmm(read, transition[at].mT, d_after[at], out=into)
