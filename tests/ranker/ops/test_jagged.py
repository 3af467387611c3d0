"""Each operation against a loop that says the same."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.ops.jagged import (
    expand_windows,
    log_bucket,
    offsets_of,
    segment_softmax,
    segment_sum,
    segments_of,
    window_mean,
)
from tests.ranker.histories import EDGES, Shape, assert_same, shapes

lengths_lists = st.lists(st.integers(0, 9), max_size=8)
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))


@given(lengths_lists)
def test_offsets_and_segments_name_the_same_segments(lengths: list[int]):
    """Lengths to offsets to each element's segment, as by counting."""
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    assert offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert segments_of(offsets).tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]


@given(any_shape)
def test_expand_windows_lists_every_pair_in_order(batch: Shape):
    """Tokens and windows of all pairs, window after window, as by two loops."""
    start, end, _ = batch.windows()
    token, window = expand_windows(start, end)
    pairs = [(t, r) for r in range(batch.requests) for t in range(batch.start[r], batch.end[r])]
    assert list(zip(token.tolist(), window.tolist(), strict=True)) == pairs


@given(lengths_lists, st.integers(1, 3))
def test_segment_sum_and_softmax(lengths: list[int], heads: int):
    """Sums and softmaxes within segments; empty segments sum to zero. Segments need not be sorted."""
    generator = torch.Generator().manual_seed(sum(lengths))
    segment = segments_of(offsets_of(torch.tensor(lengths, dtype=torch.int64)))
    segment = segment[torch.randperm(segment.numel(), generator=generator)]
    x = torch.randn(segment.numel(), heads, generator=generator, dtype=torch.float64).requires_grad_()
    summed = torch.zeros(len(lengths), heads, dtype=torch.float64)
    softmax = torch.zeros_like(x)
    for i in range(len(lengths)):
        mine = torch.nonzero(segment == i).flatten()
        summed = summed.index_copy(0, torch.tensor([i]), x[mine].sum(0, keepdim=True))
        softmax = softmax.index_copy(0, mine, torch.softmax(x[mine], 0))
    assert_same(segment_sum(x, segment, len(lengths)), summed, [x])
    assert_same(segment_softmax(x, segment, len(lengths)), softmax, [x])


def test_segment_softmax_does_not_overflow():
    """Scores of any size, in float32."""
    scores = torch.tensor([[1e4], [1e4 - 1], [-1e30], [3.0]])
    found = segment_softmax(scores, torch.tensor([0, 0, 1, 1]), 2)
    torch.testing.assert_close(found.flatten(), torch.tensor([1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0.0, 1.0]))


@given(any_shape)
@settings(deadline=None)
def test_window_mean(batch: Shape):
    """The mean of each window's rows, zero for an empty window."""
    start, end, _ = batch.windows()
    x = torch.randn(batch.events, 3, generator=batch.generator(), dtype=torch.float64).requires_grad_()
    rows = [x[a:b].mean(0) if a < b else x.new_zeros(3) for a, b in zip(batch.start, batch.end, strict=True)]
    assert_same(window_mean(x, start, end), torch.stack(rows) if rows else x.new_zeros(0, 3), [x])


def test_window_mean_loses_nothing_over_long_histories():
    """A short window behind 300,000 events whose sum dwarfs it, in float32."""
    x = torch.full([300_010, 1], 1e3)
    x[-10:] = 1e-3
    found = window_mean(x, torch.tensor([300_000]), torch.tensor([300_010]))
    torch.testing.assert_close(found, torch.tensor([[1e-3]]), rtol=1e-4, atol=0)


@given(st.lists(st.integers(-5, 2**40), min_size=1), st.integers(1, 40))
def test_log_bucket_is_the_number_of_bits(gaps: list[int], buckets: int):
    """Powers of two open a bucket, exactly; negative gaps count as zero; the last bucket holds the rest."""
    found = log_bucket(torch.tensor(gaps), buckets)
    assert found.tolist() == [min(max(gap, 0).bit_length(), buckets - 1) for gap in gaps]


@pytest.mark.parametrize("power", range(41))
def test_log_bucket_at_powers_of_two(power: int):
    """2^p − 1 | 2^p."""
    assert log_bucket(torch.tensor([2**power - 1, 2**power]), 64).tolist() == [power, power + 1]
