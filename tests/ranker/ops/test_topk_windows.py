"""Search of jagged windows against its definition, and what it promises: ties, bounds, one batch or another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ranker.ops.topk_windows import naive_topk_windows, score_keys, topk_windows
from tests.ranker.histories import EDGES, Shape, outside, shape, shapes

any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
few = settings(deadline=None, max_examples=25)


def operands(batch: Shape, heads: int = 2, d: int = 4, levels: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and the bias of every pair; `levels`: small whole numbers, so that scores are exact and many are equal."""
    generator = batch.generator()
    pairs = sum(b - a for a, b in zip(batch.start, batch.end, strict=True))

    def numbers(*size: int) -> Tensor:
        if levels:
            return torch.randint(-levels, levels + 1, size, generator=generator).double()
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return numbers(batch.candidates, heads, d), numbers(batch.events, heads, d), numbers(pairs, heads)


@given(any_shape, st.integers(1, 3), st.sampled_from([1, 2, 5, 60]), st.sampled_from([0, 1]), st.booleans())
@settings(deadline=None, max_examples=60)
def test_equals_the_definition(batch: Shape, heads: int, top: int, levels: int, biased: bool):
    """Ties or not, with windows longer and shorter than K."""
    q, k, bias = operands(batch, heads, levels=levels)
    start, end, offsets = batch.windows()
    given_bias = bias if biased else None
    found = topk_windows(q, offsets, k, start, end, top, given_bias)
    assert torch.equal(found, naive_topk_windows(q, offsets, k, start, end, top, given_bias))


@pytest.mark.parametrize("places", [1, 1 << 12, 1 << 22])
@pytest.mark.parametrize("levels", [0, 1])
def test_windows_of_many_chunks_and_groups_equal_the_definition(places: int, levels: int):
    """Chunks from 64 events to whole windows, compared one by one and by groups."""
    batch = shape([1500, 40, 700], [(0, 0, 1500), (1, 3, 40), (2, 0, 700), (0, 200, 1300)], [3, 1, 0, 2])
    q, k, bias = operands(batch, 2, levels=levels)
    start, end, offsets = batch.windows()
    expected = naive_topk_windows(q, offsets, k, start, end, 3, bias)
    for group in (1, 4, 16, 1000):  # 1,000 neighbours: never by groups
        assert torch.equal(topk_windows(q, offsets, k, start, end, 3, bias, places, group), expected)


@given(st.integers(1, 300), st.integers(1, 12), st.sampled_from([64, 1 << 22]), st.integers(0, 2**31))
@few
def test_of_equal_scores_the_latest_events_are_found(events: int, top: int, places: int, seed: int):
    batch = shape([events], [(0, 0, events)], [2], seed)
    q, k, _ = operands(batch, 1)
    start, end, offsets = batch.windows()
    found = topk_windows(q, offsets, torch.zeros_like(k), start, end, top, None, places)
    latest = list(range(events - 1, max(-1, events - 1 - top), -1))
    assert found.tolist() == [[latest + [-1] * (top - len(latest))]] * 2


def test_the_definition_orders_by_score_then_by_recency():
    k = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0]).view(5, 1, 1)
    windows = torch.tensor([0]), torch.tensor([5])
    found = naive_topk_windows(torch.ones(1, 1, 1), torch.tensor([0, 1]), k, *windows, 7)
    assert found.tolist() == [[[3, 1, 2, 0, 4, -1, -1]]]


@given(any_shape, st.sampled_from([1, 5]))
@few
def test_events_outside_the_windows_are_not_found(batch: Shape, top: int):
    """However well they score; and what is there comes before what is not, however badly it scores."""
    q, k, bias = operands(batch)
    start, end, offsets = batch.windows()
    found = topk_windows(q, offsets, k, start, end, top, bias - 1e30)
    k = torch.where(outside(batch).view(-1, 1, 1), torch.full_like(k, float("nan")), k)
    assert torch.equal(topk_windows(q, offsets, k, start, end, top, bias - 1e30), found)
    lengths = torch.repeat_interleave(end - start, offsets.diff())
    assert torch.equal((found >= 0).sum(2), lengths.clamp(max=top).unsqueeze(1).expand(-1, 2))


