"""Pointwise attention against its definition, token by token, and what it keeps for the backward pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.ops.jagged import log_bucket, offsets_of
from ranker.ops.pointwise_attention import naive_pointwise_attention, pointwise_attention
from tests.ranker.histories import assert_same

any_lengths = st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 33, 60]), max_size=4)


def operands(lengths: list[int], seed: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v, between and elapsed; offsets and seconds, those of neighbours equal, near or far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype).requires_grad_()

    tokens = sum(lengths)
    inputs = [normal(tokens, 2, 3), normal(tokens, 2, 3), normal(tokens, 2, 4), normal(9), normal(7)]
    gap_s = torch.randint(0, 8, [tokens], generator=generator).double().exp2().long() - 1
    return inputs, offsets_of(torch.tensor(lengths, dtype=torch.int64)), 1_700_000_000 + gap_s.cumsum(0)


@given(any_lengths, st.sampled_from([1, 7, 16, 128]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_equals_the_token_loop(lengths: list[int], chunk: int, seed: int):
    """For every chunk; so do its gradients."""
    inputs, offsets, second = operands(lengths, seed)
    q, k, v, between, elapsed = inputs
    expected = naive_pointwise_attention(q, k, v, offsets, second, between, elapsed)
    assert_same(pointwise_attention(q, k, v, offsets, second, between, elapsed, chunk), expected, inputs)


@pytest.mark.parametrize("power", range(24))
def test_time_falls_into_the_buckets_that_ages_fall_into(power: int):
    """Around each power of two seconds."""
    for gap_s in (2**power - 1, 2**power, 2**power + 1):
        one, elapsed = torch.ones(2, 1, 1, dtype=torch.float64), torch.arange(32, dtype=torch.float64)
        second = torch.tensor([5, 5 + gap_s])
        zero = torch.zeros(1, dtype=torch.float64)
        found = pointwise_attention(
            0 * one, one, one * torch.tensor([2.0, 0.0]).view(2, 1, 1), torch.tensor([0, 2]), second, zero, elapsed
        )
        assert float(found[1]) == pytest.approx(
            float(torch.nn.functional.silu(log_bucket(second[1:] - second[0], 32).double()))
        )


def kept_bytes(length: int) -> int:
    """What the forward pass keeps for the backward pass, beyond its inputs."""
    inputs, offsets, second = operands([length], 0)
    q, k, v, between, elapsed = inputs
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        pointwise_attention(q, k, v, offsets, second, between, elapsed, 32)
    return sum(sizes.values())


def test_what_is_kept_for_the_backward_pass_follows_the_length():
    """And not its square."""
    assert 0 < kept_bytes(1024) < 4.5 * kept_bytes(256)


def test_scripts():
    """And gives the same."""
    scripted = torch.jit.script(pointwise_attention)
    for lengths in ([70, 0, 3], [], [0]):
        inputs, offsets, second = operands(lengths, 1, torch.float32)
        q, k, v, between, elapsed = inputs
        for _ in range(2):
            found = scripted(q, k, v, offsets, second, between, elapsed, 16)
            torch.testing.assert_close(found, pointwise_attention(q, k, v, offsets, second, between, elapsed, 16))
