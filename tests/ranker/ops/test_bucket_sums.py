"""Sums of queries' own buckets against their definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.ops.bucket_sums import bucket_sums, naive_bucket_sums
from ranker.ops.jagged import offsets_of

any_windows = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)).map(sorted), max_size=6)


def check(windows: list[list[int]], counts: list[int], hashes: int, seed: int) -> None:
    """Sums, and gradients in events and weights."""
    generator = torch.Generator().manual_seed(seed)
    start, end = (torch.tensor([w[i] for w in windows], dtype=torch.int64) for i in (0, 1))
    q_offsets = offsets_of(torch.tensor(counts, dtype=torch.int64))
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(int((end - start).sum()), generator=generator, dtype=torch.float64).requires_grad_()
    bucket = torch.randint(0, 3, [40, hashes], generator=generator)
    asked = torch.randint(0, 3, [sum(counts), hashes], generator=generator)
    direction = torch.randn(sum(counts), hashes, 3, generator=generator, dtype=torch.float64)
    everything: list[list[Tensor]] = []
    for form in (bucket_sums, naive_bucket_sums):
        out = form(x, bucket, weight, start, end, asked, q_offsets)
        gradients = torch.autograd.grad(
            (out * direction).sum() + 0 * (x.sum() + weight.sum()), [x, weight], materialize_grads=True
        )
        everything.append([out, *gradients])
    torch.testing.assert_close(*everything)


@given(windows=any_windows, data=st.data(), hashes=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_equals_the_definition(windows: list[list[int]], data: st.DataObject, hashes: int, seed: int):
    """For windows that overlap or are empty, and requests without queries."""
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(windows), max_size=len(windows)))
    check(windows, counts, hashes, seed)


def test_requests_of_one_user():
    """Whose windows differ by an event, so that they share tiles; beside another user's."""
    check([[0, 20 + i] for i in range(8)] + [[22, 38 + i] for i in range(3)], [1] * 11, 4, 0)
    check([[i, 20 + i] for i in range(8)], [1, 2, 0, 1, 1, 1, 2, 1], 2, 1)


def test_more_than_a_block(monkeypatch):
    """Units are worked on block by block."""
    monkeypatch.setattr("ranker.ops.bucket_sums.BLOCK", 64)
    check([[0, 40], [3, 40], [0, 11]], [2, 2, 2], 4, 2)
