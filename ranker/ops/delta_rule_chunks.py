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

Chunks are ordered by their rank in their sequence, and sequences by length, the longest first: those that still have a
chunk of rank j are a prefix of those that had one of rank j − 1. Only a sequence's last chunk is padded, so that work
follows Σ L.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows


class Chunks(NamedTuple):
    """How T tokens of R sequences are cut into M chunks of C places.

    token: `[M, C]` int64, the token at each place; padding repeats the sequence's last.
    real: `[M, C]` bool, false for padding.
    place: `[T]` int64, where each token is, in `[M · C]`.
    order: `[R]` int64, the sequences, the longest first; rank: `[R]`, its inverse.
    active: how many sequences have a chunk of rank 0, 1, ….
    """

    token: Tensor
    real: Tensor
    place: Tensor
    order: Tensor
    rank: Tensor
    active: list[int]


def rows_of(chunks: Chunks, first: int, end: int, heads: int) -> Tensor:
    """Rows of a `[T · h, ...]` tensor at the places of chunks first … end − 1: `[(end − first) · h · C]`."""
    head = torch.arange(heads, device=chunks.token.device).view(1, -1, 1)
    return (chunks.token[first:end].unsqueeze(1) * heads + head).flatten()


def rows_back(chunks: Chunks, heads: int) -> Tensor:
    """Rows of a `[M · h · C, ...]` tensor where each head of each token is: `[T · h]`."""
    size = chunks.token.size(1)
    head = torch.arange(heads, device=chunks.token.device) * size
    chunk = torch.div(chunks.place, size, rounding_mode="floor")
    return ((chunk * heads * size + chunks.place % size).unsqueeze(1) + head).flatten()


def chunks_of(offsets: Tensor, size: int) -> Chunks:
    """Cut the sequences ``[offsets[r], offsets[r + 1])`` into chunks of `size` tokens."""
    lengths = offsets[1:] - offsets[:-1]
    order = torch.argsort(lengths, descending=True, stable=True)
    pieces = (lengths[order] + size - 1) // size
    rank, sequence = expand_windows(torch.zeros_like(pieces), pieces)
    by_rank = torch.argsort(rank, stable=True)
    rank, sequence = rank[by_rank], order[sequence[by_rank]]
    within = torch.arange(size, device=offsets.device)
    token = (offsets[:-1][sequence] + rank * size).unsqueeze(1) + within
    last = offsets[1:][sequence].unsqueeze(1) - 1
    real = token <= last
    token = torch.minimum(token, last)
    place = torch.empty([int(lengths.sum())], dtype=torch.int64, device=offsets.device)
    place[token[real]] = torch.arange(token.numel(), device=offsets.device).view_as(token)[real]
    active: list[int] = torch.bincount(rank).tolist()
    return Chunks(token, real, place, order, torch.argsort(order), active)


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


def block_size(chunk: int, heads: int, numbers: int = 2**18) -> int:
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs `[T, h, dv]`, last states `[R, h, dk, dv]`, and for a backward pass, of every chunk: the state that it
    begins with `[M · h, dk, dv]`, its transition `[M · h, dk, dk]` and reader `[M · h, C, dk]`."""
    heads, dk, dv, size = k.size(1), k.size(2), v.size(2), chunks.token.size(1)
    count, requests = chunks.token.size(0), chunks.order.numel()
    if state is None:
        state = torch.zeros([requests, heads, dk, dv], dtype=k.dtype, device=k.device)
    if count == 0:
        return v, state, v, v, v
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
            decays = decays_of((log_decay.flatten()[rows].view(-1, heads, size) * real).flatten(0, 1))
        of_block = terms(
            q.index_select(0, rows).view(-1, size, dk),
            k.index_select(0, rows).view(-1, size, dk),
            v.index_select(0, rows).view(-1, size, dv),
            (erase.flatten()[rows].view(-1, heads, size) * real).view(-1, size, 1),
            (write.flatten()[rows].view(-1, heads, size) * real).view(-1, size, 1),
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
    return o, last.view(requests, heads, dk, dv)[chunks.rank], before, transitions, torch.cat(reader)


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
