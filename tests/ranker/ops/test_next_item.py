"""Next-item loss and metrics against counting by hand."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.ops.next_item import hit_rate_at_k, in_batch_softmax, ndcg_at_k


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


def test_random_predictions_cost_the_logarithm_of_the_batch():
    """And perfect ones nothing."""
    event = torch.arange(10)
    torch.testing.assert_close(float(in_batch_softmax(torch.zeros(10, 4), torch.randn(10, 4), event)), math.log(10))
    assert float(in_batch_softmax(1e3 * torch.eye(10), torch.eye(10), event)) < 1e-6


def test_one_event_is_not_its_own_negative():
    """Requests that share a row may have the same next event."""
    predicted, following = torch.randn(3, 4), torch.randn(3, 4)
    twice = in_batch_softmax(predicted[[0, 1, 1]], following[[0, 1, 1]], torch.tensor([5, 6, 6]))
    once = [in_batch_softmax(predicted[:2], following[:2], torch.tensor([5, 6]))]
    logits = predicted[:2] @ following[:2].t() / 2
    loss = -torch.log_softmax(logits, 1).diag()
    torch.testing.assert_close(once[0], loss.mean())
    first = -torch.log_softmax(logits[0, [0, 1, 1]], 0)[0]
    torch.testing.assert_close(twice, (first + 2 * loss[1]) / 3)


def test_nothing_to_predict_costs_nothing():
    """But keeps the graph."""
    none = torch.zeros(0, 4, requires_grad=True)
    loss = in_batch_softmax(none, none, torch.zeros(0, dtype=torch.int64))
    assert float(loss.detach()) == 0
    assert loss.requires_grad