@given(shapes(longest=200), st.integers(0, 2**31))
@few
def test_a_request_finds_the_same_alone_as_in_a_batch(batch: Shape, seed: int):
    """In float32, and among copies of events, whose products may differ in their last bits."""
    q, k, _ = (x.float() for x in operands(batch, 1, 16))
    k = k[torch.randint(0, max(batch.events // 3, 1), [batch.events])]
    start, end, offsets = batch.windows()
    together = topk_windows(q, offsets, k, start, end, 7)
    for r in range(batch.requests):
        rows = slice(batch.offsets[r], batch.offsets[r + 1])
        alone = torch.tensor([0, batch.offsets[r + 1] - batch.offsets[r]])
        of_one = topk_windows(q[rows], alone, k, start[r : r + 1], end[r : r + 1], 7)
        assert torch.equal(of_one, together[rows])


@given(st.lists(st.floats(-30_000, 30_000), min_size=2, max_size=20))
@few
def test_keys_keep_the_order_of_scores_more_than_a_step_apart(scores: list[float]):
    values = torch.tensor(sorted(scores), dtype=torch.float32)
    steps = score_keys(values, torch.zeros(len(scores), dtype=torch.int64)).diff()
    assert bool((steps >= 0).all())
    assert bool((steps[values.double().diff() > 2.0**-14] > 0).all())


def test_keys_of_equal_scores_go_by_place():
    """Of scores that differ in their last bits, and of all that are out of range."""
    score = torch.tensor([0.0, -0.0, 3.0, 3.000001, -1e30, -1e20, 1e30, 1e20])
    place = torch.tensor([4, 3]).repeat(4)
    assert (score_keys(score, place)[::2] - score_keys(score, place)[1::2]).tolist() == [1, 1, 1, 1]


def test_what_is_not_there_comes_after_all_that_is():
    assert bool((score_keys(torch.tensor([-np.inf, -1e30, 1e30]), torch.tensor([9, 0, 0])).diff() > 0).all())


def scores_in_memory(batch: Shape, places: int) -> int:
    """Elements of the largest tensor that a search makes."""
    q, k, _ = (x.float() for x in operands(batch, 1))
    start, end, offsets = batch.windows()
    with torch.profiler.profile(profile_memory=True) as profile:
        topk_windows(q, offsets, k, start, end, 4, None, places)
    return max(abs(e.device_memory_usage) + abs(e.cpu_memory_usage) for e in profile.events()) // 4


def test_memory_is_bounded_whatever_the_product_of_candidates_and_events():
    batch = shape([20_000], [(0, 0, 20_000)], [100])
    assert scores_in_memory(batch, 1 << 16) < 4 * (1 << 16) < 100 * 20_000 / 4
    assert scores_in_memory(batch, 1 << 22) > 1 << 20


def test_work_follows_the_sum_of_lengths():
    """One long history among 63 short ones: scored pairs are at most three times the true ones."""
    lengths = [20_000] + [20] * 63
    batch = shape(lengths, [(i, 0, n) for i, n in enumerate(lengths)], [2] * 64)
    q, k, _ = operands(batch, 1)
    start, end, offsets = batch.windows()
    with FlopCounterMode(display=False) as counter:
        topk_windows(q, offsets, k, start, end, 4)
    assert counter.get_total_flops() < 3 * 2 * 4 * 2 * (sum(lengths) + 64 * 64)


def test_scripted_is_the_same_on_other_sizes():
    scripted = torch.jit.script(topk_windows)
    for batch in (*EDGES.values(), shape([900], [(0, 0, 900)], [3])):
        q, k, bias = operands(batch)
        start, end, offsets = batch.windows()
        for given_bias in (None, bias):
            expected = topk_windows(q, offsets, k, start, end, 5, given_bias)
            for _ in range(2):
                assert torch.equal(scripted(q, offsets, k, start, end, 5, given_bias), expected)
