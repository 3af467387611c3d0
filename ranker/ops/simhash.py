"""SimHash (Charikar 2002): on which side of fixed random planes a vector lies.

Two vectors at an angle θ agree in each bit with probability 1 − θ/π, whatever their lengths. Hashes take no gradient.
"""

import torch
from torch import Tensor


def random_planes(dim: int, hashes: int, bits: int) -> Tensor:
    """Normals of the planes of `hashes` functions of `bits` bits: `[dim, hashes, bits]`, drawn from torch's seed."""
    return torch.randn(dim, hashes, bits)


def hash_signs(x: Tensor, planes: Tensor) -> Tensor:
    """Codes `[n, bits]` int8 of ±1 of vectors `[n, d]`, by planes `[d, bits]`; 1 on a plane itself.

    The inner product of two codes is bits − 2 · their Hamming distance.
    """
    side = torch.mm(x.detach(), planes.to(x.dtype)) >= 0
    return 2 * side.to(torch.int8) - 1


def hash_buckets(x: Tensor, planes: Tensor) -> Tensor:
    """Buckets `[n, hashes]` int64, from 0 to 2^bits − 1, of vectors `[n, dim]`; bits up to 24.

    >>> hash_buckets(torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.eye(2).view(2, 1, 2))
    tensor([[1],
            [3]])
    """
    side = torch.mm(x.detach(), planes.flatten(1)).unflatten(1, [planes.size(1), planes.size(2)]) > 0
    place = torch.exp2(torch.arange(planes.size(2), dtype=x.dtype, device=x.device))
    return (side.to(x.dtype) @ place).long()
