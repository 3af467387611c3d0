"""ELASTIC against loops over requests, layers, experts, events and heads, written from its description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History
from ranker.longseq.encoders import ELASTIC
from tests.ranker.histories import EDGES, NO_PROBES, Shape, inputs_of, randomise, shape, shapes
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
    zeros,
)

SMALL_EDGES = [name for name in EDGES if name not in ("skewed candidates", "longer than a chunk and than any cap")]


def block_of(**options: Any) -> ELASTIC:
    """A small block with random float64 weights."""
    small = {"width": WIDTH, "heads": HEADS, "experts": 3, "layers": 2, "pool": 7, "retrieve": 2}
    block = ELASTIC(DIM, **{**small, **options})
    randomise(block)
    return block


def hear(layer: Any, asking: list[Tensor], asked: list[Tensor], ask_norm: Any, answer_norm: Any) -> list[Tensor]:
    """One way of the dispatch."""
    answers = [answer(layer.heads, normalised(answer_norm, x)) for x in asked]
    found = [attend(layer.heads, normalised(ask_norm, x), answers) for x in asking]
    return [feed(layer.feed_forward, x + affine(layer.out, o)) for x, o in zip(asking, found, strict=True)]


def retrieved(block: ELASTIC, expert: Tensor) -> Tensor:
    """The best interests of the pool, weighed by their scores."""
    pool = block.retrieve
    if pool is None:
        return zeros()
    q = normalised(pool.norm, expert)
    scores = [(q @ key / WIDTH**0.5, value) for key, value in zip(pool.key, pool.value, strict=True)]
    best = sorted(scores, key=lambda pair: pair[0].item(), reverse=True)[: pool.best]
    weight = torch.softmax(torch.stack([score for score, _ in best]), 0)
    return sum((w * value for w, (_, value) in zip(weight, best, strict=True)), zeros())


def encoded(block: ELASTIC, batch: Shape, history: History, r: int) -> list[Tensor]:
    """The experts."""
    x = events_of(block, batch, history, r)
    if not x:
        return []
    experts = list(block.experts)
    for layer in block.layers:
        if (back := layer.dispatch) is not None:
            x = hear(back, x, experts, back.event_norm, back.expert_norm)
        experts = hear(layer.gather, experts, x, layer.gather.expert_norm, layer.gather.event_norm)
    return [expert + retrieved(block, expert) for expert in experts]


@given(shapes(longest=9, most_candidates=2), st.sampled_from([0, 5]), st.sampled_from([1, 2]), st.sampled_from([0, 7]))
@settings(deadline=None, max_examples=15)
def test_equals_the_loop(batch: Shape, length: int, layers: int, pool: int):
    """On any batch, with and without a way back and a pool."""
    check(block_of(length=length, layers=layers, pool=pool), encoded, batch)


@pytest.mark.parametrize("age_buckets", [0, 32])
def test_equals_the_loop_at_the_edges(age_buckets: int):
    """On the batches that break things."""
    for name in SMALL_EDGES:
        check(block_of(age_buckets=age_buckets), encoded, EDGES[name])


def test_equals_the_loop_over_many_chunks():
    """Longer than attention works on at once, and than the cap."""
    batch = shape([150, 7], [(0, 0, 150), (1, 0, 7)], [2, 1])
    check(block_of(length=140), encoded, batch)


def test_the_order_of_events_does_not_count():
    """Only their times do: what is kept is a function of the set of events."""
    history, _ = inputs_of(shape([40], [(0, 0, 40)], [1]), DIM)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    mixed = history._replace(x=history.x[order], time=history.time[order])
    block = block_of()
    torch.testing.assert_close(block.encode(mixed, NO_PROBES).v, block.encode(history, NO_PROBES).v)


def test_events_reach_one_another_through_the_experts():
    """An event's token after the way back depends on every other event."""
    history, _ = inputs_of(shape([40], [(0, 0, 40)], [1]), DIM)
    x = history.x.requires_grad_()
    seen: list[Tensor] = []
    block = block_of()
    block.layers[1].dispatch.register_forward_hook(lambda _, __, out: seen.append(out))
    block.encode(history, NO_PROBES)
    (gradient,) = torch.autograd.grad(seen[0][3].square().sum(), x)
    assert bool(gradient.any(1).all())


def test_only_the_best_interests_are_used():
    """And trained: the others get no gradient."""
    history, _ = inputs_of(shape([40], [(0, 0, 40)], [1]), DIM)
    block = block_of(experts=1, pool=20, retrieve=3)
    assert block.retrieve is not None
    block.encode(history, NO_PROBES).v.square().sum().backward()
    for table in (block.retrieve.key, block.retrieve.value):
        assert table.grad is not None
        assert int(table.grad.any(1).sum()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4}, r"heads: 4; must divide width \(6\)"),
        ({"experts": 0}, "experts: 0; must be at least 1"),
        ({"layers": 0}, "layers: 0; must be at least 1"),
        ({"retrieve": 8}, r"retrieve: 8; must be at least 1 and at most pool \(7\)"),
        ({"retrieve": 0}, r"retrieve: 0; must be at least 1 and at most pool \(7\)"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    """With their value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        block_of(**options)
