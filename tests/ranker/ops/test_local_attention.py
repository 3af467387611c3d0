"""Local causal attention against its definition, token by token, and running means against a loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.ops.jagged import offsets_of
from ranker.ops.local_attention import local_attention, naive_local_attention
from ranker.ops.running_mean import mean_up_to, running_mean, running_mean_plan
from tests.ranker.histories import assert_same

any_lengths = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 31, 33, 70, 150]), max_size=5)


@given(any_lengths, st.sampled_from([0, 1, 2, 16, 17, 40, 64, 100]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_local_attention_equals_the_token_loop(lengths: list[int], window: int, seed: int):
    """For every window, and 0 for the whole past; so do its gradients."""
    generator = torch.Generator().manual_seed(seed)
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    inputs = [
        torch.randn(sum(lengths), 2, d, generator=generator, dtype=torch.float64).requires_grad_() for d in (3, 3, 4)
    ]
    q, k, v = inputs
    assert_same(local_attention(q, k, v, offsets, window), naive_local_attention(q, k, v, offsets, window), inputs)


@given(any_lengths, st.sampled_from([1, 4, 32]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_running_mean_equals_the_loop(lengths: list[int], block: int, seed: int):
    """For every block size; so do its gradients."""
    generator = torch.Generator().manual_seed(seed)
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    x = torch.randn(sum(lengths), 3, generator=generator, dtype=torch.float64).requires_grad_()
    bounds = offsets.tolist()
    expected = [x[a : t + 1].mean(0) for a, b in pairwise(bounds) for t in range(a, b)]
    found = running_mean(x, running_mean_plan(offsets, x, block))
    assert_same(found, torch.stack(expected) if expected else x, [x])


def test_a_running_mean_keeps_its_precision_over_long_sequences():
    """In float32, over a million tokens after a great sum: what is lost is lost among the 32 tokens of a block, each of
    whose products and sums is rounded by 2^-24 at most."""
    x = torch.cat([torch.full([1000, 1], 1e6), torch.ones(1_000_000, 1)])
    found = running_mean(x, running_mean_plan(torch.tensor([0, 1000, 1_001_000]), x))
    torch.testing.assert_close(found, x, rtol=2 * 32 * 2**-24, atol=0)


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), max_size=4), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_the_mean_of_beginnings_equals_the_loop(seen: list[list[int]], seed: int):
    """Of several beginnings of each sequence, in any order; so do its gradients."""
    generator = torch.Generator().manual_seed(seed)
    firsts = [sum(max(earlier) for earlier in seen[:i]) for i in range(len(seen))]
    windows = [(a, a + n) for a, counts in zip(firsts, seen, strict=True) for n in counts]
    windows = [windows[i] for i in torch.randperm(len(windows), generator=generator)]
    tokens = sum(max(counts) for counts in seen)
    x = torch.randn(tokens, 3, generator=generator, dtype=torch.float64).requires_grad_()
    first, end = torch.tensor(windows, dtype=torch.int64).view(-1, 2).t().contiguous()
    expected = [x[a:b].sum(0) / max(b - a, 1) for a, b in windows]
    assert_same(mean_up_to(x, first, end), torch.stack(expected) if expected else x[:0], [x])


@pytest.mark.parametrize("window", [0, 20])
def test_both_script(window: int):
    """And give the same."""
    attention, mean, plan = (torch.jit.script(f) for f in (local_attention, running_mean, running_mean_plan))
    for lengths in ([70, 0, 3], [], [0]):
        offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
        x = torch.randn(sum(lengths), 2, 3)
        torch.testing.assert_close(attention(x, x, x, offsets, window), local_attention(x, x, x, offsets, window))
        flat = x.flatten(1)
        torch.testing.assert_close(
            mean(flat, plan(offsets, flat)), running_mean(flat, running_mean_plan(offsets, flat))
        )
