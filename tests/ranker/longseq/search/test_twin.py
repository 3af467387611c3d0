"""TWIN against loops over candidates, heads and events."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from torch import Tensor

from ranker.longseq import History, Target
from ranker.longseq.search import TWIN
from tests.ranker.histories import NO_PROBES, Shape, assert_same, differentiable, inputs_of, randomise, shape
from tests.ranker.longseq.search.loops import (
    BUCKETS,
    DIM,
    HEAD_DIM,
    HEADS,
    SIZES,
    best,
    bucket,
    caps,
    head_attends,
    key,
    query,
    small_shape,
    tops,
    window_of,
)


def reference(block: TWIN, batch: Shape, history: History, target: Target) -> Tensor:
    """Each head's logits search and attend: softmax over its K greatest."""
    out = [torch.zeros(0, block.out_dim, dtype=torch.float64)]
    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            heads: list[Tensor] = []
            for h in range(HEADS):
                bias = [block.cross.weight[h] @ history.x[i] for i in window]
                if block.age_bias is not None:
                    bias = [b + block.age_bias[bucket(history, r, i), h] for b, i in zip(bias, window, strict=True)]
                q = query(block.project, h, target.x[n])
                keys = [key(block.project, h, history.x[i]) for i in window]
                found = best([q @ k / HEAD_DIM**0.5 + b for k, b in zip(keys, bias, strict=True)], block.top)
                events = [history.x[window[i]] for i in found]
                heads.append(head_attends(block.project, h, target.x[n], events, [bias[i] for i in found]))
            out.append(torch.cat(heads).unsqueeze(0))
    return torch.cat(out)


@given(small_shape, caps, tops)
@settings(max_examples=25)
def test_equals_the_loop(batch: Shape, length: int, top: int):
    """Outputs and gradients."""
    block = TWIN(DIM, top=top, length=length, **(SIZES | {"age_buckets": BUCKETS if top < 20 else 0}))
    randomise(block)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    found = block(history, NO_PROBES, target)
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()])


def test_heads_find_events_of_their_own():
    """An event whose own features speak for it to one head alone is found by that head alone."""
    block = TWIN(DIM, top=1, **SIZES)
    randomise(block)
    batch = shape([9], [(0, 0, 9)], [1])
    history, target = inputs_of(batch, DIM)
    with torch.no_grad():
        block.cross.weight.zero_()
        block.cross.weight[1] = 1e3 * history.x[4] / history.x[4].square().sum()
        values = block.project.value(history.x).view(9, HEADS, HEAD_DIM)
        found = block(history, NO_PROBES, target).view(HEADS, HEAD_DIM)
    assert bool((values[:, 1] == found[1]).all(1)[4])
    assert not bool((values[:, 0] == found[0]).all(1)[4])


def test_what_an_event_is_by_itself_counts_once_an_event_and_not_once_a_request():
    """The scalars of the event's own features are of distinct events: eight requests of a row cost one product each."""
    block = TWIN(DIM, **SIZES)
    history, _ = inputs_of(shape([50], [(0, 0, 50)] * 8, [1] * 8), DIM)
    seen: list[int] = []
    block.cross.register_forward_hook(lambda module, inputs, output: seen.append(output.size(0)))
    block.float().encode(history._replace(x=history.x.float()), NO_PROBES)
    assert seen == [50]
