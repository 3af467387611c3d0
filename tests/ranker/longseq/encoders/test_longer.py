"""LONGER against loops over requests, groups, layers, tokens and heads, written from its description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History
from ranker.longseq.encoders import LONGER
from tests.ranker.histories import EDGES, Shape, inputs_of, randomise, shape, shapes
from tests.ranker.longseq.encoders.loops import (
    DIM,
    HEADS,
    WIDTH,
    affine,
    answer,
    attend,
    bucket,
    check,
    events_of,
    feed,
    normalised,
    zeros,
)
from tests.ranker.longseq.test_hytrec import softmax_layer

SMALL_EDGES = [name for name in EDGES if name not in ("skewed candidates", "longer than a chunk and than any cap")]


def block_of(**options: Any) -> LONGER:
    """A small block with random float64 weights."""
    small = {"width": WIDTH, "heads": HEADS, "merge": 3, "recent": 2, "global_tokens": 2, "layers": 1}
    block = LONGER(DIM, **{**small, **options})
    randomise(block)
    return block


def merged(block: LONGER, events: list[Tensor]) -> list[Tensor]:
    """Groups of n events from the latest backwards, the oldest with zeros before it."""
    n = block.merge.merge
    out: list[Tensor] = []
    while events:
        group, events = events[-n:], events[:-n]
        if block.merge.inner is not None:
            group = softmax_layer(block.merge.inner, group, 0, causal=False)
        whole = torch.cat([zeros()] * (n - len(group)) + group)
        position = block.position[bucket(len(out), block.position.size(0))]
        out.append(normalised(block.merge.norm, block.merge.linear.weight @ whole) + position)
    return out[::-1]


def encoded(block: LONGER, batch: Shape, history: History, r: int) -> list[Tensor]:
    """The last layer's tokens: recent ones, then global ones."""
    x = merged(block, events_of(block, batch, history, r))
    if not x:
        return []
    events, asks = len(x), min(len(x), block.recent)
    x = [*x, *block.globals]
    for layer in block.layers:
        y = [normalised(layer.norm, e) for e in x]
        answers = [answer(layer.heads, e) for e in y]
        new: list[Tensor] = []
        for t in range(events - asks, len(x)):
            seen = answers[: t + 1] if t < events else answers
            new.append(feed(layer.feed_forward, x[t] + affine(layer.out, attend(layer.heads, y[t], seen))))
        x, events = new, asks
    return x


@given(
    shapes(longest=12, most_candidates=2),
    st.sampled_from([0, 7]),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 3]),
    st.booleans(),
)
@settings(deadline=None, max_examples=15)
def test_equals_the_loop(batch: Shape, length: int, merge: int, recent: int, inner: bool):
    """On any batch, with groups and recent tokens of any number."""
    check(block_of(length=length, merge=merge, recent=recent, inner=inner), encoded, batch)


@pytest.mark.parametrize("inner", [False, True])
def test_equals_the_loop_at_the_edges(inner: bool):
    """On the batches that break things."""
    for name in SMALL_EDGES:
        check(block_of(inner=inner, age_buckets=0 if inner else 32), encoded, EDGES[name])


def test_equals_the_loop_over_many_chunks():
    """More merged tokens than attention works on at once, and than the cap."""
    batch = shape([290, 7], [(0, 0, 290), (1, 0, 7)], [2, 1])
    check(block_of(length=280, merge=2, recent=4), encoded, batch)


def test_a_later_event_changes_no_earlier_tokens_output():
    """But its own group's and later ones, and those of the global tokens, which no event sees."""
    history, _ = inputs_of(shape([30], [(0, 0, 30)], [1]), DIM)
    block = block_of(recent=10)
    x, _, _ = block.encoded(history)
    assert x.size(0) == 10 + 2
    for place in (0, 7, 29):
        changed = history.x.clone()
        changed[place] = 9.0
        other, _, _ = block.encoded(history._replace(x=changed))
        assert torch.equal(other[: place // 3], x[: place // 3])
        assert bool((other[place // 3 :] != x[place // 3 :]).any(1).all())
    with torch.no_grad():
        block.globals.add_(1.0)
    other, _, _ = block.encoded(history)
    assert torch.equal(other[:10], x[:10])
    assert bool((other[10:] != x[10:]).any(1).all())


def test_the_oldest_event_reaches_what_is_kept():
    """However few tokens that is."""
    history, _ = inputs_of(shape([400], [(0, 0, 400)], [1]), DIM)
    x = history.x.requires_grad_()
    kept, _, _ = block_of(recent=1).encoded(history)
    assert kept.size(0) == 3
    assert torch.autograd.grad(kept.square().sum(), x)[0][0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, r"heads: 4; must divide width \(6\)"),
        ({"merge": 0}, "merge: 0; must be at least 1"),
        ({"recent": 0}, "recent: 0; must be at least 1"),
        ({"global_tokens": 0}, "global_tokens: 0; must be at least 1"),
        ({"layers": 0}, "layers: 0; must be at least 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    """With their value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        block_of(**options)
