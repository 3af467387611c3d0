"""HSTU against loops over requests, layers, tokens and heads, written from the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History
from ranker.longseq.encoders import HSTU
from tests.ranker.histories import EDGES, NO_PROBES, Shape, inputs_of, randomise, shape, shapes
from tests.ranker.longseq.encoders.loops import (
    DIM,
    HEADS,
    WIDTH,
    affine,
    bucket,
    check,
    events_of,
    normalised,
    window_of,
    zeros,
)

SMALL_EDGES = [name for name in EDGES if name not in ("skewed candidates", "longer than a chunk and than any cap")]


def block_of(**options: Any) -> HSTU:
    """A small block with random float64 weights: fewer positions than events, and chunks shorter than histories."""
    small = {"width": WIDTH, "heads": HEADS, "length": 0, "positions": 5, "time_buckets": 12, "chunk": 4}
    block = HSTU(DIM, **{**small, **options})
    randomise(block)
    return block


def silu(x: Tensor) -> Tensor:
    """x σ(x)."""
    return x / (1 + torch.exp(-x))


def unit(layer: Any, x: list[Tensor], time_ms: list[int]) -> list[Tensor]:
    """One transduction unit."""
    d = WIDTH // HEADS
    uvqk = [silu(layer.uvqk.weight @ normalised(layer.norm, e)).split(WIDTH) for e in x]
    out: list[Tensor] = []
    for t, e in enumerate(x):
        found = zeros()
        for h in range(HEADS):
            of = slice(h * d, (h + 1) * d)
            head = torch.zeros(d, dtype=torch.float64)
            for s in range(t + 1):
                gap_s = time_ms[t] // 1000 - time_ms[s] // 1000
                bias = layer.between[min(t - s, layer.between.numel() - 1)]
                bias = bias + layer.elapsed[bucket(gap_s, layer.elapsed.numel())]
                head = head + silu(uvqk[t][2][of] @ uvqk[s][3][of] + bias) / (t + 1) * uvqk[s][1][of]
            found = torch.cat([found[: h * d], head, found[(h + 1) * d :]])
        out.append(e + affine(layer.out, normalised(layer.found_norm, found) * uvqk[t][0]))
    return out


def encoded(block: HSTU, batch: Shape, history: History, r: int) -> list[Tensor]:
    """The last layer's tokens."""
    x = events_of(block, batch, history, r)
    for layer in block.layers:
        x = unit(layer, x, [int(history.time[i]) for i in window_of(block, batch, r)])
    return x


@given(shapes(longest=7, most_candidates=2), st.sampled_from([0, 5]), st.sampled_from(["attention", "last"]))
@settings(deadline=None, max_examples=12)
def test_equals_the_loop(batch: Shape, length: int, read: str):
    """On any batch, with any cap and read."""
    check(block_of(length=length, read=read), encoded, batch)


@pytest.mark.parametrize("read", ["attention", "last"])
def test_equals_the_loop_at_the_edges(read: str):
    """On the batches that break things."""
    for name in SMALL_EDGES:
        check(block_of(length=7, read=read, layers=1), encoded, EDGES[name])


def test_equals_the_loop_over_many_chunks():
    """And over groups of similar lengths, of which requests share some."""
    batch = shape([30, 5, 17], [(0, 0, 30), (1, 0, 5), (2, 0, 17), (0, 0, 23)], [1] * 4)
    check(block_of(layers=1), encoded, batch)


def test_a_later_event_changes_no_earlier_output():
    """Whether it is another, or there is none."""
    history, _ = inputs_of(shape([30], [(0, 0, 30)], [1]), DIM)
    block = block_of()
    x, _, _ = block.encoded(history)
    for place in (0, 7, 29):
        changed = history.x.clone()
        changed[place] = 9.0
        other, _, _ = block.encoded(history._replace(x=changed))
        torch.testing.assert_close(other[:place], x[:place], rtol=0, atol=1e-14)
        assert bool((other[place:] != x[place:]).any(1).all())
        shorter, _, _ = block.encoded(history._replace(end=torch.tensor([place + 1])))
        torch.testing.assert_close(shorter, x[: place + 1])


@pytest.mark.parametrize(("length", "tokens"), [(0, 30 + 20 + 7), (10, 10 + 10 + 7)])
def test_requests_that_begin_at_one_event_share_a_pass(length: int, tokens: int):
    """Up to the last of their ends: here two of one row, one that begins later, and one of another row."""
    batch = shape([30, 7], [(0, 0, 30), (0, 0, 12), (0, 10, 30), (1, 0, 7)], [1] * 4)
    if length:
        batch = shape([30, 7], [(0, 0, 30), (0, 20, 30), (0, 0, 10), (1, 0, 7)], [1] * 4)
    history, _ = inputs_of(batch, DIM)
    x, _, _ = block_of(length=length).encoded(history)
    assert x.size(0) == tokens


def test_what_is_kept_does_not_depend_on_the_requests_time():
    """So that it can be cached across requests."""
    history, _ = inputs_of(EDGES["overlapping windows of one row"], DIM)
    block = block_of()
    now = block.encode(history, NO_PROBES)
    later = block.encode(history._replace(now=history.now + 10**8), NO_PROBES)
    assert torch.equal(now.k, later.k)
    assert torch.equal(now.v, later.v)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, r"heads: 4; must divide width \(6\)"),
        ({"heads": 4, "read": "last"}, r"heads: 4; must divide width \(6\)"),
        ({"layers": 0}, "layers: 0; must be at least 1"),
        ({"positions": 0}, "positions: 0; must be at least 1"),
        ({"time_buckets": 0}, "time_buckets: 0; must be at least 1"),
        ({"chunk": 0}, "chunk: 0; must be at least 1"),
        ({"read": "first"}, "read: 'first'; must be 'attention' or 'last'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    """With their value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        block_of(**options)
