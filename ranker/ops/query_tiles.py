"""Jagged queries in tiles of equal width, so that what is kept of a request is multiplied with many of them at once.

A tile is of one request; only its last is padded. Where every request has as many queries, which online is one request
with all its candidates, a tile is a request and nothing is moved.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, offsets_of, segments_of
from ranker.ops.padded import exporting, widest, with_spare


class Tiles(NamedTuple):
    """t tiles of w places for N queries.

    row: `[t · w]` int64, the query at each place; padding repeats the request's last. Empty where tiles are requests.
    place: `[N]` int64, where each query is, in `[t · w]`. Empty where tiles are requests.
    request: `[t]` int64, of each tile. Empty where tiles are requests.
    width: w; whole: tiles are requests, in order and without padding.
    """

    row: Tensor
    place: Tensor
    request: Tensor
    width: int
    whole: bool


def tiles_of(offsets: Tensor, most: int = 128, elements: int | None = None) -> Tiles:
    """Of the queries ``offsets[r] : offsets[r + 1]`` of request r, as wide as the mean request, at most `most`.

    Args:
        elements: N where it is known: an exported graph needs it.
    """
    count = offsets[1:] - offsets[:-1]
    if not torch.jit.is_scripting() and exporting():
        return _padded(offsets, count, elements)
    requests = count.numel()
    queries, none = 0, offsets[:0]
    if requests > 0:
        queries = int(offsets[-1])
        if queries > 0 and int(count.max()) * requests == queries:
            return Tiles(none, none, none, queries // requests, True)
    width = min(max((queries + requests - 1) // max(requests, 1), 1), most)
    tiles = torch.div(count + (width - 1), width, rounding_mode="floor")
    rank, request = expand_windows(torch.zeros_like(tiles), tiles)
    row = (offsets[:-1][request] + rank * width).unsqueeze(1) + torch.arange(width, device=offsets.device)
    row = torch.minimum(row, offsets[1:][request].unsqueeze(1) - 1)
    owner = segments_of(offsets)
    moved = offsets_of(tiles)[:-1] * width - offsets[:-1]  # from a query's row to its place
    place = torch.arange(owner.numel(), device=offsets.device) + moved[owner]
    return Tiles(row.flatten(), place, request, width, False)


@torch.jit.unused
def _padded(offsets: Tensor, count: Tensor, elements: int | None) -> Tiles:
    """A tile a request, padded to the greatest."""
    width = widest(count)
    row = offsets[:-1].unsqueeze(1) + torch.arange(width, device=offsets.device)
    row = torch.minimum(row, (offsets[1:].unsqueeze(1) - 1).clamp(min=0))
    owner = segments_of(offsets, elements)
    place = owner * width + torch.arange(owner.numel(), device=offsets.device) - offsets.index_select(0, owner)
    return Tiles(row.flatten(), place, torch.arange(count.numel(), device=offsets.device), width, False)


def in_tiles(x: Tensor, tiles: Tiles) -> Tensor:
    """Queries `[N, h, d]` to `[t, w, h, d]`."""
    if not torch.jit.is_scripting() and exporting():
        x = with_spare(x)
    if not tiles.whole:
        x = x.index_select(0, tiles.row)
    return x.view(-1, tiles.width, x.size(1), x.size(2))


def out_of_tiles(x: Tensor, tiles: Tiles) -> Tensor:
    """`[t, w, d]` to `[N, d]`."""
    x = x.flatten(0, 1)
    return x if tiles.whole else x.index_select(0, tiles.place)


def of_tiles(x: Tensor, tiles: Tiles) -> Tensor:
    """What requests have `[R, ...]`, for each tile `[t, ...]`."""
    return x if tiles.whole else x.index_select(0, tiles.request)
