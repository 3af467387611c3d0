"""Next-item loss and metrics against counting by hand."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.ops.next_item import hit_rate_at_k, in_batch_softmax, ndcg_at_k
from tests.ranker.histories import assert_same


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 25), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_metrics_equal_a_sort(queries: int, items: int, k: int, seed: int):
    """With ties, which count against the next item."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, [queries, items], generator=generator).float()
    target = torch.randint(0, items, [queries], generator=generator)
    hits, gains = 0, 0.0
    for row, item in zip(scores.tolist(), target.tolist(), strict=True):
        order = sorted(range(items), key=lambda i: (-row[i], i == item))
        place = order.index(item)
        hits += place < k
        gains += 1 / math.log2(place + 2) if place < k else 0.0
    torch.testing.assert_close(float(hit_rate_at_k(scores, target, k)), hits / queries)
    torch.testing.assert_close(float(ndcg_at_k(scores, target, k)), gains / queries, rtol=1e-5, atol=1e-6)


def literal_loss(predicted: Tensor, following: Tensor, event: list[int]) -> Tensor:
    """Row by row; predicted, following, event: one for each prediction, none taken together."""
    total = torch.zeros([], dtype=predicted.dtype)
    for i, own in enumerate(event):
        others = [j for j, other in enumerate(event) if j == i or other != own]
        logits = torch.stack([(predicted[i] * following[j]).sum() for j in others]) / predicted.size(1) ** 0.5
        total = total - torch.log_softmax(logits, 0)[others.index(i)]
    return total / len(event)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_what_stands_there_more_than_once_is_computed_once(rows: list[tuple[int, int]], seed: int):
    """Loss and gradients are those of a batch that spells every repetition out."""
    generator = torch.Generator().manual_seed(seed)
    event, times = torch.tensor(rows).unbind(1)
    shapes = ([len(rows), 3], [5, 3])
    predicted, following = (
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes
    )
    spelt = event.repeat_interleave(times)
    expected = literal_loss(predicted.repeat_interleave(times, 0), following[spelt], spelt.tolist())
    found = in_batch_softmax(predicted, following, event, times)
    assert_same(found, expected, [predicted, following])


def test_random_predictions_cost_the_logarithm_of_the_batch():
    """And perfect ones nothing."""
    event, times = torch.arange(10), torch.ones(10, dtype=torch.int64)
    random = in_batch_softmax(torch.zeros(10, 4), torch.randn(10, 4), event, times)
    torch.testing.assert_close(float(random), math.log(10))
    assert float(in_batch_softmax(1e3 * torch.eye(10), torch.eye(10), event, times)) < 1e-6


def test_nothing_to_predict_costs_nothing():
    """But keeps the graph."""
    none = torch.zeros(0, 4, requires_grad=True)
    loss = in_batch_softmax(none, none, *torch.zeros(2, 0, dtype=torch.int64))
    assert float(loss.detach()) == 0
    assert loss.requires_grad
