"""Sums of outer products over windows: what linear attention needs of a history, whatever the number of its queries.

The windows' ends cut the events into stretches; each is summed once, however many windows hold it, and a window is a
difference of running sums over stretches, kept in float64. Work is T · d · dv, for events that some window holds.
"""

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, segment_sum


def naive_outer_sums(k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The definition: see :func:`outer_sums`."""
    out = torch.zeros([start.numel(), k.size(1), v.size(1)], dtype=k.dtype)
    for r in range(start.numel()):
        for i in range(int(start[r]), int(end[r])):
            out[r] = out[r] + torch.outer(k[i], v[i])
    return out


def outer_sums(k: Tensor, v: Tensor, start: Tensor, end: Tensor, size: int = 64) -> Tensor:
    """Σ k_i v_iᵀ over the events of each window ``[start[r], end[r])``: `[R, d, dv]` of k `[T, d]` and v `[T, dv]`.

    `size`: events multiplied at once.
    """
    requests = start.numel()
    if requests == 0 or k.size(0) == 0:
        return torch.zeros([requests, k.size(1), v.size(1)], dtype=k.dtype, device=k.device) + (k.sum() + v.sum())
    ends, order = torch.sort(torch.cat([start, end]))
    opened = torch.cat([torch.ones_like(start), -torch.ones_like(end)])[order]
    length = torch.diff(ends, append=ends[-1:])
    length = torch.where(torch.cumsum(opened, 0) > 0, length, torch.zeros_like(length))  # stretches in no window

    pieces = (length + (size - 1)) // size
    rank, stretch = expand_windows(torch.zeros_like(pieces), pieces)
    within = rank.unsqueeze(1) * size + torch.arange(size, device=k.device)
    real = within < length[stretch].unsqueeze(1)
    event = (ends[stretch].unsqueeze(1) + within).clamp(max=k.size(0) - 1).flatten()
    k_of = k.index_select(0, event).view(-1, size, k.size(1)) * real.unsqueeze(2)
    v_of = v.index_select(0, event).view(-1, size, v.size(1))
    summed = segment_sum(torch.bmm(k_of.transpose(1, 2), v_of), stretch, 2 * requests)

    running = torch.cumsum(summed.double(), 0)
    before = torch.nn.functional.pad(running, [0, 0, 0, 0, 1, 0])  # [j]: of the stretches before the j-th end
    place = torch.searchsorted(ends, torch.stack([start, end]))
    return (before[place[1]] - before[place[0]]).to(k.dtype)
