"""Softmax attention of candidates to a fixed number of groups: a read that does not know how long a history is."""

import math

import torch
from torch import Tensor

from ranker.ops.query_tiles import in_tiles, of_tiles, out_of_tiles, tiles_of


def log_size(size: Tensor) -> Tensor:
    """The logarithm, and −∞ with no gradient for 0."""
    return torch.where(size > 0, torch.log(size.clamp(min=1e-30)), float("-inf"))


def group_attention(q: Tensor, offsets: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """softmax(q kᵀ / √d + size) v over the groups of a candidate's request.

    Args:
        q: `[N, h, d]`; offsets: `[R + 1]` int64, the candidates of request r are ``offsets[r] : offsets[r + 1]``.
        k: `[R, K, h, d]`; v: `[R, K, h, dv]`.
        size: `[R, K, h]` or `[R, K, 1]`, added to the logits: the logarithm of how many events a group stands for, −∞
            for a group without events, which takes no part.

    Returns:
        `[N, h · dv]`; zero for a request none of whose groups has events.
    """
    tiles = tiles_of(offsets, elements=q.size(0))
    without = size.isneginf().all(1, keepdim=True)  # [R, 1, h]
    size = of_tiles(size.masked_fill(without, 0.0), tiles).transpose(1, 2).unsqueeze(2)
    # no einsum: of one head it makes products that compilers cannot size
    q = in_tiles(q / math.sqrt(q.size(2)), tiles).transpose(1, 2)  # [t, h, w, d]
    k, v = of_tiles(k, tiles).transpose(1, 2), of_tiles(v, tiles).transpose(1, 2)  # [t, h, K, d]
    out = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(2, 3)) + size, 3), v).transpose(1, 2)
    return out_of_tiles(out.masked_fill(of_tiles(without, tiles).unsqueeze(3), 0.0).flatten(2), tiles)
