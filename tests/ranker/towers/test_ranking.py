"""The loss of the order within a group against its definition, and what it does not see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.towers import ranking_loss
from tests.ranker.histories import assert_same

rows = st.lists(st.tuples(st.floats(-20, 20), st.integers(0, 1), st.sampled_from([-3, 0, 7, 2**40])), max_size=20)
Rows = list[tuple[float, int, int]]


def tensors(batch: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """logit, label, group."""
    logit = torch.tensor([s for s, _, _ in batch], dtype=torch.float64, requires_grad=True)
    return logit, torch.tensor([float(y) for _, y, _ in batch]), torch.tensor([g for *_, g in batch], dtype=torch.int64)


def definition(logit: Tensor, batch: Rows) -> Tensor:
    """Σ −log e^s / (e^s + Σ e^t), click by click."""
    total = logit.sum() * 0
    for i, (_, clicked, group) in enumerate(batch):
        against = [logit[j] for j, (_, y, g) in enumerate(batch) if g == group and not y]
        if clicked and against:
            total = total + torch.logsumexp(torch.stack([logit[i], *against]), 0) - logit[i]
    return total


@given(rows)
@settings(deadline=None)
def test_equals_the_definition(batch: Rows):
    """Gradients too; groups of any number, also those of clicks alone and of none."""
    logit, label, group = tensors(batch)
    assert_same(ranking_loss(logit, label, group), definition(logit, batch), [logit])


@given(rows, st.floats(-5, 5))
@settings(deadline=None)
def test_a_groups_level_does_not_count(batch: Rows, shift: float):
    logit, label, group = tensors(batch)
    moved = logit + shift * (group == 7)
    torch.testing.assert_close(ranking_loss(moved, label, group), ranking_loss(logit, label, group))


def test_a_click_and_a_non_click_are_bpr():
    """−log σ(s − t)."""
    logit, label, group = tensors([(1.5, 1, 0), (0.5, 0, 0), (3.0, 0, 1), (2.0, 1, 2)])
    assert float(ranking_loss(logit, label, group).detach()) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-12)


@pytest.mark.parametrize("size", [1e2, 1e6, 1e20])
def test_absurd_logits_stay_finite(size: float):
    """In float32, with a gradient for the wrong order."""
    logit = torch.tensor([-size, size, size, -size], requires_grad=True)
    loss = ranking_loss(logit, torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert bool(loss.isfinite())
    assert logit.grad is not None
    assert logit.grad.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0])
