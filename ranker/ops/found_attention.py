"""Softmax attention of candidates to the few events that a search found for each: O(N · K), whatever the histories."""

import math

import torch
from torch import Tensor


def take_found(x: Tensor, event: Tensor) -> Tensor:
    """Rows `[..., *]` of `x` `[T, *]` at `event` `[...]`; where that is −1, any row's or zeros."""
    if x.size(0) == 0:
        x = torch.cat([x, torch.zeros([1] + list(x.shape[1:]), dtype=x.dtype, device=x.device)])  # noqa: RUF005
    return x.index_select(0, event.clamp(min=0).flatten()).view(list(event.shape) + list(x.shape[1:]))


def found_attention(q: Tensor, kv: Tensor, event: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v over the events of each candidate.

    Args:
        q: `[N, h, d]`.
        kv: `[T, h, d + dv]` keys and values side by side, which are gathered in one go.
        event: `[N, h, K]` int64, each head's own, or `[N, 1, K]`, all heads'; −1 for none.
        bias: `[N, h, K]`.

    Returns:
        `[N, h, dv]`; zero where none was found.
    """
    heads = q.size(1)
    head = torch.arange(heads, device=q.device).unsqueeze(1)
    row = torch.where(event >= 0, event * heads + head, event)  # [N, h, K]: rows of a head lie together
    return attend(q, take_found(kv.flatten(0, 1), row), event >= 0, bias)


def attend(q: Tensor, kv: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same of gathered keys and values `[N, h, K, d + dv]`, where `seen` `[N, h or 1, K]` bool."""
    d = q.size(2)
    k, v = torch.split(kv, [d, kv.size(3) - d], 3)
    logits = torch.matmul(k, (q / math.sqrt(d)).unsqueeze(3)).squeeze(3)
    if bias is not None:
        logits = logits + bias
    # a finite least logit, and weights set to zero: softmax over nothing would have no gradient but NaN
    weight = torch.softmax(logits.masked_fill(~seen, -1e30), 2).masked_fill(~seen, 0.0)
    return torch.matmul(weight.unsqueeze(2), v).squeeze(2)
