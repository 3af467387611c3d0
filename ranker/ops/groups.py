"""Windows of events divided into groups: sums by group, and the nearest of a request's centres.

What is per pair (request, event) is held in numbers; events themselves are gathered block by block, so that memory
beside inputs and outputs is constant. The backward pass of the sums keeps nothing but the inputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ranker.ops.jagged import expand_windows, offsets_of
from ranker.ops.padded import exporting, in_places, out_of_places, padded_rows, widest
from ranker.ops.units import Units, units_of


def naive_group_sums(x: Tensor, group: Tensor, weight: Tensor, start: Tensor, end: Tensor, groups: int) -> Tensor:
    """The definition: see :func:`group_sums`."""
    out = torch.zeros([start.numel(), group.size(1), groups, weight.size(1), x.size(1)], dtype=x.dtype, device=x.device)
    pair = 0
    for r in range(start.numel()):
        for i in range(int(start[r]), int(end[r])):
            for h in range(group.size(1)):
                out[r, h, int(group[pair, h])] += weight[pair].unsqueeze(1) * x[i]
            pair += 1
    return out


def group_sums(x: Tensor, group: Tensor, weight: Tensor, start: Tensor, end: Tensor, groups: int) -> Tensor:
    """Weighted sums of the events of each window, by group.

    Args:
        x: `[T, d]` events. Windows may overlap.
        group: `[P, H]`, any integer type: the group of each pair (request, event), in H ways to divide them.
        weight: `[P, c]`, c weights of each pair.
        start, end: `[R]` int64.
        groups: G, of each way.

    Returns:
        `[R, H, G, c, d]`: Σ weight x over the events of each group, zero for one without events.
    """
    if torch.jit.is_scripting():
        return _sums(x, group, weight, start, end, groups)
    if exporting():
        return _traced_sums(x, group, weight, start, end, groups)
    return _group_sums(x, group, weight, start, end, groups)


@torch.jit.unused
def _group_sums(x: Tensor, group: Tensor, weight: Tensor, start: Tensor, end: Tensor, groups: int) -> Tensor:
    """Sums over thousands of events are float32 under autocast too."""
    if torch.is_autocast_enabled(x.device.type):
        x, weight = x.float(), weight.float()
    with torch.autocast(x.device.type, enabled=False):
        return _GroupSums.apply(x, group, weight, start, end, groups)  # pyright: ignore[reportReturnType]


def nearest_group(x: Tensor, start: Tensor, end: Tensor, centre: Tensor, taken: Tensor) -> Tensor:
    """The nearest centre of its request to each event of a window, by Euclidean distance. No gradients.

    Args:
        x: `[T, d]`; start, end: `[R]` int64; centre: `[R, K, d]`; taken: `[R, K]` bool, the centres that there are.

    Returns:
        `[P]` int64.
    """
    x, centre = x.detach(), centre.detach()
    if torch.jit.is_scripting():
        return _nearest(x, start, end, centre, taken)
    if exporting():
        return _padded_nearest(x, start, end, centre, taken)
    return _nearest_group(x, start, end, centre, taken)


@torch.jit.unused
def _nearest_group(x: Tensor, start: Tensor, end: Tensor, centre: Tensor, taken: Tensor) -> Tensor:
    """Differences of near numbers are float32 under autocast too: an exported model groups as the trained one."""
    if torch.is_autocast_enabled(x.device.type):
        x, centre = x.float(), centre.float()
    with torch.autocast(x.device.type, enabled=False):
        return _nearest(x, start, end, centre, taken)


def _nearest(x: Tensor, start: Tensor, end: Tensor, centre: Tensor, taken: Tensor) -> Tensor:
    plan, first_pair = _plan(start, end), offsets_of(end - start)
    nearest = torch.zeros([int(first_pair[-1])], dtype=torch.int64, device=x.device)
    bias = -centre.square().sum(2)  # −‖x − c‖² = 2 x·c − ‖c‖² − ‖x‖²
    bias = bias.masked_fill(~taken, float("-inf")).unsqueeze(1)
    size = _block(plan, centre.size(1))
    for a in range(0, plan.tile.numel(), size):
        request, within, real = plan.request[a : a + size], plan.within[a : a + size], plan.real_key[a : a + size]
        event = start.index_select(0, request).unsqueeze(1) + within
        events = x.index_select(0, event.flatten()).view(event.size(0), event.size(1), x.size(1))
        near = torch.bmm(events, centre.index_select(0, request).transpose(1, 2))
        near = near.mul_(2).add_(bias.index_select(0, request))
        pair = first_pair.index_select(0, request).unsqueeze(1) + within
        nearest[pair[real]] = near.argmax(2)[real]
    return nearest


@torch.jit.unused
def _traced_sums(x: Tensor, group: Tensor, weight: Tensor, start: Tensor, end: Tensor, groups: int) -> Tensor:
    """All pairs at once."""
    event, request = expand_windows(start, end)
    requests, ways, weights, d = start.numel(), group.size(1), weight.size(1), x.size(1)
    weighted = (weight.unsqueeze(2) * x.index_select(0, event).unsqueeze(1)).flatten(1)
    out = torch.zeros([requests * ways * groups, weights * d], dtype=x.dtype, device=x.device)
    for way in range(ways):
        out = out.index_add(0, (request * ways + way) * groups + group[:, way].long(), weighted)
    return out.view(requests, ways, groups, weights, d)


@torch.jit.unused
def _padded_nearest(x: Tensor, start: Tensor, end: Tensor, centre: Tensor, taken: Tensor) -> Tensor:
    """All windows side by side."""
    event, _ = expand_windows(start, end)
    places = in_places(x, padded_rows(start, end, widest(end - start), x.size(0)))
    bias = (-centre.square().sum(2)).masked_fill(~taken, float("-inf")).unsqueeze(1)
    nearest = (2 * torch.bmm(places, centre.transpose(1, 2)) + bias).argmax(2)
    return out_of_places(nearest, offsets_of(end - start), event.numel())


class _GroupSums(torch.autograd.Function):
    """A pair's gradient is the sum of its groups' gradients: a bag of H rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Tensor, weight: Tensor, start: Tensor, end: Tensor, groups: int) -> Tensor:
        ctx.save_for_backward(x, group, weight, start, end)
        return _sums(x, group, weight, start, end, groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, group, weight, start, end = ctx.saved_tensors
        grad = gradients[0]
        ways, groups, weights, d = grad.shape[1:]
        table = grad.reshape(-1, weights * d)
        event, request = expand_windows(start, end)
        first = groups * torch.arange(ways, device=x.device)
        grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
        size = _pairs(x.device, weights * d)
        for a in range(0, event.numel(), size):
            part = slice(a, a + size)
            row = (request[part] * (ways * groups)).unsqueeze(1) + first + group[part].long()
            of_pair = embedding_bag(row, table, mode="sum").view(-1, weights, d)
            events = x.index_select(0, event[part]).unsqueeze(2)
            grad_weight[part] = torch.bmm(of_pair, events).squeeze(2)
            grad_x.index_add_(0, event[part], torch.bmm(weight[part].unsqueeze(1), of_pair).squeeze(1))
        return grad_x, None, grad_weight, None, None, None


def _sums(x: Tensor, group: Tensor, weight: Tensor, start: Tensor, end: Tensor, groups: int) -> Tensor:
    """Products of a chunk's memberships, 0 or 1, with its weighted events; then chunks of a window are added."""
    requests, ways, weights, d = start.numel(), group.size(1), weight.size(1), x.size(1)
    plan, first_pair = _plan(start, end), offsets_of(end - start)
    chunk = plan.within.size(1)
    first = groups * torch.arange(ways, device=x.device)
    out = torch.zeros([requests, ways * groups, weights * d], dtype=x.dtype, device=x.device)
    size = _block(plan, ways * groups)
    for a in range(0, plan.tile.numel(), size):
        request, within = plan.request[a : a + size], plan.within[a : a + size]
        pair = (first_pair.index_select(0, request).unsqueeze(1) + within).flatten()
        event = (start.index_select(0, request).unsqueeze(1) + within).flatten()
        w = weight.index_select(0, pair) * plan.real_key[a : a + size].flatten().unsqueeze(1)
        weighted = w.unsqueeze(2) * x.index_select(0, event).unsqueeze(1)
        member = torch.zeros([request.numel(), chunk, ways * groups], dtype=x.dtype, device=x.device)
        place = group.index_select(0, pair).long() + first
        member = member.scatter(2, place.view(request.numel(), chunk, ways), 1.0)
        summed = torch.bmm(member.transpose(1, 2), weighted.view(request.numel(), chunk, weights * d))
        out = out.index_add_(0, request, summed)
    return out.view(requests, ways, groups, weights, d)


def _plan(start: Tensor, end: Tensor) -> Units:
    """Chunks of 16 to 256 events by the mean window."""
    length = end - start
    events = int(length.sum())
    chunk = 16
    while chunk < 256 and chunk * length.numel() < events:
        chunk *= 2
    return units_of(torch.arange(start.numel() + 1, device=start.device), start, end, 1, chunk)


def _block(plan: Units, groups: int) -> int:
    """Units at a time: memberships of 1 MiB in float32 on a CPU, whose cache they stay in, and of 256 MiB elsewhere."""
    numbers = (1 << 18) if plan.tile.device.type == "cpu" else (1 << 26)
    return max(numbers // (plan.within.size(1) * groups), 1)


def _pairs(device: torch.device, numbers: int) -> int:
    """Pairs at a time in the backward pass, by the same measure."""
    return max(((1 << 18) if device.type == "cpu" else (1 << 26)) // max(numbers, 1), 1)
