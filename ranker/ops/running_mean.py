"""Running means of jagged sequences: after every token, as one batched product, and after some.

Tokens are cut into blocks of B whatever sequences they belong to. Within a block the mean up to each token is a product
with a `[B, B]` matrix of weights; what a sequence brings from earlier blocks is a scan over T / B sums, kept in float64
so that nothing is lost over long histories. The weights depend only on the offsets: one plan serves many layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import segment_sum, segments_of
from ranker.ops.padded import exporting


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
    if not torch.jit.is_scripting() and exporting():
        return _traced_plan(offsets, segments_of(offsets, like.size(0)), like)
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
    if not torch.jit.is_scripting() and exporting():
        running = torch.nn.functional.pad(torch.cumsum(x.double(), 0), [0, 0, 1, 0])
        return ((running[1:] - running.index_select(0, plan.begin)) * plan.carried.squeeze(1)).to(x.dtype)
    if blocks == 0:
        return x
    blocked = torch.nn.functional.pad(x, [0, 0, 0, blocks * block - x.size(0)]).view(blocks, block, x.size(1))
    sums = torch.bmm(plan.open, blocked).squeeze(1).double()
    before = torch.cumsum(sums, 0) - sums
    carry = (before - before[plan.begin]).to(x.dtype).unsqueeze(1)  # of the block's first sequence
    return torch.baddbmm(plan.carried * carry, plan.weight, blocked).view(-1, x.size(1))[: x.size(0)]


def mean_up_to(x: Tensor, first: Tensor, end: Tensor) -> Tensor:
    """Mean of the tokens ``first[r] : end[r]`` of R beginnings of sequences: `[T, d]` to `[R, d]`, 0 for no token.

    The longest beginning of a sequence is all of it, and sequences have all T tokens: so that these fall into the
    stretches between one end and the next, which are summed once, and a scan over R sums does the rest.
    """
    ends = torch.sort(end)[0]
    stretch = torch.searchsorted(ends, torch.arange(x.size(0), device=x.device), right=True)
    sums = torch.cumsum(segment_sum(x, stretch, end.numel()).double(), 0)
    before = torch.nn.functional.pad(sums, [0, 0, 1, 0])  # [i]: the sum of all tokens before the i-th end
    total = before[torch.searchsorted(ends, end, right=True)] - before[torch.searchsorted(ends, first, right=True)]
    return (total / (end - first).clamp(min=1).unsqueeze(1)).to(x.dtype)


@torch.jit.unused
def _traced_plan(offsets: Tensor, segment: Tensor, like: Tensor) -> RunningMeanPlan:
    """Blocks of one token, for a traced graph: means are differences of one running sum over all tokens."""
    first = offsets.index_select(0, segment)
    count = torch.arange(segment.numel(), device=offsets.device) - first + 1
    ones = torch.ones([1, 1, 1], dtype=like.dtype, device=like.device)
    return RunningMeanPlan(ones, count.double().reciprocal().view(-1, 1, 1), ones, first)
