"""Softmax attention to short windows of events, in one padded product.

Where no window is longer than some fifty events, cutting windows into chunks and merging these costs more than the
padding does: :func:`ranker.ops.attention.window_attention` is for the others.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ranker.ops.padded import exporting, in_places, padded_rows, widest
from ranker.ops.query_tiles import Tiles, of_tiles


def short_attention(q: Tensor, tiles: Tiles, k: Tensor, v: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Queries of request r attend to the events ``[start[r], end[r])``, at a cost of the longest window each.

    Args:
        q: `[t, w, h, d]`, tiles of queries; k: `[S, h, d]`; v: `[S, h, dv]`; start, end: `[R]` int64.

    Returns:
        `[t, w, h, dv]`; zero for queries of an empty window.
    """
    length = end - start
    if not torch.jit.is_scripting() and exporting():
        return _padded(q, tiles, k, v, start, length)
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


@torch.jit.unused
def _padded(q: Tensor, tiles: Tiles, k: Tensor, v: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """The same without a look at the lengths but the greatest."""
    event = padded_rows(start, start + length, widest(length), k.size(0))
    first = torch.arange(event.size(1), device=k.device) == 0  # an empty window has one key, whose value is zero
    seen = of_tiles((event < k.size(0)) | first, tiles).unsqueeze(1).unsqueeze(1)
    keys = of_tiles(in_places(k, event), tiles).transpose(1, 2)
    values = of_tiles(in_places(v, event), tiles).transpose(1, 2)
    return scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=seen).transpose(1, 2)
