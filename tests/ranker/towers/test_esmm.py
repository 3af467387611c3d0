"""The losses of CTR and CTCVR against 60-digit arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.towers import click_losses, esmm_loss, esmm_probabilities

logits = st.floats(-40, 40)
rows = st.lists(st.tuples(logits, logits, st.integers(0, 1), st.integers(0, 1)), max_size=12)
extremes = [(a, b, y, z) for a in (-40.0, 0.0, 40.0) for b in (-40.0, 0.0, 40.0) for y in (0, 1) for z in (0, 1)]


def sigmoid(x: float) -> Decimal:
    """1 / (1 + e^−x)."""
    return 1 / (1 + (-Decimal(x)).exp())


def reference(batch: list[tuple[float, float, int, int]]) -> tuple[list[float], list[list[float]]]:
    """Both summed losses and the gradient of their sum, from pCTR = σ(a), pCTCVR = σ(a) σ(b)."""
    with localcontext() as context:
        context.prec = 60
        ctr = ctcvr = Decimal(0)
        gradient: list[list[float]] = []
        for a, b, click, conversion in batch:
            p, q = sigmoid(a), sigmoid(b)
            both = p * q
            converted = click == 1 and conversion == 1
            ctr -= (p if click else 1 - p).ln()
            ctcvr -= (both if converted else 1 - both).ln()
            # d ln pq = (1 − p) da + (1 − q) db, and d ln(1 − pq) = −pq / (1 − pq) d ln pq
            weight = Decimal(-1) if converted else both / (1 - both)
            gradient.append([float(p - click + weight * (1 - p)), float(weight * (1 - q))])
        return [float(ctr), float(ctcvr)], gradient


def tensors(batch: list[tuple[float, float, int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits `[N, 2]` and labels `[N, 2]`."""
    x = torch.tensor([row[:2] for row in batch], dtype=dtype).view(-1, 2).requires_grad_()
    return x, torch.tensor([row[2:] for row in batch], dtype=dtype).view(-1, 2)


def check(batch: list[tuple[float, float, int, int]], dtype: torch.dtype, tolerance: float) -> None:
    """Losses and gradients."""
    batch = [(float(torch.tensor(a, dtype=dtype)), float(torch.tensor(b, dtype=dtype)), y, z) for a, b, y, z in batch]
    x, labels = tensors(batch, dtype)
    losses = esmm_loss(x, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    expected, expected_gradient = reference(batch)
    torch.testing.assert_close(
        losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        gradient.double(),
        torch.tensor(expected_gradient, dtype=torch.float64).view(-1, 2),
        rtol=tolerance,
        atol=tolerance,
    )


@given(rows)
@settings(deadline=None)
def test_losses_and_gradients(batch: list[tuple[float, float, int, int]]):
    """At any logits within ±40."""
    check(batch, torch.float64, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("row", extremes)
def test_extreme_logits(row: tuple[float, float, int, int], dtype: torch.dtype):
    """A confident mistake costs what it should, and is still pushed back, in float32 too."""
    check([row], dtype, 1e-9 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("size", [60.0, 100.0, 200.0, 1e4])
def test_absurd_logits_stay_finite(size: float):
    """In float32: a diverging run shows a large loss, not NaN."""
    batch = [(a, b, y, z) for a in (-size, size) for b in (-size, size) for y in (0, 1) for z in (0, 1)]
    x, labels = tensors(batch, torch.float32)
    losses = esmm_loss(x, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 2.0


def test_conversions_count_on_clicks_only():
    """A conversion label without its click is no conversion."""
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0.0, 1.0]]).expand(5, 2)
    assert torch.equal(esmm_loss(x, labels), esmm_loss(x, torch.zeros(5, 2)))


def test_click_alone():
    """One task: the click loss of both tasks, and no other."""
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 2, [7, 2], generator=torch.Generator().manual_seed(1)).float()
    assert torch.equal(esmm_loss(x[:, :1], labels[:, :1]), esmm_loss(x, labels)[:1])


def test_probabilities_are_those_of_the_losses():
    """pCTR, pCTCVR = pCTR · pCVR, pCVR; their cross-entropies are the losses."""
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(0, 2, [50, 2], generator=torch.Generator().manual_seed(1)).double()
    p = esmm_probabilities(x)
    torch.testing.assert_close(p[:, 1], p[:, 0] * p[:, 2])
    torch.testing.assert_close(p[:, [0, 2]], x.sigmoid())
    truth = torch.stack([labels[:, 0], labels.prod(1)], 1)
    entropies = torch.nn.functional.binary_cross_entropy(p[:, :2], truth, reduction="none").sum(0)
    torch.testing.assert_close(esmm_loss(x, labels), entropies)
    torch.testing.assert_close(esmm_probabilities(x[:, :1]), p[:, :1])


def test_no_candidates():
    """A rank that has run out adds nothing."""
    for tasks in (1, 2):
        x = torch.zeros(0, tasks, requires_grad=True)
        losses = esmm_loss(x, torch.zeros(0, tasks))
        losses.sum().backward()
        assert losses.tolist() == [0.0] * tasks
        assert esmm_probabilities(x).shape == (0, 1 if tasks == 1 else 3)


def test_scripted_is_the_same_on_other_sizes():
    """TorchScript gives the same numbers whatever sizes came before."""
    scripted = torch.jit.script(esmm_probabilities)
    for shape in ([3, 2], [3, 1], [0, 2], [20, 2], [20, 1]):
        x = torch.randn(shape)
        torch.testing.assert_close(scripted(x), esmm_probabilities(x))


@pytest.mark.parametrize(("n", "k"), [(7, 3), (7, 0), (0, 2)])
def test_each_further_prediction_of_clicks_has_the_loss_of_a_click(n: int, k: int):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(n, k, generator=generator), torch.randint(0, 2, [n, 2], generator=generator).float()
    expected = [float(esmm_loss(logits[:, i : i + 1], labels)) for i in range(k)]
    assert click_losses(logits, labels).tolist() == pytest.approx(expected)
