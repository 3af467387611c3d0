"""The pass written by hand against autograd's through the same sums, and what is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ranker.ops.unit_softmax import UnitSums, unit_softmax

UNITS, WIDTH, CHUNK = 5, 3, 7


def drawn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def by_definition(q: Tensor, k: Tensor, v: Tensor, offset: Tensor | None, hidden: Tensor | None) -> UnitSums:
    """Of a softmax that begins at the greatest logit, a constant."""
    logits = k @ q if offset is None else k @ q + offset
    logits = logits if hidden is None else logits.masked_fill(hidden, float("-inf"))
    top = logits.detach().amax(1).clamp(min=-1e30)
    weight = (logits - top.unsqueeze(1)).exp()
    return UnitSums(top, weight.sum(1), weight.transpose(1, 2) @ v)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("columns", [0, 1, WIDTH])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_definition_with_its_gradients(shared: bool, columns: int, masked: bool):
    """With values that are the keys or not, an offset of the events or of the pairs, and a unit hidden as a whole."""
    torch.manual_seed(0)
    q, k = drawn(UNITS, 4, WIDTH), drawn(UNITS, CHUNK, 4)
    v = k if shared else drawn(UNITS, CHUNK, 6)
    offset = drawn(UNITS, CHUNK, columns) if columns else None
    hidden = torch.rand(UNITS, CHUNK, WIDTH) < 0.4 if masked else None
    if hidden is not None:
        hidden[2] = True
    inputs = [x for x in (q, k, None if shared else v, offset) if x is not None]
    ways: list[list[Tensor]] = []
    for way in (unit_softmax, by_definition):
        found = way(q, k, v, offset, hidden)
        assert not found.top.requires_grad
        torch.manual_seed(1)
        loss = (found.total * torch.randn_like(found.total)).sum() + (
            found.summed * torch.rand(6 if not shared else 4)
        ).sum()
        ways.append([*found, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_queries_alone_may_want_a_gradient():
    """As those of a store's frozen keys."""
    q, k, v = drawn(UNITS, 4, WIDTH), drawn(UNITS, CHUNK, 4, grad=False), drawn(UNITS, CHUNK, 6, grad=False)
    (one,) = torch.autograd.grad(unit_softmax(q, k, v).summed.sum(), [q])
    (other,) = torch.autograd.grad(by_definition(q, k, v, None, None).summed.sum(), [q])
    torch.testing.assert_close(one, other)


def test_without_a_gradient_and_scripted_it_gives_the_same():
    q, k, v = drawn(UNITS, 4, WIDTH), drawn(UNITS, CHUNK, 4), drawn(UNITS, CHUNK, 6)
    ours = unit_softmax(q, k, v)
    with torch.no_grad():
        torch.testing.assert_close(unit_softmax(q, k, v), UnitSums(*(x.detach() for x in ours)))
    scripted = torch.jit.script(unit_softmax)(q, k, v)
    torch.testing.assert_close(tuple(scripted), tuple(ours))


def test_one_array_of_the_weights_is_kept():
    kept = 0

    def count(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.shape == (UNITS, CHUNK, WIDTH)
        return x

    q, k = drawn(UNITS, 4, WIDTH), drawn(UNITS, CHUNK, 4)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        unit_softmax(q, k, k)
    assert kept == 1
