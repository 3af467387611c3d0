"""Queries in tiles, windows of keys in chunks: a pair of a tile and a chunk is a *unit* of attention.

Only the last chunk of a window is padded, so that time and memory follow Σ L and not R × max L. A tile's units are
merged by the rule of online softmax (Milakov & Gimelshein 2018; split keys as in FlashDecoding).

Requests of one user that follow each other have nearly the same window: :func:`shared_windows` takes them together, so
that a chunk of events is gathered once for the candidates of all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, segment_sum, segments_of
from ranker.ops.padded import exporting, out_of_places, widest, with_spare


class Units(NamedTuple):
    """Tiles of queries, and the units of every tile with the chunks of its window, in the order of tiles.

    row, real_row: `[tiles, width]` the query of each place, and whether it is one (other places repeat the last).
    tile, request: `[units]`; within, real_key: `[units, chunk]` the key of each place, counted from the window's start.
    """

    row: Tensor
    real_row: Tensor
    tile: Tensor
    request: Tensor
    within: Tensor
    real_key: Tensor


class SharedWindows(NamedTuple):
    """Requests in G groups of neighbours, the queries of each with one window that covers those of its requests.

    q_offsets: `[G + 1]`; start, end: `[G]`.
    low, high: `[N]` each query's own window, counted from its group's start; empty where every group is one request.
    """

    q_offsets: Tensor
    start: Tensor
    end: Tensor
    low: Tensor
    high: Tensor


def shared_windows(q_offsets: Tensor, start: Tensor, end: Tensor, most_queries: int = 8) -> SharedWindows:
    """Group requests whose windows differ from their neighbour's by a sixteenth at most, and from the group's first by
    about a half, so that little is covered that a request has not. Not where requests have more than `most_queries` on
    the mean: what is gathered is little there beside what is computed."""
    requests, none = start.numel(), start[:0]
    if not torch.jit.is_scripting() and exporting():
        begin = torch.where(end > start, start, 0)  # a place that there is, for an empty window's padding
        return SharedWindows(q_offsets, begin, torch.maximum(begin, end * (end > start)), none, none)
    queries = int(q_offsets[-1]) if requests > 1 else 0
    if queries == 0 or queries > most_queries * requests:
        return SharedWindows(q_offsets, start, end, none, none)
    length = end - start
    moved = (start[1:] - start[:-1]).abs() + (end[1:] - end[:-1]).abs()
    first = torch.ones_like(length, dtype=torch.bool)
    first[1:] = 16 * moved > torch.minimum(length[1:], length[:-1])
    way = torch.nn.functional.pad(torch.cumsum(moved, 0), [1, 0])
    began = torch.cumsum(first, 0) - 1
    origin = first.nonzero().squeeze(1).index_select(0, began)
    part = torch.div(2 * (way - way.index_select(0, origin)), length[origin].clamp(min=1), rounding_mode="floor")
    first[1:] = first[1:] | (part[1:] != part[:-1])
    begin = first.nonzero().squeeze(1)
    groups = begin.numel()
    if groups == requests:
        return SharedWindows(q_offsets, start, end, none, none)
    group = torch.cumsum(first, 0) - 1
    covered_start = start.index_select(0, begin).scatter_reduce(0, group, start, "amin")
    covered_end = end.index_select(0, begin).scatter_reduce(0, group, end, "amax")
    request = segments_of(q_offsets)
    low = (start - covered_start.index_select(0, group)).index_select(0, request)
    high = low + length.index_select(0, request)
    offsets = torch.cat([q_offsets.index_select(0, begin), q_offsets[-1:]])
    return SharedWindows(offsets, covered_start, covered_end, low, high)


def sizes_of(q_offsets: Tensor, start: Tensor, end: Tensor) -> tuple[int, int]:
    """Of a tile: the mean request's queries, at most 128; and of a chunk: the mean window's length to the next power of
    two, between 16 and 128."""
    if not torch.jit.is_scripting() and exporting():
        return widest(q_offsets[1:] - q_offsets[:-1]), widest(end - start)
    requests = max(start.numel(), 1)
    events, chunk = int((end - start).sum()), 16
    while chunk < 128 and chunk * requests < events:
        chunk *= 2
    queries = int(q_offsets[-1]) if q_offsets.numel() > 0 else 0
    return min(max((queries + requests - 1) // requests, 1), 128), chunk


def units_of(q_offsets: Tensor, start: Tensor, end: Tensor, width: int, chunk: int) -> Units:
    """Queries cut into tiles of `width`, windows into chunks of `chunk`."""
    if not torch.jit.is_scripting() and exporting():
        return _padded_units(q_offsets, start, end, width, chunk)
    tile_rank, tile_request = _split(q_offsets[1:] - q_offsets[:-1], width)
    row = (q_offsets[:-1][tile_request] + tile_rank * width).unsqueeze(1) + torch.arange(width, device=start.device)
    last_row = q_offsets[1:][tile_request].unsqueeze(1) - 1
    length = end - start
    unit_chunk, tile = _split(length[tile_request], chunk)
    request = tile_request[tile]
    within = unit_chunk.unsqueeze(1) * chunk + torch.arange(chunk, device=start.device)
    last = length[request].unsqueeze(1) - 1
    return Units(
        torch.minimum(row, last_row), row <= last_row, tile, request, torch.minimum(within, last), within <= last
    )


def out_of_units(out: Tensor, plan: Units, q_offsets: Tensor, queries: int) -> Tensor:
    """What was found for the places of tiles `[tiles, width, ...]`, for each query `[N, ...]`; N = `queries`."""
    if not torch.jit.is_scripting() and exporting():  # a tile is a request
        return out_of_places(out, q_offsets, queries)
    return out[plan.real_row]


def in_units(x: Tensor, plan: Units) -> Tensor:
    """What each query has `[N]`, for the queries of every unit: `[units, 1, width]`."""
    if not torch.jit.is_scripting() and exporting():
        x = with_spare(x)
    return x.index_select(0, plan.row.flatten()).view(plan.row.shape).index_select(0, plan.tile).unsqueeze(1)


def rescale(top: Tensor, unit_tile: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
    """Each tile's greatest logit `[tiles, width]`, and the factor e^(top − greatest) `[units, width]` of its units."""
    index = unit_tile.unsqueeze(1).expand_as(top)
    greatest = torch.full([tiles, top.size(1)], float("-inf"), dtype=top.dtype, device=top.device)
    greatest = greatest.scatter_reduce(0, index, top, "amax")
    return greatest, torch.exp(top - greatest.index_select(0, unit_tile))


