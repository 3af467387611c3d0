"""Inverses of unit lower triangular matrices against PyTorch's solver."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ranker.ops.triangular_inverse import unit_lower_inverse


def solved(a: torch.Tensor) -> torch.Tensor:
    """The definition: (I + tril(a, −1)) X = I, in float64."""
    eye = torch.eye(a.size(1), dtype=torch.float64).expand(a.size(0), -1, -1)
    return torch.linalg.solve_triangular(a.double(), eye, upper=False, unitriangular=True)


@given(batch=st.integers(0, 5), width=st.integers(1, 70), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_equals_the_solver(batch: int, width: int, seed: int):
    """For any width, whatever stands on and above the diagonal."""
    a = torch.randn(batch, width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = a / width**0.5
    torch.testing.assert_close(unit_lower_inverse(a), solved(a), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [8, 32, 64, 128])
def test_equal_keys_lose_nothing(width: int):
    """One item again and again, each time fully erased: powers of such a matrix have entries of 10^8 at width 32, its
    inverse has none above 1."""
    a = torch.ones(2, width, width)
    torch.testing.assert_close(unit_lower_inverse(a).double(), solved(a), rtol=0, atol=1e-6)
