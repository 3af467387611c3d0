"""SimHash (Charikar 2002): on which side of fixed random planes a vector lies.

Two vectors at an angle θ agree in each bit with probability 1 − θ/π, whatever their lengths. Hashes take no gradient,
and no part in autocast: half precision would put vectors near a plane on its other side, and round buckets' numbers.
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
    return 2 * (_sides(x, planes) >= 0).to(torch.int8) - 1


def hash_buckets(x: Tensor, planes: Tensor) -> Tensor:
    """Buckets `[n, hashes]` int64, from 0 to 2^bits − 1, of vectors `[n, dim]`; bits up to 24.

    >>> hash_buckets(torch.tensor([[1.0, -1.0], [2.0, 3.0]]), torch.eye(2).view(2, 1, 2))
    tensor([[1],
            [3]])
    """
    side = _sides(x, planes.flatten(1)).unflatten(1, [planes.size(1), planes.size(2)]) > 0
    place = torch.exp2(torch.arange(planes.size(2), dtype=torch.float32, device=x.device))
    return _products(side.to(torch.float32), place.unsqueeze(1)).squeeze(2).long()


def _sides(x: Tensor, planes: Tensor) -> Tensor:
    """How far vectors `[n, d]` lie from planes `[d, p]`, times the lengths of their normals: `[n, p]`."""
    x = x.detach()
    if x.dtype == torch.bfloat16 or x.dtype == torch.float16:
        x = x.float()
    return _products(x, planes.to(x.dtype))


def _products(x: Tensor, y: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        return _outside_autocast(x, y)
    return torch.matmul(x, y)


@torch.jit.unused
def _outside_autocast(x: Tensor, y: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(x.device.type):
        return torch.matmul(x, y)
    with torch.autocast(x.device.type, enabled=False):
        return torch.matmul(x, y)
