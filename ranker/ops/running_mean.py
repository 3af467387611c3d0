"""Running means of jagged sequences, as one batched product.

Tokens are cut into blocks of B whatever sequences they belong to. Within a block the mean up to each token is a product
with a `[B, B]` matrix of weights; what a sequence brings from earlier blocks is a scan over T / B sums, kept in float64
so that nothing is lost over long histories. The weights depend only on the offsets: one plan serves many layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import segments_of


class RunningMeanPlan(NamedTuple):
    """Blocks of T tokens, M of them.

    weight: `[M, B, B]`, 1 / count of token i where token j is of its sequence and not later.
    carried: `[M, B, 1]`, 1 / count of the tokens whose sequence began in an earlier block.
    open: `[M, 1, B]`, 1 for the tokens of the block's last sequence.
    begin: `[M]` int64, the block in which the sequence of the block's first token begins.
    """

    weight: Tensor
    carried: Tensor
    open: Tensor
    begin: Tensor


def running_mean_plan(offsets: Tensor, like: Tensor, block: int = 32) -> RunningMeanPlan:
    """A plan for the sequences ``offsets[r] : offsets[r + 1]``, which have all tokens, in the type of `like`."""
    segment = segments_of(offsets)
    tokens = segment.numel()
    blocks = (tokens + block - 1) // block
    # padding is of a sequence of its own, which begins where the tokens end
    first = torch.full([blocks * block], tokens, dtype=torch.int64, device=offsets.device)
    first[:tokens] = offsets[:-1][segment]
    token = torch.arange(blocks * block, device=offsets.device)
    inverse = ((token - first + 1).to(like.dtype).reciprocal()).view(blocks, block, 1)
    first = first.view(blocks, block)
    seen = (first.unsqueeze(2) == first.unsqueeze(1)).tril()
    start = torch.arange(blocks, device=offsets.device).unsqueeze(1) * block
    return RunningMeanPlan(
        seen * inverse,
        (first < start).unsqueeze(2) * inverse,
        (first == first[:, -1:]).unsqueeze(1).to(like.dtype),
        torch.div(first[:, 0], block, rounding_mode="floor"),
    )


def running_mean(x: Tensor, plan: RunningMeanPlan) -> Tensor:
    """Mean of the tokens of its sequence up to each token, itself included: `[T, d]` to `[T, d]`."""
    blocks, block = plan.weight.size(0), plan.weight.size(1)
    if blocks == 0:
        return x
    blocked = torch.nn.functional.pad(x, [0, 0, 0, blocks * block - x.size(0)]).view(blocks, block, x.size(1))
    sums = torch.bmm(plan.open, blocked).squeeze(1).double()
    before = torch.cumsum(sums, 0) - sums
    carry = (before - before[plan.begin]).to(x.dtype).unsqueeze(1)  # of the block's first sequence
    return torch.baddbmm(plan.carried * carry, plan.weight, blocked).view(-1, x.size(1))[: x.size(0)]
