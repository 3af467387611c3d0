"""Rows by index, and the sums that are their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.ops import take_rows as module
from ranker.ops.take_rows import sum_rows, take_rows


@given(rows=st.integers(1, 50), count=st.integers(0, 300), width=st.integers(1, 5), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_sums_are_those_of_index_add(rows: int, count: int, width: int, seed: int):
    """Rows that nobody asks for, and none at all."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, rows, [count], generator=generator)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sum_rows(x, index, rows), torch.zeros(rows, width, dtype=x.dtype).index_add(0, index, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [100, module.FEWEST, module.RADIX + 1])
def test_gradients_are_those_of_index_select(count: int, dtype: torch.dtype):
    """On both sides of what decides how they are summed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(70, 3, generator=generator).to(dtype).requires_grad_()
    index = torch.randint(0, 60, [count], generator=generator)
    weight = torch.randn(count, 3, generator=generator).to(dtype)
    found, expected = take_rows(x, index), x.index_select(0, index)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out, x, weight)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    assert not gradients[0][60:].any()
