"""Softmax attention to short windows of events, in one padded product.

Where no window is longer than some fifty events, cutting windows into chunks and merging these costs more than the
padding does: :func:`ranker.ops.attention.window_attention` is for the others.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ranker.ops.query_tiles import Tiles, of_tiles


def short_attention(q: Tensor, tiles: Tiles, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Queries of request r attend to the events ``[start[r], end[r])``, at a cost of the longest window each.

    Args:
        q: `[t, w, h, d]`, tiles of queries; k: `[S, h, d]`; v: `[S, h, dv]`; start, end: `[R]` int64.

    Returns:
        `[t, w, h, dv]`; zero for queries of an empty window.
    """
    length = end - start
    longest = int(length.max()) if length.numel() > 0 else 0
    if longest == 0:
        none = torch.zeros([q.size(0), q.size(1), q.size(2), v.size(2)], dtype=v.dtype, device=v.device)
        return none + 0 * (q.sum() + k.sum() + v.sum())
    within = torch.arange(longest, device=k.device)
    real = within < length.unsqueeze(1)  # [R, longest]
    event = (start.unsqueeze(1) + within).clamp(max=k.size(0) - 1).flatten()
    keys = k.index_select(0, event).view(-1, longest, k.size(1), k.size(2)).transpose(1, 2)
    values = v.index_select(0, event).view(-1, longest, v.size(1), v.size(2)).transpose(1, 2)
    seen: Tensor | None = None
    if int(length.min()) < longest:
        values = values * real.unsqueeze(1).unsqueeze(3)
        # an empty window has one key, whose value is zero
        seen = of_tiles(real | (within == 0), tiles).unsqueeze(1).unsqueeze(1)
    keys, values = of_tiles(keys, tiles), of_tiles(values, tiles)
    return scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen).transpose(1, 2)
