"""Rows of a matrix by index, with a backward pass for many indices: sorted, and then summed run by run.

PyTorch adds gradient row after gradient row, about 35 ns each on a CPU; sorting integers takes 5, and sums of bags of
rows 6. It sorts by radix from 32,768 integers on: fewer are padded to as many.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from ranker.ops.padded import exporting

FEWEST, RADIX = 20_000, 32_768
"""indices from which on sorting pays, and from which on PyTorch sorts by radix"""


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """``x.index_select(0, index)`` of `x` `[T, d]` and `index` `[n]` int64: `[n, d]`."""
    if torch.jit.is_scripting() or exporting():
        return x.index_select(0, index)
    return _take_rows(x, index)


@torch.jit.unused
def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    numbers = x.dtype == torch.float32 or x.dtype == torch.float64
    if not (x.requires_grad and numbers and x.device.type == "cpu" and index.numel() >= FEWEST and x.dim() == 2):
        return x.index_select(0, index)
    return _TakeRows.apply(x, index)  # pyright: ignore[reportReturnType]


class _TakeRows(torch.autograd.Function):
    """Keeps the indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.size(0)
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (index,) = ctx.saved_tensors
        return sum_rows(gradients[0], index, ctx.rows), None


def sum_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """The sum of the rows of `x` `[n, d]` that have each index: `[rows, d]`, zero for one that none has."""
    keys = index.int()
    if keys.numel() < RADIX:
        keys = pad(keys, [0, RADIX - keys.numel()], value=rows)
    order = torch.sort(keys, stable=True)[1][: index.numel()]
    count = torch.bincount(index, minlength=rows)
    return embedding_bag(order, x.contiguous(), torch.cumsum(count, 0) - count, mode="sum")
