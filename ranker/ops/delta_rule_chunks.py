"""The delta rule in chunks of C tokens: a scan over chunks instead of tokens, and batched products within them.

Within a chunk that begins with the state S, with G the running sum of the log decay, Γ_ij = e^(G_i − G_j) for j ≤ i, a
the erase and b the write strength, the recurrence of :mod:`ranker.ops.delta_rule` unrolls to ("WY" form; Yang et al.
2024, Parallelizing Linear Transformers with the Delta Rule, and Gated Delta Networks):

    A  = tril(diag(a) K Kᵀ ⊙ Γ, −1)                   what a key finds of the earlier keys of its chunk
    V' = (I + A)⁻¹ (diag(b) V − diag(a e^G) K S)      what each token writes, after erasing
    O  = diag(e^G) Q S + (tril(Q Kᵀ) ⊙ Γ) V'
    S ← e^(G_C) S + (diag(e^(G_C − G)) K)ᵀ V'

V' is linear in S: V' = U + W S. So O = own + reader S and S ← transition S + addition, whose four factors need no
state: they are computed for all chunks of all sequences at once, a cache-sized block of chunks at a time.

The scan takes all chunks of one rank at a time, which :mod:`ranker.ops.chunks` has put beside each other.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.chunks import Chunks, chunks_of, rows_back, rows_of


class Within(NamedTuple):
    """Decays within each of B chunks: the running sum `[B, C]` as factors.

    pair: Γ `[B, C, C]`, zero above the diagonal; since: e^G `[B, C, 1]`; until: e^(G_C − G) `[B, C, 1]`;
    whole: e^(G_C) `[B, 1, 1]`.
    """

    pair: Tensor
    since: Tensor
    until: Tensor
    whole: Tensor


def decays_of(log_decay: Tensor) -> Within:
    """Decays from the log decay of each token `[B, C]`."""
    running = log_decay.cumsum(1)
    gap = running.unsqueeze(2) - running.unsqueeze(1)
    above = torch.ones([gap.size(1), gap.size(1)], dtype=torch.bool, device=gap.device).triu(1)
    total = running[:, -1:]
    return Within(
        gap.masked_fill_(above, float("-inf")).exp_(),
        running.exp().unsqueeze(2),
        (total - running).exp().unsqueeze(2),
        total.exp().unsqueeze(2),
    )


def solve(a: Tensor, x: Tensor) -> Tensor:
    """(I + tril(a, −1))⁻¹ x; what `a` has on and above its diagonal is not looked at."""
    return torch.linalg.solve_triangular(a, x, upper=False, unitriangular=True)


def block_size(chunk: int, heads: int, numbers: int = 2**17) -> int:
    """Chunks worked on at once: `numbers` of a C × C matrix each, so that a few of these stay in a core's cache."""
    return max(1, numbers // (chunk * chunk * heads))


def terms(
    q: Tensor, k: Tensor, v: Tensor, erase: Tensor, write: Tensor, decays: Within | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What B chunks do to any state: ``o = own + reader · S`` and ``S ← transition · S + addition``.

    Args:
        q, k: `[B, C, dk]`; v: `[B, C, dv]`; erase, write: `[B, C, 1]`.

    Returns:
        reader `[B, C, dk]`, own `[B, C, dv]`, transition `[B, dk, dk]`, addition `[B, dk, dv]`.
    """
    dk, dv = k.size(2), v.size(2)
    erased = erase * k
    a = torch.bmm(erased, k.transpose(1, 2))
    p = torch.bmm(q, k.transpose(1, 2))
    kept, until = q, k
    whole = torch.eye(dk, dtype=k.dtype, device=k.device).unsqueeze(0)
    if decays is None:
        p = p.tril()
    else:
        a, p = a * decays.pair, p * decays.pair
        erased, kept, until = erased * decays.since, q * decays.since, k * decays.until
        whole = whole * decays.whole
    wu = solve(a, torch.cat([-erased, write * v], 2))  # [B, C, dk + dv]: W and U
    read = torch.bmm(p, wu)
    step = torch.bmm(until.transpose(1, 2), wu)
    return kept + read[:, :, :dk], read[:, :, dk:], whole + step[:, :, :dk], step[:, :, dk : dk + dv]


def chunked_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor | None,
    offsets: Tensor,
    chunk: int = 32,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`ranker.ops.delta_rule.delta_rule`. Scriptable; autograd keeps everything that the forward computes."""
    o, last, _, _, _ = chunked_forward(q, k, v, erase, write, log_decay, chunks_of(offsets, chunk), state)
    return o, last


def chunked_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor,
    log_decay: Tensor | None,
    chunks: Chunks,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Outputs `[T, h, dv]`, last states `[R, h, dk, dv]`, and for a backward pass, of every chunk: the state that it
    begins with `[M · h, dk, dv]`, its transition `[M · h, dk, dk]` and, block by block, reader `[B, C, dk]`."""
    heads, dk, dv, size = k.size(1), k.size(2), v.size(2), chunks.token.size(1)
    count, requests = chunks.token.size(0), chunks.order.numel()
    if state is None:
        state = torch.zeros([requests, heads, dk, dv], dtype=k.dtype, device=k.device)
    if count == 0:
        return v, state, v, v, [v]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    reader: list[Tensor] = []
    own: list[Tensor] = []
    transition: list[Tensor] = []
    addition: list[Tensor] = []
    step = block_size(size, heads)
    for first in range(0, count, step):
        end = min(first + step, count)
        rows = rows_of(chunks, first, end, heads)
        real = chunks.real[first:end].unsqueeze(1)
        decays: Within | None = None
        if log_decay is not None:
            decays = decays_of((log_decay.flatten().index_select(0, rows).view(-1, heads, size) * real).flatten(0, 1))
        of_block = terms(
            q.index_select(0, rows).view(-1, size, dk),
            k.index_select(0, rows).view(-1, size, dk),
            v.index_select(0, rows).view(-1, size, dv),
            (erase.flatten().index_select(0, rows).view(-1, heads, size) * real).view(-1, size, 1),
            (write.flatten().index_select(0, rows).view(-1, heads, size) * real).view(-1, size, 1),
            decays,
        )
        reader.append(of_block[0])
        own.append(of_block[1])
        transition.append(of_block[2])
        addition.append(of_block[3])
    transitions = torch.cat(transition)
    before, last = _scan(transitions, torch.cat(addition), state[chunks.order].flatten(0, 1), chunks, heads)
    out: list[Tensor] = []
    for i in range(len(own)):
        begin = before[i * step * heads : (i + 1) * step * heads]
        out.append(torch.baddbmm(own[i], reader[i], begin))
    o = torch.cat(out).view(-1, dv).index_select(0, rows_back(chunks, heads)).view(-1, heads, dv)
    return o, last.view(requests, heads, dk, dv)[chunks.rank], before, transitions, reader


def _scan(transition: Tensor, addition: Tensor, state: Tensor, chunks: Chunks, heads: int) -> tuple[Tensor, Tensor]:
    """S ← transition S + addition, rank after rank.

    Args:
        transition: `[M · h, dk, dk]`; addition: `[M · h, dk, dv]`.
        state: `[R · h, dk, dv]`, the longest sequence first.

    Returns:
        The states before each chunk `[M · h, dk, dv]`, and the last ones `[R · h, dk, dv]`, the longest first.
    """
    sizes = [n * heads for n in chunks.active]
    transitions, additions = transition.split(sizes), addition.split(sizes)
    before: list[Tensor] = []
    ended: list[Tensor] = []  # of ever longer sequences
    for j in range(len(sizes)):
        ended.append(state[sizes[j] :])
        state = state[: sizes[j]]
        before.append(state)
        state = torch.baddbmm(additions[j], transitions[j], state)
    ended.append(state)
    ended.reverse()
    return torch.cat(before), torch.cat(ended)
