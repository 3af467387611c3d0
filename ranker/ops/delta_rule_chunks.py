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

The scan takes all chunks of one rank at a time, which :mod:`ranker.ops.chunks` has put beside each other. States in
the midst of chunks: :mod:`ranker.ops.delta_rule_stops`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.chunks import Chunks, chunks_of, rows_back, rows_of
from ranker.ops.delta_rule_stops import Stops, Within, part_terms, stops_of


class Writes(NamedTuple):
    """What T tokens ask of the state, and do to it.

    q, k: `[T, h, dk]`; keys (and, for bounded outputs, queries) L2-normalised by the caller. v: `[T, h, dv]`.
    erase, write: `[T, h]` a_t and b_t, in [0, 1].
    log_decay: `[T, h]` g_t ≤ 0, or None for no decay.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    erase: Tensor
    write: Tensor
    log_decay: Tensor | None


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


class Terms(NamedTuple):
    """What B chunks do to any state: ``o = own + reader · S`` and ``S ← transition · S + addition``.

    reader: `[B, C, dk]`; own: `[B, C, dv]`; transition: `[B, dk, dk]`; addition: `[B, dk, dv]`; wu: `[B, C, dk + dv]`,
    W and U.
    """

    reader: Tensor
    own: Tensor
    transition: Tensor
    addition: Tensor
    wu: Tensor


def terms(q: Tensor, k: Tensor, v: Tensor, erase: Tensor, write: Tensor, decays: Within | None) -> Terms:
    """Of q, k: `[B, C, dk]`; v: `[B, C, dv]`; erase, write: `[B, C, 1]`."""
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
    wu = solve(a, torch.cat([-erased, write * v], 2))
    read = torch.bmm(p, wu)
    step = torch.bmm(until.transpose(1, 2), wu)
    return Terms(kept + read[:, :, :dk], read[:, :, dk:], whole + step[:, :, :dk], step[:, :, dk : dk + dv], wu)


def chunked_delta_rule(
    writes: Writes, offsets: Tensor, chunk: int = 32, state: Tensor | None = None, at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`ranker.ops.delta_rule.delta_rule`. Scriptable; autograd keeps everything that the forward computes."""
    chunks = chunks_of(offsets, chunk)
    stops: Stops | None = None
    if at is not None:
        stops = stops_of(at, chunks, block_size(chunk, writes.k.size(1)))
    heads, dk, dv, size = writes.k.size(1), writes.k.size(2), writes.v.size(2), chunks.token.size(1)
    count, requests = chunks.token.size(0), chunks.order.numel()
    if state is None:
        state = torch.zeros([requests, heads, dk, dv], dtype=writes.k.dtype, device=writes.k.device)
    none = torch.zeros([0, dk, dk], dtype=state.dtype, device=state.device)
    if count == 0:
        v = writes.v
        return v, state if stops is None else state[:0]
    q, k, v = writes.q.flatten(0, 1), writes.k.flatten(0, 1), writes.v.flatten(0, 1)
    log_decay = writes.log_decay
    reader: list[Tensor] = []
    own: list[Tensor] = []
    transition: list[Tensor] = []
    addition: list[Tensor] = []
    to_stop: list[Tensor] = [none]
    at_stop: list[Tensor] = [torch.zeros([0, dk, dv], dtype=state.dtype, device=state.device)]
    step = block_size(size, heads)
    for first in range(0, count, step):
        end = min(first + step, count)
        rows = rows_of(chunks, first, end, heads)
        real = chunks.real[first:end].unsqueeze(1)
        decays: Within | None = None
        if log_decay is not None:
            decays = decays_of((log_decay.flatten().index_select(0, rows).view(-1, heads, size) * real).flatten(0, 1))
        keys = k.index_select(0, rows).view(-1, size, dk)
        of_block = terms(
            q.index_select(0, rows).view(-1, size, dk),
            keys,
            v.index_select(0, rows).view(-1, size, dv),
            (writes.erase.flatten().index_select(0, rows).view(-1, heads, size) * real).view(-1, size, 1),
            (writes.write.flatten().index_select(0, rows).view(-1, heads, size) * real).view(-1, size, 1),
            decays,
        )
        reader.append(of_block.reader)
        own.append(of_block.own)
        transition.append(of_block.transition)
        addition.append(of_block.addition)
        if stops is not None:
            part_transition, part_addition = part_terms(keys, of_block.wu, decays, stops, first, heads)
            to_stop.append(part_transition)
            at_stop.append(part_addition)
    transitions, to_stops = torch.cat(transition), torch.cat(to_stop)
    before, last = _scan(transitions, torch.cat(addition), state[chunks.order].flatten(0, 1), chunks, heads)
    out: list[Tensor] = []
    for i in range(len(own)):
        begin = before[i * step * heads : (i + 1) * step * heads]
        out.append(torch.baddbmm(own[i], reader[i], begin))
    o = torch.cat(out).view(-1, dv).index_select(0, rows_back(chunks, heads)).view(-1, heads, dv)
    if stops is None:
        states = last.view(requests, heads, dk, dv)[chunks.rank]
    else:
        begin = before.view(-1, heads, dk, dv).index_select(0, stops.chunk).flatten(0, 1)
        states = torch.baddbmm(torch.cat(at_stop), to_stops, begin).view(-1, heads, dk, dv)[stops.rank]
    return o, states


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
