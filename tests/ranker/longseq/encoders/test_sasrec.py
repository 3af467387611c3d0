"""SASRec against loops over requests, layers, tokens and heads, written from the equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History
from ranker.longseq.encoders import SASRec
from ranker.longseq.encoders.sasrec import sinusoids
from tests.ranker.histories import EDGES, Shape, inputs_of, randomise, shape, shapes
from tests.ranker.longseq.encoders.loops import (
    DIM,
    HEADS,
    WIDTH,
    affine,
    answer,
    attend,
    check,
    events_of,
    feed,
    normalised,
)

SMALL_EDGES = [name for name in EDGES if name not in ("skewed candidates", "longer than a chunk and than any cap")]


def block_of(**options: Any) -> SASRec:
    """A small block with random float64 weights."""
    block = SASRec(DIM, **{"width": WIDTH, "heads": HEADS, "length": 20, **options})
    randomise(block)
    return block


def sinusoid(position: int) -> Tensor:
    """sin and cos of the position at rates from 1 to 1e-4."""
    half = WIDTH // 2
    angles = [position * math.exp(-math.log(1e4) * i / (half - 1)) for i in range(half)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def encoded(block: SASRec, batch: Shape, history: History, r: int) -> list[Tensor]:
    """The last layer's tokens."""
    x = events_of(block, batch, history, r)
    position = block.position
    x = [e + (sinusoid(len(x) - 1 - t) if position is None else position[len(x) - 1 - t]) for t, e in enumerate(x)]
    for layer in block.layers:
        y = [normalised(layer.norm, e) for e in x]
        answers = [answer(layer.heads, e) for e in y]
        x = [
            feed(layer.feed_forward, e + affine(layer.out, attend(layer.heads, y[t], answers[: t + 1])))
            for t, e in enumerate(x)
        ]
    return x


@given(
    shapes(longest=9, most_candidates=2),
    st.sampled_from([3, 20]),
    st.sampled_from(["learned", "sinusoidal"]),
    st.sampled_from(["attention", "last"]),
)
@settings(deadline=None, max_examples=15)
def test_equals_the_loop(batch: Shape, length: int, positions: str, read: str):
    """On any batch, with any positions and read."""
    check(block_of(length=length, positions=positions, read=read), encoded, batch)


@pytest.mark.parametrize("read", ["attention", "last"])
def test_equals_the_loop_at_the_edges(read: str):
    """On the batches that break things."""
    for name in SMALL_EDGES:
        check(block_of(length=7, read=read), encoded, EDGES[name])


def test_equals_the_loop_over_many_lengths():
    """Groups of similar lengths, and a cap."""
    batch = shape([45, 5, 38, 21], [(0, 0, 45), (1, 0, 5), (2, 0, 38), (0, 0, 41), (3, 0, 21)], [1] * 5)
    check(block_of(length=40, layers=1), encoded, batch)


def test_sinusoids_far_back_are_in_full_precision():
    """Rates in float32 would be off by 6e-8, and angles at 10,000 by that many times as much."""
    torch.testing.assert_close(sinusoids(torch.tensor([0, 10_000]), WIDTH)[1], sinusoid(10_000), rtol=0, atol=1e-11)


def test_a_later_event_changes_no_earlier_output():
    """Nor does an earlier output get it a gradient."""
    history, _ = inputs_of(shape([30], [(0, 0, 30)], [1]), DIM)
    block = block_of(length=30)
    x, _, _ = block.encoded(history)
    for place in (0, 7, 29):
        changed = history.x.clone()
        changed[place] = 9.0
        other, _, _ = block.encoded(history._replace(x=changed))
        assert torch.equal(other[:place], x[:place])
        assert bool((other[place:] != x[place:]).any(1).all())


def test_positions_are_counted_from_the_latest_event():
    """The outputs of the latest `length` events are those of a history that has no others."""
    history, _ = inputs_of(shape([30], [(0, 0, 30), (0, 10, 30)], [1, 1]), DIM)
    x, start, end = block_of(length=20).encoded(history)
    torch.testing.assert_close(x[start[0] : end[0]], x[start[1] : end[1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, r"heads: 4; must divide width \(6\)"),
        ({"heads": 6}, r"heads: 6; must leave at least 2 of width \(6\) to each"),
        ({"layers": 0}, "layers: 0; must be at least 1"),
        ({"positions": "both"}, "positions: 'both'; must be 'learned' or 'sinusoidal'"),
        ({"read": "first"}, "read: 'first'; must be 'attention' or 'last'"),
        ({"length": 0}, "length: 0; learned positions need a limit: set it, or positions to 'sinusoidal'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    """With their value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        block_of(**options)
