"""Causal pointwise attention: SiLU of the logits in place of softmax, so that weights need not sum to one.

From HSTU (Zhai et al. 2024): o_t = Σ_{s ≤ t} silu(q_t · k_s + b(t, s)) v_s / n. The bias b is learned, of how many
tokens and of how much time lie between two tokens, and shared by the heads; logits are not scaled by √d. n is the
number of tokens seen, t + 1: unlike the length of a batch's longest sequence, which public code divides by, it depends
on nothing but the token's past.

Work is Σ L². Chunks of queries meet the keys up to their own, and are computed again in the backward pass, so that
memory is O(T · chunk).
"""

import torch
from torch import Tensor
from torch.nn.functional import silu
from torch.utils.checkpoint import checkpoint

from ranker.ops.jagged import log_bucket
from ranker.ops.length_groups import in_group, length_groups, out_of_groups
from ranker.ops.padded import exporting, in_places, out_of_places, padded_rows, widest


def naive_pointwise_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, second: Tensor, between: Tensor, elapsed: Tensor, chunk: int = 0
) -> Tensor:
    """The definition, token by token: see :func:`pointwise_attention`. `chunk` is not looked at."""
    out: list[Tensor] = []
    for r in range(offsets.numel() - 1):
        first = int(offsets[r])
        for t in range(first, int(offsets[r + 1])):
            seen = torch.arange(first, t + 1, device=q.device)
            bias = between[(t - seen).clamp(max=between.numel() - 1)]
            bias = bias + elapsed[log_bucket(second[t] - second[seen], elapsed.numel())]
            weight = silu(torch.einsum("hd,lhd->hl", q[t], k[seen]) + bias) / seen.numel()
            out.append(torch.einsum("hl,lhd->hd", weight, v[seen]))
    return torch.stack(out) if out else v


def pointwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    second: Tensor,
    between: Tensor,
    elapsed: Tensor,
    chunk: int = 128,
) -> Tensor:
    """Each token attends to the tokens of its sequence up to itself.

    Args:
        q, k: `[T, h, d]`; v: `[T, h, dv]`; offsets: `[R + 1]`, sequences that have all tokens.
        second: `[T]` int64, the tokens' times in seconds, ascending in every sequence.
        between: `[p]` bias of a token 0, 1, … places back; the last of all that are farther.
        elapsed: `[b]` bias by :func:`~ranker.ops.jagged.log_bucket` of the seconds between two tokens.
        chunk: queries at once; the result does not depend on it.

    Returns:
        `[T, h, dv]`.
    """
    if not torch.jit.is_scripting() and exporting():
        return _padded(q, k, v, offsets, second, between, elapsed)
    groups = length_groups(offsets, 1 << 15)  # so many tokens side by side
    if len(groups) == 0:
        return v + 0 * (q.sum() + k.sum() + between.sum() + elapsed.sum())
    out: list[Tensor] = []
    for group in groups:
        longest = group.row.size(1)
        queries, keys, values = in_group(q, group), in_group(k, group), in_group(v, group)
        at = second[group.row]
        at = (at - at[:, :1]).int()  # 68 years fit
        found: list[Tensor] = []
        for first in range(0, longest, chunk):
            end = min(first + chunk, longest)
            now, past, of_past = queries[:, :, first:end], keys[:, :, :end], values[:, :, :end]
            if torch.jit.is_scripting():
                found.append(_attend(now, past, of_past, at[:, :end], between, elapsed))
            else:
                found.append(_recomputed(now, past, of_past, at[:, :end], between, elapsed))
        out.append(torch.cat(found, 2))
    return out_of_groups(out, groups)


@torch.jit.unused
def _padded(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, second: Tensor, between: Tensor, elapsed: Tensor
) -> Tensor:
    """All sequences side by side; padding comes after a sequence's tokens, which do not see it."""
    start, end = offsets[:-1], offsets[1:]
    row = padded_rows(start, end, widest(end - start), q.size(0))
    at = in_places(second, row)
    parts = [in_places(x, row).transpose(1, 2) for x in (q, k, v)]
    found = _attend(parts[0], parts[1], parts[2], (at - at[:, :1]).int(), between, elapsed)
    return out_of_places(found.transpose(1, 2), offsets, q.size(0))


@torch.jit.unused
def _recomputed(q: Tensor, k: Tensor, v: Tensor, at: Tensor, between: Tensor, elapsed: Tensor) -> Tensor:
    """:func:`_attend`, of which nothing is kept for the backward pass."""
    if not torch.is_grad_enabled():
        return _attend(q, k, v, at, between, elapsed)
    found = checkpoint(_attend, q, k, v, at, between, elapsed, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(found, Tensor)
    return found


def _attend(q: Tensor, k: Tensor, v: Tensor, at: Tensor, between: Tensor, elapsed: Tensor) -> Tensor:
    """The last C tokens' queries `[g, h, C, d]` over all K tokens `[g, h, K, d]`, whose seconds are `at` `[g, K]`."""
    first, end = k.size(2) - q.size(2), k.size(2)
    place = torch.arange(end, device=q.device)
    back = place[first:].unsqueeze(1) - place  # [C, K], negative for tokens to come
    bucket = _whole_log_bucket(at[:, first:].unsqueeze(2) - at.unsqueeze(1), elapsed.numel())
    bias = elapsed.index_select(0, bucket.flatten()).view(bucket.size())
    bias = bias + between[back.clamp(0, between.numel() - 1)]
    weight = silu(torch.matmul(q, k.transpose(2, 3)) + bias.unsqueeze(1))
    seen = (back >= 0).to(q.dtype) / (place[first:] + 1).unsqueeze(1)
    return torch.matmul(weight * seen, v)


def _whole_log_bucket(gap: Tensor, buckets: int) -> Tensor:
    """:func:`~ranker.ops.jagged.log_bucket` of int32 gaps, as a float's exponent; beyond 2^24, where float32
    rounds integers, a gap just below a power of two may count as that power."""
    _, exponent = torch.frexp(gap.float())
    return exponent.clamp(0, buckets - 1)
