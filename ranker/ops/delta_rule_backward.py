"""The chunked delta rule with a backward pass written out: it keeps the state at each chunk's beginning, and recomputes
the rest.

Two passes over the chunks, each a cache-sized block of chunks at a time. The first computes what the scan of the
states' gradients needs, ∂S ← transitionᵀ ∂S + readerᵀ ∂O, which then runs from the last chunk to the first. The second,
in the notation of :mod:`ranker.ops.delta_rule_chunks` and with S and ∂S at both ends of every chunk, is

    R = b V − a e^G K S,   V' = (I + A)⁻¹ R,   ∂V' = Pᵀ ∂O + (e^(G_C − G) K) ∂S,   ∂R = (I + A)⁻ᵀ ∂V'
    ∂A = −tril(∂R V'ᵀ, −1),   ∂P = tril(∂O V'ᵀ),   P = tril(Q Kᵀ) ⊙ Γ

and from these the gradients of the inputs. Γ_ij is e^(G_i − G_j), so that G's gradient needs only row and column sums,
which are inner products of the inputs with gradients that are there already.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ranker.ops.delta_rule_chunks import (
    Chunks,
    Within,
    block_size,
    chunked_forward,
    chunks_of,
    decays_of,
    rows_back,
    rows_of,
    solve,
)

Strengths = tuple[Tensor, Tensor, "Within | None"]


class DeltaRule(torch.autograd.Function):
    """``apply`` takes the arguments of :func:`ranker.ops.delta_rule.delta_rule`, in order."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        erase: Tensor,
        write: Tensor,
        log_decay: Tensor | None,
        offsets: Tensor,
        chunk: int,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs and last states."""
        chunks = chunks_of(offsets, chunk)
        o, last, before = chunked_forward(q, k, v, erase, write, log_decay, chunks, state)
        ctx.save_for_backward(q, k, v, erase, write, log_decay, before)
        ctx.chunks, ctx.has_state = chunks, state is not None
        return (o.clone(), last.clone()) if o is v else (o, last)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the seven tensors."""
        q, k, v, erase, write, log_decay, before = ctx.saved_tensors
        d_q, d_k, d_v, d_erase, d_write, d_log_decay, d_state = _Backward(
            q, k, v, erase, write, log_decay, before, ctx.chunks
        ).run(*gradients)
        return d_q, d_k, d_v, d_erase, d_write, d_log_decay, None, None, d_state if ctx.has_state else None


