"""Sums of the events that share a query's bucket, for queries too few for sums of every bucket to pay.

:func:`ranker.ops.groups.group_sums` sums all buckets of a window, and any number of queries look theirs up. A query or
two ask for a small part of that: here each has its own memberships, of the events of its window in its own buckets, and
products with the events. Requests with nearly the same window share a tile, so that their events are gathered once;
memberships are made and used block by block. What stays in memory is some 20 bytes a pair of query and event.
"""

from typing import Any

import torch
from torch import Tensor

from ranker.ops.jagged import offsets_of, segments_of
from ranker.ops.units import in_units, out_of_units, shared_windows, sizes_of, units_of

BLOCK = 1 << 18
"""memberships at a time on a CPU, 1 MiB in float32, which stay in its cache"""


def naive_bucket_sums(
    x: Tensor, bucket: Tensor, weight: Tensor, start: Tensor, end: Tensor, asked: Tensor, q_offsets: Tensor
) -> Tensor:
    """The definition: see :func:`bucket_sums`."""
    out = torch.zeros([asked.size(0), asked.size(1), x.size(1)], dtype=x.dtype, device=x.device)
    first_pair = offsets_of(end - start)
    for n, r in enumerate(segments_of(q_offsets).tolist()):
        for i in range(int(start[r]), int(end[r])):
            for h in range(asked.size(1)):
                if int(bucket[i, h]) == int(asked[n, h]):
                    out[n, h] += weight[int(first_pair[r]) + i - int(start[r])] * x[i]
    return out


def bucket_sums(
    x: Tensor, bucket: Tensor, weight: Tensor, start: Tensor, end: Tensor, asked: Tensor, q_offsets: Tensor
) -> Tensor:
    """Weighted sums of the events of each query's window that are in its buckets. Not scriptable.

    Args:
        x: `[T, d]` events. Windows may overlap.
        bucket: `[T, H]` int64, the bucket of each event under H hashes, below 2^24.
        weight: `[P]` of each pair (request, event).
        start, end: `[R]` int64.
        asked: `[N, H]` int64, the buckets of each query.
        q_offsets: `[R + 1]` int64, the queries of request r are ``q_offsets[r] : q_offsets[r + 1]``.

    Returns:
        `[N, H, d]`: Σ weight x over the events in the query's bucket, zero where there is none.
    """
    shared = shared_windows(q_offsets, start, end)
    width, chunk = sizes_of(shared.q_offsets, shared.start, shared.end)
    plan = units_of(shared.q_offsets, shared.start, shared.end, width, chunk)
    within = plan.within.unsqueeze(1)  # [units, 1, chunk], counted from the start of the tile's window
    first_pair = offsets_of(end - start)[:-1].index_select(0, segments_of(q_offsets))
    seen = plan.real_key.unsqueeze(1)
    if shared.low.numel() > 0:
        first_pair = first_pair - shared.low
        low, high = in_units(shared.low, plan).transpose(1, 2), in_units(shared.high, plan).transpose(1, 2)
        seen = seen & (within >= low) & (within < high)
    pair = (in_units(first_pair, plan).transpose(1, 2) + within).masked_fill_(~seen, 0)  # [units, width, chunk]
    of_pair = weight.index_select(0, pair.flatten()).view(pair.shape).masked_fill(~seen, 0.0)
    event = shared.start.index_select(0, plan.request).unsqueeze(1) + plan.within
    tile = asked.index_select(0, plan.row.flatten()).view(plan.row.size(0), width, asked.size(1))
    with torch.autocast(x.device.type, enabled=False):
        out = _BucketSums.apply(x, bucket.to(x.dtype), of_pair.to(x.dtype), event, tile.to(x.dtype), plan.tile)
    return out_of_units(out, plan, q_offsets, asked.size(0))  # pyright: ignore[reportArgumentType]


class _BucketSums(torch.autograd.Function):
    """x `[T, d]`, bucket `[T, H]`, weight `[units, width, chunk]`, event `[units, chunk]`, asked `[tiles, width, H]`,
    the tile of each unit `[units]`: `[tiles, width, H, d]`. Keeps its inputs; memberships are made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bucket: Tensor, weight: Tensor, event: Tensor, asked: Tensor, tile: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, bucket, weight, event, asked, tile)
        out = x.new_zeros([asked.size(0), asked.size(1) * asked.size(2), x.size(1)])
        for part in _parts(event, asked):
            events = x.index_select(0, event[part].flatten()).view(*event[part].shape, x.size(1))
            member = _members(bucket, event[part], asked, tile[part]).mul_(weight[part].unsqueeze(2))
            out.index_add_(0, tile[part], torch.bmm(member.flatten(1, 2), events))
        return out.view(*asked.shape, x.size(1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, bucket, weight, event, asked, tile = ctx.saved_tensors
        grad = gradients[0].flatten(1, 2)
        grad_x, grad_weight = torch.zeros_like(x), torch.empty_like(weight)
        for part in _parts(event, asked):
            events = x.index_select(0, event[part].flatten()).view(*event[part].shape, x.size(1))
            member = _members(bucket, event[part], asked, tile[part])
            of_tile = grad.index_select(0, tile[part])
            inner = torch.bmm(of_tile, events.mT).view_as(member)
            grad_weight[part] = inner.mul_(member).sum(2)
            member.mul_(weight[part].unsqueeze(2))
            grad_x.index_add_(0, event[part].flatten(), torch.bmm(member.flatten(1, 2).mT, of_tile).flatten(0, 1))
        return grad_x, None, grad_weight, None, None, None


def _members(bucket: Tensor, event: Tensor, asked: Tensor, tile: Tensor) -> Tensor:
    """1 where an event is in a query's bucket `[n, width, H, chunk]`, else 0, of n units."""
    of_event = bucket.index_select(0, event.flatten()).view(*event.shape, bucket.size(1)).mT.contiguous().unsqueeze(1)
    of_query = asked.index_select(0, tile).unsqueeze(3)
    member = bucket.new_empty([event.size(0), asked.size(1), asked.size(2), event.size(1)])
    # into floats, which take a tenth of the time that booleans take on a CPU
    return torch.eq(of_event, of_query, out=member)


def _parts(event: Tensor, asked: Tensor) -> list[slice]:
    """Units at a time; a GPU's have memberships of 256 MiB."""
    numbers = BLOCK if event.device.type == "cpu" else (1 << 26)
    size = max(numbers // (event.size(1) * asked.size(1) * asked.size(2)), 1)
    return [slice(a, a + size) for a in range(0, event.size(0), size)]
