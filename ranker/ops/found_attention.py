"""Softmax attention of candidates to the few events that a search found for each: O(N · K), whatever the histories."""

import math
from typing import Any

import torch
from torch import Tensor

from ranker.ops.padded import exporting
from ranker.ops.take_rows import take_rows


def take_found(x: Tensor, event: Tensor) -> Tensor:
    """Rows `[..., *]` of `x` `[T, *]` at `event` `[...]`; where that is −1, any row's or zeros."""
    if x.size(0) == 0:
        x = torch.cat([x, torch.zeros([1] + list(x.shape[1:]), dtype=x.dtype, device=x.device)])  # noqa: RUF005
    return take_rows(x, event.clamp(min=0).flatten()).view(list(event.shape) + list(x.shape[1:]))


def found_attention(q: Tensor, kv: Tensor, event: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √d + bias) v over the events of each candidate.

    Args:
        q: `[N, h, d]`.
        kv: `[T, h, d + dv]` keys and values side by side, which are gathered in one go.
        event: `[N, h, K]` int64, each head's own, or `[N, 1, K]`, all heads'; −1 for none.
        bias: `[N, h, K]`, finite.

    Returns:
        `[N, h, dv]`; zero where none was found.
    """
    heads = q.size(1)
    head = torch.arange(heads, device=q.device).unsqueeze(1)
    row = torch.where(event >= 0, event * heads + head, event)  # [N, h, K]: rows of a head lie together
    return attend(q, take_found(kv.flatten(0, 1), row), event >= 0, bias)


def attend(q: Tensor, kv: Tensor, seen: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same of gathered keys and values `[N, h, K, d + dv]`, where `seen` `[N, h or 1, K]` bool."""
    if not torch.jit.is_scripting() and not exporting():
        return _attend(q, kv, seen, bias)
    return _weighted(q, kv, seen, bias)[0]


@torch.jit.unused
def _attend(q: Tensor, kv: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_autocast_enabled(q.device.type):
        return _weighted(q, kv, seen, bias)[0]
    return _Attend.apply(q, kv, seen, bias)  # pyright: ignore[reportReturnType]


def _weighted(q: Tensor, kv: Tensor, seen: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output `[N, h, dv]` and the weights `[N, h, K]`."""
    d = q.size(2)
    k, v = torch.split(kv, [d, kv.size(3) - d], 3)
    # a query as a row: matrix times column takes ten times as long on a CPU
    logits = torch.matmul((q / math.sqrt(d)).unsqueeze(2), k.transpose(2, 3)).squeeze(2)
    if bias is not None:
        logits = logits + bias
    # a finite least logit, and weights set to zero: softmax over nothing would have no gradient but NaN
    weight = torch.softmax(logits.masked_fill(~seen, -1e30), 2).masked_fill(~seen, 0.0)
    return torch.matmul(weight.unsqueeze(2), v).squeeze(2), weight


class _Attend(torch.autograd.Function):
    """The backward pass makes keys' and values' gradients side by side, by products of numbers: as products of
    matrices, those of one query are all overhead."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, seen: Tensor, bias: Tensor | None) -> Tensor:
        out, weight = _weighted(q, kv, seen, bias)
        ctx.save_for_backward(q, kv, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, kv, weight = ctx.saved_tensors
        d, grad = q.size(2), gradients[0]
        k, v = torch.split(kv, [d, kv.size(3) - d], 3)
        of_weight = torch.matmul(grad.unsqueeze(2), v.transpose(2, 3)).squeeze(2)
        of_logit = weight * (of_weight - (weight * of_weight).sum(2, keepdim=True))
        scaled = (of_logit / math.sqrt(d)).unsqueeze(2)
        grad_kv = torch.empty_like(kv)
        torch.mul(scaled.transpose(2, 3), q.unsqueeze(2), out=grad_kv[..., :d])
        torch.mul(weight.unsqueeze(3), grad.unsqueeze(2), out=grad_kv[..., d:])
        of_bias = of_logit if ctx.needs_input_grad[3] else None
        return torch.matmul(scaled, k).squeeze(2), grad_kv, None, of_bias