class _Backward:
    """One backward pass: the inputs, by chunks."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        erase: Tensor,
        write: Tensor,
        log_decay: Tensor | None,
        before: Tensor,
        chunks: Chunks,
    ) -> None:
        self.heads, self.chunks, self.before = k.size(1), chunks, before
        self.q, self.k, self.v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        self.erase, self.write = erase.flatten(), write.flatten()
        self.log_decay = None if log_decay is None else log_decay.flatten()
        size, count = chunks.token.size(1), chunks.token.size(0)
        self.lower = torch.ones(size, size, dtype=k.dtype, device=k.device).tril()
        self.both = torch.cat([self.lower.tril(-1), self.lower])  # [2C, C]: masks of A and of P
        step = block_size(size, self.heads)
        self.blocks = [(first, min(first + step, count)) for first in range(0, count, step)]

    def take(self, x: Tensor, first: int, end: int) -> Tensor:
        """Rows `[T · h, d]` at the places of a block's chunks: `[B, C, d]`."""
        rows = rows_of(self.chunks, first, end, self.heads)
        return x.index_select(0, rows).view(-1, self.lower.size(0), x.size(1))

    def strengths(self, first: int, end: int) -> Strengths:
        """Erase and write strengths of a block `[B, C, 1]`, zero on padding, and its decays."""
        rows = rows_of(self.chunks, first, end, self.heads)
        real = self.chunks.real[first:end].unsqueeze(1)
        parts = [
            (x[rows].view(-1, self.heads, real.size(2)) * real).view(-1, real.size(2), 1)
            for x in (self.erase, self.write, self.log_decay)
            if x is not None
        ]
        return parts[0], parts[1], None if self.log_decay is None else decays_of(parts[2].squeeze(2))

    def run(self, d_o: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, erase, write, log_decay and the first states."""
        if not self.blocks:
            zeros = [torch.zeros_like(x) for x in (self.q, self.k, self.v, self.erase, self.write)]
            shaped = [x.view(0, self.heads, *x.shape[1:]) for x in zeros]
            return *shaped, None if self.log_decay is None else shaped[3].clone(), d_last
        d_o = d_o.flatten(0, 1)
        transition: list[Tensor] = []
        d_reader: list[Tensor] = []
        d_written: list[Tensor] = []
        for first, end in self.blocks:
            for kept, x in zip((transition, d_reader, d_written), self.before_scan(d_o, first, end), strict=True):
                kept.append(x)
        d_after, d_state = self.scan(torch.cat(transition), torch.cat(d_reader), d_last)
        del transition, d_reader
        found = [self.after_scan(d_o, d_after, d_written[i], *block) for i, block in enumerate(self.blocks)]
        back = rows_back(self.chunks, self.heads)
        out: list[Tensor | None] = []
        for parts in zip(*found, strict=True):
            x = torch.cat(parts)
            flat = x.view(-1) if x.dim() == 2 else x.view(-1, x.size(2))
            out.append(flat.index_select(0, back).view(-1, self.heads, *x.shape[2:]))
        return *out, *([] if len(out) == 6 else [None]), d_state

    def output_gradient(self, d_o: Tensor, first: int, end: int) -> Tensor:
        """∂O of a block, zero on padding: `[B, C, dv]`."""
        real = self.chunks.real[first:end].repeat_interleave(self.heads, 0).unsqueeze(2)
        return self.take(d_o, first, end) * real

    def before_scan(self, d_o: Tensor, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """transition `[B, dk, dk]`, readerᵀ ∂O `[B, dk, dv]` and Pᵀ ∂O `[B, C, dv]` of a block."""
        q, k, d_o = self.take(self.q, first, end), self.take(self.k, first, end), self.output_gradient(d_o, first, end)
        erase, _, decays = self.strengths(first, end)
        erased = erase * k
        a, p = torch.bmm(erased, k.mT), torch.bmm(q, k.mT)
        whole = torch.eye(k.size(2), dtype=k.dtype, device=k.device).unsqueeze(0)
        if decays is None:
            p *= self.lower
        else:
            a *= decays.pair
            p *= decays.pair
            erased, q, k, whole = erased * decays.since, q * decays.since, k * decays.until, whole * decays.whole
        w = solve(a, erased)
        d_written = torch.bmm(p.mT, d_o)
        return whole - torch.bmm(k.mT, w), torch.bmm(q.mT, d_o) - torch.bmm(w.mT, d_written), d_written

    def scan(self, transition: Tensor, d_reader: Tensor, d_last: Tensor) -> tuple[Tensor, Tensor]:
        """∂S after each chunk `[M · h, dk, dv]`, and of the first states `[R, h, dk, dv]`."""
        sizes = [n * self.heads for n in self.chunks.active]
        transitions, readers = transition.split(sizes), d_reader.split(sizes)
        ended = d_last[self.chunks.order].flatten(0, 1)
        after: list[Tensor] = []
        d_s = ended[:0]
        for j in reversed(range(len(sizes))):
            if d_s.size(0) < sizes[j]:
                d_s = torch.cat([d_s, ended[d_s.size(0) : sizes[j]]])
            after.append(d_s)
            d_s = torch.baddbmm(readers[j], transitions[j].mT, d_s)
        after.reverse()
        d_state = torch.cat([d_s, ended[d_s.size(0) :]])
        return torch.cat(after), d_state.view_as(d_last)[self.chunks.rank]

    def after_scan(self, d_o: Tensor, d_after: Tensor, d_written: Tensor, first: int, end: int) -> list[Tensor]:
        """Gradients of a block's q, k, v `[B, C, d]`, erase, write and, with decay, log decay `[B, C]`."""
        q, k, v = (self.take(x, first, end) for x in (self.q, self.k, self.v))
        d_o = self.output_gradient(d_o, first, end)
        erase, write, decays = self.strengths(first, end)
        of_block = slice(first * self.heads, end * self.heads)
        s, d_s = self.before[of_block], d_after[of_block]

        erased = erase * k
        a = torch.bmm(erased, k.mT)
        since = until = None
        if decays is not None:
            a *= decays.pair
            since, until = decays.since, decays.until
        found = torch.bmm(k, s)  # what each key finds of the state before the chunk
        if since is not None:
            found *= since
        written = solve(a, write * v - erase * found)  # V'
        d_written = torch.baddbmm(d_written, k if until is None else k * until, d_s)
        d_r = torch.linalg.solve_triangular(a.mT, d_written, upper=True, unitriangular=True)

        d_ap = torch.bmm(torch.cat([-d_r, d_o], 1), written.mT)  # [B, 2C, C]: ∂A / a and ∂P, each ⊙ Γ
        if decays is None:
            d_ap *= self.both
        else:
            d_ap.unflatten(1, (2, -1)).mul_(decays.pair.unsqueeze(1))
            d_ap *= self.both
        size = k.size(1)
        by_row = torch.bmm(d_ap, k)
        d_state = torch.bmm(torch.cat([d_r * -erase, d_o], 1), s.mT)
        if since is not None:
            d_state.unflatten(1, (2, -1)).mul_(since.unsqueeze(1))
        d_q = by_row[:, size:] + d_state[:, size:]
        by_column = torch.bmm(d_ap.mT, torch.cat([erased, q], 1))
        d_end = torch.bmm(written, d_s.mT)
        if until is not None:
            d_end *= until
        by_column += d_end
        d_k = erase * by_row[:, :size] + d_state[:, :size] + by_column
        d_erase = (k * by_row[:, :size]).sum(2) - (d_r * found).sum(2)
        out = [d_q, d_k, write * d_r, d_erase, (d_r * v).sum(2)]
        if decays is not None:
            d_running = erase.squeeze(2) * d_erase + (q * d_q).sum(2) - (k * by_column).sum(2)
            d_running[:, -1] += (k * d_end).sum([1, 2]) + decays.whole.flatten() * (s * d_s).sum([1, 2])
            out.append(d_running.flip(1).cumsum(1).flip(1))
        return out
