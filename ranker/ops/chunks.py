"""Sequences cut into chunks of C tokens, for work that is batched over chunks and ordered along sequences.

Chunks are ordered by their rank in their sequence, and sequences by length, the longest first: those that still have a
chunk of rank j are a prefix of those that had one of rank j − 1. Only a sequence's last chunk is padded, so that work
follows Σ L and not R × max L.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows


class Chunks(NamedTuple):
    """How T tokens of R sequences are cut into M chunks of C places.

    token: `[M, C]` int64, the token at each place; padding repeats the sequence's last.
    real: `[M, C]` bool, false for padding.
    place: `[T]` int64, where each token is, in `[M · C]`.
    order: `[R]` int64, the sequences, the longest first; rank: `[R]`, its inverse.
    active: how many sequences have a chunk of rank 0, 1, ….
    """

    token: Tensor
    real: Tensor
    place: Tensor
    order: Tensor
    rank: Tensor
    active: list[int]


def rows_of(chunks: Chunks, first: int, end: int, heads: int) -> Tensor:
    """Rows of a `[T · h, ...]` tensor at the places of chunks first … end − 1: `[(end − first) · h · C]`."""
    head = torch.arange(heads, device=chunks.token.device).view(1, -1, 1)
    return (chunks.token[first:end].unsqueeze(1) * heads + head).flatten()


def rows_back(chunks: Chunks, heads: int) -> Tensor:
    """Rows of a `[M · h · C, ...]` tensor where each head of each token is: `[T · h]`."""
    size = chunks.token.size(1)
    head = torch.arange(heads, device=chunks.token.device) * size
    chunk = torch.div(chunks.place, size, rounding_mode="floor")
    return ((chunk * heads * size + chunks.place % size).unsqueeze(1) + head).flatten()


def chunks_of(offsets: Tensor, size: int) -> Chunks:
    """Cut the sequences ``[offsets[r], offsets[r + 1])`` into chunks of `size` tokens."""
    lengths = offsets[1:] - offsets[:-1]
    order = torch.argsort(lengths, descending=True, stable=True)
    pieces = (lengths[order] + size - 1) // size
    rank, sequence = expand_windows(torch.zeros_like(pieces), pieces)
    by_rank = torch.argsort(rank, stable=True)
    rank, sequence = rank[by_rank], order[sequence[by_rank]]
    within = torch.arange(size, device=offsets.device)
    token = (offsets[:-1][sequence] + rank * size).unsqueeze(1) + within
    last = offsets[1:][sequence].unsqueeze(1) - 1
    real = token <= last
    token = torch.minimum(token, last)
    place = torch.empty([int(lengths.sum())], dtype=torch.int64, device=offsets.device)
    place[token[real]] = torch.arange(token.numel(), device=offsets.device).view_as(token)[real]
    active: list[int] = torch.bincount(rank).tolist()
    return Chunks(token, real, place, order, torch.argsort(order), active)
