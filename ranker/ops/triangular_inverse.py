"""Inverses of many small unit lower triangular matrices, by products of large batches.

PyTorch's own solver goes matrix by matrix, at a tenth of the speed of its batched products. Here blocks of 8 are
inverted by substitution, element by element of all matrices at once, and doubled until they are the whole:

    [T_1  0 ]⁻¹   [      T_1⁻¹           0  ]
    [B   T_2]   = [−T_2⁻¹ B T_1⁻¹     T_2⁻¹ ]

No step divides, and none forms a power of the matrix: rounding is that of substitution.
"""

import torch
from torch import Tensor

BASE = 8


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + tril(a, −1))⁻¹ of `a` `[B, C, C]`; what it has on and above its diagonal is not looked at. No autograd."""
    batch, width = a.size(0), a.size(1)
    size = BASE
    while size < width:
        size *= 2
    if size > width:
        a = torch.nn.functional.pad(a, [0, size - width, 0, size - width])
    out = torch.zeros_like(a)
    blocks = [batch, size // BASE, BASE, size // BASE, BASE]
    given = a.view(blocks).diagonal(0, 1, 3).permute(1, 2, 3, 0).reshape(BASE, BASE, size // BASE * batch)
    base = torch.eye(BASE, dtype=a.dtype, device=a.device).unsqueeze(2).repeat(1, 1, given.size(2))
    for i in range(BASE - 1):  # row i is final: it leaves those below
        base[i + 1 :, : i + 1].addcmul_(given[i + 1 :, i : i + 1], base[i : i + 1, : i + 1], value=-1)
    out.view(blocks).diagonal(0, 1, 3).copy_(base.view(BASE, BASE, size // BASE, batch).permute(3, 0, 1, 2))
    done = BASE
    while done < size:
        for first in range(0, size, 2 * done):
            middle, end = first + done, first + 2 * done
            below = torch.bmm(a[:, middle:end, first:middle], out[:, first:middle, first:middle])
            out[:, middle:end, first:middle] = torch.bmm(out[:, middle:end, middle:end], below).neg_()
        done *= 2
    return out[:, :width, :width]
