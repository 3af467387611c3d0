"""The chunked delta rule with a backward pass written out. It keeps each chunk's first state, transition and reader, no
C × C matrix, and recomputes the rest.

First the scan of the states' gradients, ∂S ← transitionᵀ ∂S + readerᵀ ∂O, from the last chunk to the first. Then, with
S and ∂S at both ends of every chunk, a cache-sized block of chunks at a time (:mod:`ranker.ops.delta_rule_chunks` has
the notation):

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

from ranker.ops.chunks import Chunks, chunks_of, rows_back, rows_of
from ranker.ops.delta_rule_chunks import Writes, block_size, chunked_forward, decays_of, solve
from ranker.ops.delta_rule_stops import Parts, Stops, Within, parts_of, stops_of


class DeltaRule(torch.autograd.Function):
    """``apply`` takes the :class:`~ranker.ops.delta_rule_chunks.Writes`, one by one, and the other arguments of
    :func:`ranker.ops.delta_rule.delta_rule`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Outputs and states."""
        writes, (offsets, chunk, state, at) = Writes(*arguments[:6]), arguments[6:]
        chunks = chunks_of(offsets, chunk)
        stops = None if at is None else stops_of(at, chunks, block_size(chunk, writes.k.size(1)))
        found = chunked_forward(writes, chunks, state, stops)
        ctx.save_for_backward(*writes, found.before, found.transition, found.to_stop, *found.reader)
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
        q, k, v, erase, write, log_decay, before, transition, to_stop, *reader = ctx.saved_tensors
        writes = Writes(q, k, v, erase, write, log_decay)
        d_o, d_states = gradients
        requests = ctx.chunks.order.numel()
        if q.size(0) == 0:
            zeros = [None if x is None else torch.zeros_like(x) for x in writes]
            d_state = d_states if ctx.stops is None else d_states.new_zeros([requests, *d_states.shape[1:]])
            return *zeros, None, None, d_state if ctx.has_state else None, None
        blocks = _Blocks(writes, ctx.chunks, ctx.stops)
        d_o, d_last, d_stop = d_o.flatten(0, 1), d_states, None
        if ctx.stops is not None:
            d_last = d_states.new_zeros([requests, *d_states.shape[1:]])
            d_stop = d_states[ctx.stops.order].flatten(0, 1)
        d_after, d_state = blocks.scan(d_o, d_last, d_stop, transition, to_stop, reader)
        of_inputs = blocks.gradients(d_o, before, d_after, d_stop)
        return *of_inputs, None, None, d_state if ctx.has_state else None, None


class _Blocks:
    """The inputs, by blocks of chunks."""

    def __init__(self, writes: Writes, chunks: Chunks, stops: Stops | None) -> None:
        q, k, v, erase, write, log_decay = writes
        self.heads, self.chunks, self.stops = k.size(1), chunks, stops
        self.q, self.k, self.v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        self.erase, self.write = erase.flatten(), write.flatten()
        self.log_decay = None if log_decay is None else log_decay.flatten()
        size, count = chunks.token.size(1), chunks.token.size(0)
        self.lower = torch.ones(size, size, dtype=k.dtype, device=k.device).tril()
        self.below = self.lower.tril(-1)
        step = block_size(size, self.heads)
        self.blocks = [(first, min(first + step, count)) for first in range(0, count, step)]

    def take(self, x: Tensor, first: int, end: int) -> Tensor:
        """Rows of `[T · h, d]` at the places of a block's chunks: `[B, C, d]`."""
        rows = rows_of(self.chunks, first, end, self.heads)
        return x.index_select(0, rows).view(-1, self.lower.size(0), x.size(1))

    def take_real(self, x: Tensor, first: int, end: int) -> Tensor:
        """The same, zero on padding."""
        real = self.chunks.real[first:end]
        taken = self.take(x, first, end)
        return taken if bool(real.all()) else taken * real.repeat_interleave(self.heads, 0).unsqueeze(2)

    def take_decays(self, first: int, end: int) -> Within | None:
        """Decays within a block's chunks."""
        if self.log_decay is None:
            return None
        return decays_of(self.take_real(self.log_decay.unsqueeze(1), first, end).squeeze(2))

    def scan(
        self,
        d_o: Tensor,
        d_last: Tensor,
        d_stop: Tensor | None,
        transition: Tensor,
        to_stop: Tensor,
        reader: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """∂S after each chunk `[M · h, dk, dv]`, and of the first states `[R, h, dk, dv]`."""
        heads = self.heads
        read = torch.cat([torch.bmm(reader[i].mT, self.take_real(d_o, *block)) for i, block in enumerate(self.blocks)])
        if self.stops is not None and d_stop is not None:
            row = (self.stops.chunk.unsqueeze(1) * heads + torch.arange(heads, device=d_o.device)).flatten()
            read.index_add_(0, row, torch.bmm(to_stop.mT, d_stop))
        sizes = [n * heads for n in self.chunks.active]
        transitions, reads = transition.split(sizes), read.split(sizes)
        ended = d_last[self.chunks.order].flatten(0, 1)
        after: list[Tensor] = []
        d_s = ended[:0]
        for j in reversed(range(len(sizes))):
            if d_s.size(0) < sizes[j]:  # more sequences are there than have a later chunk
                d_s = torch.cat([d_s, ended[d_s.size(0) : sizes[j]]])
            after.append(d_s)
            d_s = torch.baddbmm(reads[j], transitions[j].mT, d_s)
        after.reverse()
        d_state = torch.cat([d_s, ended[d_s.size(0) :]])
        return torch.cat(after), d_state.view_as(d_last)[self.chunks.rank]

    def gradients(self, d_o: Tensor, before: Tensor, d_after: Tensor, d_stop: Tensor | None) -> list[Tensor | None]:
        """Of q, k, v, erase, write and log decay, each in the shape of its input."""
        found = [self.of_block(d_o, before, d_after, d_stop, *block) for block in self.blocks]
        back = rows_back(self.chunks, self.heads)
        out: list[Tensor | None] = []
        for parts in zip(*found, strict=True):
            x = torch.cat(parts).flatten(0, 1).index_select(0, back)
            out.append(x.view(-1, self.heads, *x.shape[1:]))
        return out if self.log_decay is not None else [*out, None]

    def of_block(
        self, d_o: Tensor, before: Tensor, d_after: Tensor, d_stop: Tensor | None, first: int, end: int
    ) -> list[Tensor]:
        """Gradients of a block's q, k, v `[B, C, d]`, erase, write and, with decay, log decay `[B, C]`."""
        q, k, v = (self.take(x, first, end) for x in (self.q, self.k, self.v))
        d_o = self.take_real(d_o, first, end)
        erase, write = (self.take_real(x.unsqueeze(1), first, end) for x in (self.erase, self.write))  # [B, C, 1]
        decays = self.take_decays(first, end)
        s, d_s = before[first * self.heads : end * self.heads], d_after[first * self.heads : end * self.heads]

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
        written = solve(a, write * v - erase * found)  # V'
        d_written = torch.bmm(p.mT, d_o).baddbmm_(kept, d_s)
        parts, d_part = self.parts(d_stop, first, decays, k)
        if parts is not None:
            weighted = k.index_select(0, parts.row) * parts.weight
            d_written.index_add_(0, parts.row, torch.bmm(weighted, d_part))
        d_r = torch.linalg.solve_triangular(a.mT, d_written, upper=True, unitriangular=True)
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
        d_k = torch.baddbmm(column, d_found, s.mT, alpha=-1).addcmul_(erase, row, value=-1)
        d_erase = -((k * row).sum(2) + (d_r * found).sum(2))
        out = [d_q, d_k, write * d_r, d_erase, (d_r * v).sum(2)]
        if decays is not None:
            d_running = erase.squeeze(2) * d_erase + (q * d_q).sum(2) - (k * column).sum(2)
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