@torch.jit.unused
def _padded_units(q_offsets: Tensor, start: Tensor, end: Tensor, width: int, chunk: int) -> Units:
    """One tile a request and one unit a tile, padded to the greatest request and window: of no use where these differ
    much, but without a size that follows from more than two numbers of the data."""
    count, length = q_offsets[1:] - q_offsets[:-1], end - start
    request = torch.arange(start.numel(), device=start.device)
    place, event = torch.arange(width, device=start.device), torch.arange(chunk, device=start.device)
    last = (q_offsets[1:].unsqueeze(1) - 1).clamp(min=0)
    row = torch.minimum(q_offsets[:-1].unsqueeze(1) + place, last)
    real_row = place < count.unsqueeze(1)
    within = torch.minimum(event, (length.unsqueeze(1) - 1).clamp(min=0))
    return Units(row, real_row, request, request, within, event < length.unsqueeze(1))


def _split(lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut segments into pieces of `size`: each piece's rank in its segment, and its segment, ascending."""
    pieces = (lengths + size - 1) // size
    return expand_windows(torch.zeros_like(pieces), pieces)


def merge(top: Tensor, total: Tensor, summed: Tensor, unit_tile: Tensor, tiles: int) -> Tensor:
    """Softmax over a tile's units from each unit's own: every unit is rescaled to the tile's greatest logit.

    Args:
        top, total: `[units, width]` greatest logit, and sum of e^(logit − top).
        summed: `[units, width, dv]` values weighted by e^(logit − top).

    Returns:
        `[tiles, width, dv]`, zero for a tile without units.
    """
    scale = rescale(top, unit_tile, tiles)[1]
    total = segment_sum(total * scale, unit_tile, tiles)
    summed = segment_sum(summed * scale.unsqueeze(2), unit_tile, tiles)
    return summed / total.clamp(min=1e-30).unsqueeze(2)
