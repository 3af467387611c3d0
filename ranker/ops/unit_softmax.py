"""Softmax attention within units of queries and events, up to the sums that a tile's units are merged by.

In training on a CPU the backward pass is written by hand: it needs the weights alone of all that is as large as them,
makes one array of their size where autograd makes three, and adds the gradient of values that are keys into that of the
keys.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ranker.ops.padded import exporting


class UnitSums(NamedTuple):
    """top, total: `[units, width]`, greatest logit and sum of e^(logit − top); summed: `[units, width, dv]`, values
    weighted by e^(logit − top)."""

    top: Tensor
    total: Tensor
    summed: Tensor


def unit_softmax(
    q: Tensor, k: Tensor, v: Tensor, offset: Tensor | None = None, hidden: Tensor | None = None
) -> UnitSums:
    """Attention of every unit's queries to its events.

    Args:
        q: `[units, d, width]`, scaled. k: `[units, chunk, d]`; v: `[units, chunk, dv]`, or k itself.
        offset: added to the logits `[units, chunk, width]`, or `[units, chunk, 1]` for all queries of a unit.
        hidden: `[units, chunk, width]` bool: weighs 0.
    """
    if not torch.jit.is_scripting() and not exporting() and _by_hand(q, k, v):
        return _unit_softmax(q, k, v, offset, hidden)
    logits = _logits(q, k, offset, hidden)
    top = _top(logits.detach())
    weight = logits.sub_(top.unsqueeze(1)).exp_()  # in place where autograd allows: the cost is memory traffic
    return UnitSums(top, weight.sum(1), torch.bmm(weight.transpose(1, 2), v))


def _logits(q: Tensor, k: Tensor, offset: Tensor | None, hidden: Tensor | None) -> Tensor:
    logits = torch.bmm(k, q)
    if offset is not None:
        logits = logits.add_(offset)
    return logits if hidden is None else logits.masked_fill_(hidden, float("-inf"))


def _top(logits: Tensor) -> Tensor:
    """Finite, that a unit hidden as a whole weighs 0."""
    return logits.amax(1).clamp(min=-1e30)


@torch.jit.unused
def _by_hand(q: Tensor, k: Tensor, v: Tensor) -> bool:
    numbers = k.dtype == torch.float32 or k.dtype == torch.float64
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return wanted and numbers and k.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


@torch.jit.unused
def _unit_softmax(q: Tensor, k: Tensor, v: Tensor, offset: Tensor | None, hidden: Tensor | None) -> UnitSums:
    top, total, summed = _UnitSoftmax.apply(q, k, None if v is k else v, offset, hidden)  # pyright: ignore
    return UnitSums(top, total, summed)


class _UnitSoftmax(torch.autograd.Function):
    """Keeps queries, keys, values and weights."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor | None, offset: Tensor | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight = _logits(q, k, offset, hidden)
        top = _top(weight)
        weight.sub_(top.unsqueeze(1)).exp_()
        ctx.save_for_backward(q, k, v, weight)
        ctx.shape = None if offset is None else offset.shape
        ctx.mark_non_differentiable(top)
        return top, weight.sum(1), torch.bmm(weight.transpose(1, 2), k if v is None else v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, weight = ctx.saved_tensors
        of_total, of_summed = gradients[1], gradients[2]
        of_q, of_k, of_v, of_offset, _ = ctx.needs_input_grad
        dv = torch.bmm(weight, of_summed) if of_v or (v is None and of_k) else None
        values = k if v is None else v
        # of the weights, then of the logits; what is hidden weighs 0
        d = torch.bmm(values, of_summed.transpose(1, 2)).add_(of_total.unsqueeze(1)).mul_(weight)
        dq = torch.bmm(k.transpose(1, 2), d) if of_q else None
        dk: Tensor | None = None
        if of_k:
            dk = torch.bmm(d, q.transpose(1, 2)) if v is not None or dv is None else dv.baddbmm_(d, q.transpose(1, 2))
        return dq, dk, None if v is None else dv, d.sum_to_size(ctx.shape) if of_offset else None, None
