"""Attention whose queries and keys take no gradient: soft routing by frozen vectors (HiSAC).

The definition is :func:`ranker.ops.attention.naive_window_attention` with one head. Nothing of size queries × events is
ever held: the backward pass makes the weights again from one number per query, log Σ e^logit. On a CPU each request has
products of its own, over pieces of its window that stay in the cache, in memory that is used again (new memory costs
more than what is written to it); nothing is gathered, padded or merged. Requests too small for that, and GPUs, go tile
by chunk (:mod:`ranker.ops.units`). :func:`window_logsumexp` is that walk for the normaliser alone.
"""

from typing import Any

import torch
from torch import Tensor

from ranker.ops.jagged import segment_sum
from ranker.ops.padded import exporting, in_places, out_of_places, padded_rows, widest
from ranker.ops.units import Units, merge, rescale, units_of


def frozen_attention(
    q: Tensor, q_offsets: Tensor, k: Tensor, bias: Tensor, v: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """softmax(q kᵀ + bias) v over the windows, one head, where only `v` takes a gradient.

    Args:
        q: `[N, d]` queries, already scaled; those of request r in rows ``q_offsets[r] : q_offsets[r + 1]``.
        q_offsets: `[R + 1]` int64.
        k: `[T, d]` keys, bias: `[T]` added to the logits of a key, v: `[T, dv]` values. Windows may overlap.
        start, end: `[R]` int64.

    Returns:
        `[N, dv]`; zero for queries of an empty window. Time follows queries × events, memory queries + events.
    """
    if not torch.jit.is_scripting() and exporting():
        return _padded(q, q_offsets, k, bias, v, start, end)
    q, k = _with_bias(q.detach(), k.detach(), bias.detach(), v.dtype)
    if torch.jit.is_scripting():
        return _forward(q, q_offsets, k, v, start, end)[0]
    return _FrozenAttention.apply(q, q_offsets, k, v, start, end)  # pyright: ignore[reportReturnType]


def window_logsumexp(
    q: Tensor, q_offsets: Tensor, k: Tensor, bias: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """log Σ e^(q kᵀ + bias) over each query's window `[N]`, and the key of its greatest term `[N]`.

    Arguments as in :func:`frozen_attention`. Of equal terms the first; −inf and −1 for an empty window. No gradients.
    """
    if not torch.jit.is_scripting() and exporting():
        return _padded_logsumexp(q, q_offsets, k, bias, start, end)
    q, k = _with_bias(q.detach(), k.detach(), bias.detach(), q.dtype)
    plan = _plan(q_offsets, start, end)
    tile, key = _in_tiles(q, plan), _keys(plan, start, k.size(0) - 1)
    tiles, width = plan.row.size(0), plan.row.size(1)
    top = torch.zeros([plan.tile.numel(), width], dtype=q.dtype, device=q.device)
    total, best = torch.zeros_like(top), torch.zeros([plan.tile.numel(), width], dtype=torch.int64, device=q.device)
    size = _block(plan)
    for a in range(0, plan.tile.numel(), size):
        logits = _logits(tile, k, plan.tile[a : a + size], key[a : a + size])
        greatest, place = logits.max(2)
        top[a : a + size] = greatest
        total[a : a + size] = logits.sub_(greatest.unsqueeze(2)).exp_().sum(2)
        best[a : a + size] = key[a : a + size].gather(1, place)
    index = plan.tile.unsqueeze(1).expand_as(top)
    tile_top, scale = rescale(top, plan.tile, tiles)
    logsumexp = segment_sum(total * scale, plan.tile, tiles).log() + tile_top
    best = best.masked_fill(top < tile_top.index_select(0, plan.tile), k.size(0))
    first = torch.full([tiles, width], k.size(0), dtype=torch.int64, device=q.device)
    first = first.scatter_reduce(0, index, best, "amin")
    return logsumexp[plan.real_row], first.masked_fill(tile_top.isneginf(), -1)[plan.real_row]


@torch.jit.unused
def _padded_logits(
    q: Tensor, q_offsets: Tensor, k: Tensor, bias: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Every request's logits `[R, queries, keys]`, −∞ for padding, and the key at each place `[R, keys]`."""
    first, last = q_offsets[:-1], q_offsets[1:]
    row = padded_rows(first, last, widest(last - first), q.size(0))
    key = padded_rows(start, end, widest(end - start), k.size(0))
    logits = torch.bmm(in_places(q, row), in_places(k, key).transpose(1, 2)) + in_places(bias, key).unsqueeze(1)
    return logits.masked_fill((key == k.size(0)).unsqueeze(1), float("-inf")), key


@torch.jit.unused
def _padded(q: Tensor, q_offsets: Tensor, k: Tensor, bias: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
    logits, key = _padded_logits(q, q_offsets, k, bias, start, end)
    weight = torch.exp(logits - logits.amax(2, keepdim=True).clamp(min=-1e30))
    found = torch.bmm(weight, in_places(v, key)) / weight.sum(2, keepdim=True).clamp(min=1e-30)
    return out_of_places(found, q_offsets, q.size(0))


@torch.jit.unused
def _padded_logsumexp(
    q: Tensor, q_offsets: Tensor, k: Tensor, bias: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    logits, _ = _padded_logits(q, q_offsets, k, bias, start, end)
    best = torch.where((end > start).unsqueeze(1), start.unsqueeze(1) + logits.argmax(2), -1)
    total = torch.logsumexp(logits, 2)
    return out_of_places(total, q_offsets, q.size(0)), out_of_places(best, q_offsets, q.size(0))


class _FrozenAttention(torch.autograd.Function):
    """Keeps one number per query, log Σ e^logit, from which the backward pass makes the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
        out, logsumexp = _forward(q, q_offsets, k, v, start, end)
        ctx.save_for_backward(q, q_offsets, k, start, end, logsumexp)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, q_offsets, k, start, end, logsumexp = ctx.saved_tensors
        # the logits come out less log Σ e^logit, and e^ of them are the weights
        q = torch.cat([q[:, :-1], -logsumexp.unsqueeze(1)], 1)
        if _large(q_offsets, start, end):
            return None, None, None, _backward_of_each(q, q_offsets, k, gradients[0], start, end), None, None
        plan = _plan(q_offsets, start, end)
        tile, key = _in_tiles(q, plan), _keys(plan, start, k.size(0) - 1)
        grad_tile = _in_tiles(gradients[0], plan).masked_fill(~plan.real_row.unsqueeze(2), 0.0)
        grad_v = grad_tile.new_zeros([k.size(0), grad_tile.size(2)])
        size = _block(plan)
        for a in range(0, plan.tile.numel(), size):
            unit_tile, of = plan.tile[a : a + size], key[a : a + size]
            weight = _logits(tile, k, unit_tile, of).exp_()
            summed = torch.bmm(weight.transpose(1, 2), grad_tile.index_select(0, unit_tile))
            grad_v.index_add_(0, of.flatten(), summed.flatten(0, 1))
        return None, None, None, grad_v[:-1], None, None


def _forward(q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """The output `[N, dv]` and log Σ e^logit `[N]`, of queries and keys :func:`_with_bias`."""
    if _large(q_offsets, start, end):
        return _forward_of_each(q, q_offsets, k, v, start, end)
    return _forward_of_units(q, q_offsets, k, v, start, end)


def _large(q_offsets: Tensor, start: Tensor, end: Tensor) -> bool:
    """Whether requests have so many pairs of a query and a key that a product of their own pays: 4,096 on the mean."""
    if start.numel() == 0 or start.device.type != "cpu":
        return False
    return int(((q_offsets[1:] - q_offsets[:-1]) * (end - start)).sum()) >= 4096 * start.numel()


def _piece(queries: int) -> int:
    """Keys at a time: 2^18 pairs, 1 MiB of weights in float32."""
    return max((1 << 18) // max(queries, 1), 16)


def _forward_of_each(
    q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Request by request; pieces of a window are merged as they come, by the rule of online softmax."""
    row: list[int] = q_offsets.tolist()
    first: list[int] = start.tolist()
    stop: list[int] = end.tolist()
    outs, totals, tops = [v[:0]], [q[:0, :1]], [q[:0, :1]]
    memory = torch.empty([0], dtype=q.dtype, device=q.device)
    for r in range(len(first)):
        n = row[r + 1] - row[r]
        of, size = q.narrow(0, row[r], n), _piece(n)
        if stop[r] == first[r]:
            outs.append(torch.zeros([n, v.size(1)], dtype=v.dtype, device=v.device))
            totals.append(torch.ones([n, 1], dtype=q.dtype, device=q.device))
            tops.append(torch.full([n, 1], float("-inf"), dtype=q.dtype, device=q.device))
        for a in range(first[r], stop[r], size):
            keys = min(size, stop[r] - a)
            # scripted, `v` may take a gradient, for which the weights have to stay
            if v.requires_grad or memory.numel() < n * keys:
                memory = torch.empty([n * keys], dtype=q.dtype, device=q.device)
            weight = memory.narrow(0, 0, n * keys).view(n, keys)
            torch.mm(of, k.narrow(0, a, keys).t(), out=weight)
            top = weight.amax(1, keepdim=True)
            if a > first[r]:
                top = torch.maximum(top, tops[-1])
            weight.sub_(top).exp_()
            total, out = weight.sum(1, keepdim=True), torch.mm(weight, v.narrow(0, a, keys))
            if a > first[r]:
                shrink = torch.exp(tops.pop() - top)
                total, out = torch.addcmul(total, totals.pop(), shrink), torch.addcmul(out, outs.pop(), shrink)
            tops.append(top)
            totals.append(total)
            outs.append(out)
    total = torch.cat(totals)
    return torch.cat(outs) / total, (total.log() + torch.cat(tops)).squeeze(1)


def _backward_of_each(q: Tensor, q_offsets: Tensor, k: Tensor, grad: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The gradient of the values; `q` as made in :class:`_FrozenAttention`."""
    row, first, stop = q_offsets.tolist(), start.tolist(), end.tolist()
    grad_v = grad.new_zeros([k.size(0) - 1, grad.size(1)])
    memory = grad.new_empty([0])
    for r in range(len(first)):
        n = row[r + 1] - row[r]
        of, grad_of, size = q.narrow(0, row[r], n).t(), grad.narrow(0, row[r], n), _piece(n)
        for a in range(first[r], stop[r], size):
            keys = min(size, stop[r] - a)
            if memory.numel() < n * keys:
                memory = grad.new_empty([n * keys])
            weight = memory.narrow(0, 0, n * keys).view(keys, n)  # keys first: the product with its transpose is slow
            torch.mm(k.narrow(0, a, keys), of, out=weight)
            grad_v.narrow(0, a, keys).addmm_(weight.exp_(), grad_of)
    return grad_v


def _forward_of_units(
    q: Tensor, q_offsets: Tensor, k: Tensor, v: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Tile by chunk, in blocks of units."""
    plan = _plan(q_offsets, start, end)
    tile, key = _in_tiles(q, plan), _keys(plan, start, k.size(0) - 1)
    tiles, width = plan.row.size(0), plan.row.size(1)
    tops, totals = [q.new_zeros([0, width])], [q.new_zeros([0, width])]
    sums = [v[:0].unsqueeze(1).expand(0, width, v.size(1))]  # of v: TorchScript goes by what took a gradient before
    size = _block(plan)
    for a in range(0, plan.tile.numel(), size):
        of = key[a : a + size]
        logits = _logits(tile, k, plan.tile[a : a + size], of)
        top = logits.amax(2)
        weight = logits.sub_(top.unsqueeze(2)).exp_()
        tops.append(top)
        totals.append(weight.sum(2))
        place = of.flatten().clamp(max=v.size(0) - 1)
        sums.append(torch.bmm(weight, v.index_select(0, place).view(of.size(0), of.size(1), v.size(1))))
    top, total = torch.cat(tops), torch.cat(totals)
    out = merge(top, total, torch.cat(sums), plan.tile, tiles)
    tile_top, scale = rescale(top, plan.tile, tiles)
    logsumexp = segment_sum(total * scale, plan.tile, tiles).log() + tile_top
    return out[plan.real_row], logsumexp[plan.real_row]


def _plan(q_offsets: Tensor, start: Tensor, end: Tensor) -> Units:
    """Tiles of at most 256 queries, equal for the request with most; chunks of 16 to 256 keys by the mean window."""
    most = int((q_offsets[1:] - q_offsets[:-1]).max()) if q_offsets.numel() > 1 else 0
    pieces = max((most + 255) // 256, 1)
    length = end - start
    keys = int(length.sum())
    chunk = 16
    while chunk < 256 and chunk * length.numel() < keys:
        chunk *= 2
    return units_of(q_offsets, start, end, max((most + pieces - 1) // pieces, 1), chunk)


def _in_tiles(x: Tensor, plan: Units) -> Tensor:
    """Rows `[N, d]` of queries as tiles `[tiles, width, d]`."""
    return x.index_select(0, plan.row.flatten()).view(plan.row.size(0), plan.row.size(1), x.size(1))


def _keys(plan: Units, start: Tensor, padding: int) -> Tensor:
    """The key of each place `[units, chunk]`; `padding` where there is none."""
    key = start.index_select(0, plan.request).unsqueeze(1) + plan.within
    return key.masked_fill(~plan.real_key, padding)


def _block(plan: Units) -> int:
    """Units at a time: logits of 1 MiB in float32 on a CPU, whose cache they stay in, and of 256 MiB elsewhere."""
    logits = (1 << 18) if plan.row.device.type == "cpu" else (1 << 26)
    return max(logits // (plan.row.size(1) * plan.within.size(1)), 1)


def _with_bias(q: Tensor, k: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Operands `[N, d + 2]` and `[T + 1, d + 2]` whose product has the bias added, less the last column of `q`, now 0.

    The further key is for padding: no query gives it any weight.
    """
    d = k.size(1)
    keys = torch.empty([k.size(0) + 1, d + 2], dtype=dtype, device=k.device)
    keys[:-1, :d] = k
    keys[:-1, d] = bias
    keys[-1, :d] = 0.0
    keys[-1, d] = float("-inf")
    keys[:, d + 1] = 1.0
    queries = torch.zeros([q.size(0), d + 2], dtype=dtype, device=q.device)
    queries[:, :d] = q
    queries[:, d] = 1.0
    return queries, keys


def _logits(tile: Tensor, k: Tensor, unit_tile: Tensor, key: Tensor) -> Tensor:
    """`[n, width, chunk]` of n units: tiles `[tiles, width, d]` of queries by the keys `[n, chunk]` of their chunks."""
    of_key = k.index_select(0, key.flatten()).view(key.size(0), key.size(1), k.size(1))
    return torch.bmm(tile.index_select(0, unit_tile), of_key.transpose(1, 2))
