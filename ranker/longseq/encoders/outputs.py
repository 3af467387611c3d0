"""What candidates read of an encoder's outputs: attention to them, or the product with the last one.

Attention is :class:`~ranker.longseq.heads.Heads`': queries and keys start alike, and layers start as the identity
(:func:`start_as_identity`), so that from the first step on a candidate attends to events like it. The product is the
score of next-item encoders (Kang & McAuley 2018), term by term: its sum over the width is the dot product of the last
output and the candidate's token, and the tower weighs the terms.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.longseq.stored import Stored, restore_parts, store_parts
from ranker.ops.attention import window_attention
from ranker.ops.jagged import expand_windows, offsets_of, segments_of
from ranker.ops.query_tiles import in_tiles, out_of_tiles, tiles_of
from ranker.ops.short_attention import short_attention


class OutputMemory(NamedTuple):
    """k, v: `[S, heads, d_head]` of the outputs that are kept; start, end: `[R]`, request r has those of ``start[r] :
    end[r]``. Of the last output alone, k is the output itself `[S, 1, width]`, and v is empty."""

    k: Tensor
    v: Tensor
    start: Tensor
    end: Tensor


class Outputs(nn.Module):
    """Outputs of an encoder, and how candidates read them.

    Args:
        width, heads: of outputs, and of the attention to them.
        last: keep each request's last output alone, for the product.
        short: a request has few outputs, some hundred at most: attention pads them instead of cutting them into chunks.

    Raises:
        ValueError: the heads do not divide the width, or leave less than two dimensions a head.
    """

    def __init__(self, width: int, heads: int, last: bool = False, short: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.width, self.short = width, short
        self.project = None if last else heads_of(width, heads)

    def keep(self, x: Tensor, start: Tensor, end: Tensor) -> OutputMemory:
        """Of the outputs `[T, width]`, those that requests have in ``start[r] : end[r]``, windows that may overlap."""
        project = self.project
        if project is not None:
            k, v = project.keys_values(self.norm(x))
            return OutputMemory(k, v, start, end)
        some = end > start
        last = self.norm(x.index_select(0, (end - 1)[some])).unsqueeze(1)
        offsets = offsets_of(some.long())
        return OutputMemory(last, last[:, :, :0], offsets[:-1], offsets[1:])

    def forward(self, token: Tensor, offsets: Tensor, memory: OutputMemory) -> Tensor:
        """Candidates' tokens `[N, width]`, those of request r in ``offsets[r] : offsets[r + 1]``: `[N, width]`."""
        project = self.project
        if project is None:
            some = memory.end > memory.start
            state = torch.zeros([some.numel(), self.width], dtype=memory.k.dtype, device=memory.k.device)
            state = state.index_copy(0, some.nonzero().squeeze(1), memory.k.squeeze(1))
            return token * state.index_select(0, segments_of(offsets, token.size(0)))
        q = project.queries(token)
        if self.short:
            tiles = tiles_of(offsets, elements=q.size(0))
            found = short_attention(in_tiles(q, tiles), tiles, memory.k, memory.v, memory.start, memory.end)
            return out_of_tiles(found.flatten(2), tiles)
        return window_attention(q, offsets, memory.k, memory.v, memory.start, memory.end).flatten(1)

    def store(self, memory: OutputMemory) -> Stored:
        """All keys, then all values of a request's outputs; windows that overlap have copies of their own."""
        row, _ = expand_windows(memory.start, memory.end)
        count = memory.end - memory.start
        return store_parts([memory.k.index_select(0, row), memory.v.index_select(0, row)], [count, count])

    def restore(self, stored: Stored) -> OutputMemory:
        """A lost record has no outputs."""
        values, project = stored.lengths[:, 0], self.project
        key, value = [1, self.width], [1, 0]
        if project is not None:
            key, value = project.shape, project.shape
        count = torch.div(values, key[0] * key[1] + value[0] * value[1], rounding_mode="floor")
        parts = restore_parts(stored.values, values, [count, count], [key, value])
        offsets = offsets_of(count)
        return OutputMemory(parts[0], parts[1], offsets[:-1], offsets[1:])

    def memory_bytes(self, outputs: int, number_bytes: int = 4) -> int:
        """What a store keeps of a request with so many outputs."""
        return number_bytes * self.width * (2 * outputs if self.project is not None else min(outputs, 1))


def heads_of(width: int, heads: int) -> Heads:
    """Heads that share the width among them."""
    if heads < 1 or width % heads:
        raise ValueError(f"heads: {heads}; must divide width ({width})")
    if width // heads < 2:
        raise ValueError(f"heads: {heads}; must leave at least 2 of width ({width}) to each")
    return Heads(width, heads, width // heads)


def at_least_one(**options: int) -> None:
    """Refuse numbers of things below 1, by their names."""
    for name, value in options.items():
        if value < 1:
            raise ValueError(f"{name}: {value}; must be at least 1")


def start_as_identity(*last: nn.Linear) -> None:
    """Zero the maps that residual branches end in: the layer passes its input on until it has learned to add to it."""
    for layer in last:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
