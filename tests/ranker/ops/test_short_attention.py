"""Tiles of queries, and attention in one padded product, against loops over requests."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ranker.ops.attention import naive_window_attention
from ranker.ops.jagged import offsets_of
from ranker.ops.query_tiles import Tiles, in_tiles, of_tiles, out_of_tiles, tiles_of
from ranker.ops.short_attention import short_attention
from tests.ranker.histories import EDGES, Shape, assert_same, shapes

any_counts = st.lists(st.integers(0, 9), max_size=6)
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))


def offsets_from(counts: list[int]) -> torch.Tensor:
    """Of requests with so many queries each."""
    return offsets_of(torch.tensor(counts, dtype=torch.int64))


@given(any_counts, st.integers(1, 8))
@example([], 4)
@example([0, 0], 4)
@example([3, 3], 4)
@example([1, 150, 0], 128)
def test_tiles_hold_every_query_beside_its_requests_own(counts: list[int], most: int):
    """What goes into tiles comes out again, and each query finds what its request has."""
    offsets = offsets_from(counts)
    tiles = tiles_of(offsets, most)
    query = torch.arange(sum(counts))
    placed = in_tiles(query.view(-1, 1, 1), tiles)
    assert out_of_tiles(placed.flatten(2), tiles).flatten().tolist() == query.tolist()
    owner = of_tiles(torch.arange(len(counts)), tiles).view(-1, 1, 1).expand(-1, tiles.width, -1)
    expected = [r for r, n in enumerate(counts) for _ in range(n)]
    assert out_of_tiles(owner, tiles).flatten().tolist() == expected
    assert placed.numel() <= 2 * sum(counts) + len(counts) * tiles.width


def test_equal_requests_are_tiles():
    """Whose queries are not moved, however many they are."""
    q = torch.randn(600, 2, 3)
    tiles = tiles_of(offsets_from([200, 200, 200]))
    assert tiles.whole
    assert in_tiles(q, tiles).data_ptr() == q.data_ptr()
    assert not tiles_of(offsets_from([200, 201, 199])).whole


def attend(q: torch.Tensor, offsets: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start, end) -> torch.Tensor:
    """From queries `[N, h, d]` to `[N, h, dv]`."""
    tiles: Tiles = tiles_of(offsets)
    found = short_attention(in_tiles(q, tiles), tiles, k, v, start, end)
    return out_of_tiles(found.flatten(2), tiles).unflatten(1, [q.size(1), v.size(2)])


@given(any_shape)
@settings(deadline=None, max_examples=40)
def test_short_attention_equals_the_loop(batch: Shape):
    """On any batch: empty windows too, and requests that share events; so do its gradients."""
    start, end, offsets = batch.windows()
    generator = batch.generator()
    sizes = [(batch.candidates, 3), (batch.events, 3), (batch.events, 4)]
    inputs = [torch.randn(n, 2, d, generator=generator, dtype=torch.float64).requires_grad_() for n, d in sizes]
    q, k, v = inputs
    found = attend(q, offsets, k, v, start, end)
    assert_same(found, naive_window_attention(q, offsets, k, v, start, end), inputs)


def test_all_script():
    """And give the same."""
    tiled, attention = torch.jit.script(tiles_of), torch.jit.script(short_attention)
    for batch in EDGES.values():
        start, end, offsets = batch.windows()
        q, kv = torch.randn(batch.candidates, 2, 3), torch.randn(batch.events, 2, 3)
        tiles = Tiles(*tiled(offsets, 128))
        found = attention(in_tiles(q, tiles), tiles, kv, kv, start, end).flatten(2)
        torch.testing.assert_close(out_of_tiles(found, tiles), attend(q, offsets, kv, kv, start, end).flatten(1))
