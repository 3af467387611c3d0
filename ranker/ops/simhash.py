"""SimHash (Charikar 2002): on which side of fixed random planes a vector lies."""

import torch
from torch import Tensor


def simhash(x: Tensor, planes: Tensor) -> Tensor:
    """Codes `[n, bits]` int8 of ±1 of vectors `[n, d]`, by planes `[d, bits]`; 1 on a plane itself.

    The inner product of two codes is bits − 2 · their Hamming distance.
    """
    side = torch.mm(x.detach(), planes.to(x.dtype)) >= 0
    return 2 * side.to(torch.int8) - 1
