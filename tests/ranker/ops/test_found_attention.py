"""Attention to found events against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.ops.found_attention import found_attention, take_found
from tests.ranker.histories import assert_same


def definition(q: Tensor, kv: Tensor, event: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q · k_i / √d + b_i) v_i, candidate by candidate, head by head."""
    out = torch.zeros(q.size(0), q.size(1), kv.size(2) - q.size(2), dtype=q.dtype)
    for n in range(q.size(0)):
        for h in range(q.size(1)):
            of_head = event[n, h if event.size(1) > 1 else 0].tolist()
            found = [(place, i) for place, i in enumerate(of_head) if i >= 0]
            logits = [kv[i, h, : q.size(2)] @ q[n, h] / q.size(2) ** 0.5 for _, i in found]
            if bias is not None:
                logits = [logit + bias[n, h, place] for logit, (place, _) in zip(logits, found, strict=True)]
            if found:
                weight = torch.softmax(torch.stack(logits), 0)
                out[n, h] = weight @ torch.stack([kv[i, h, q.size(2) :] for _, i in found])
    return out


@given(st.integers(0, 4), st.integers(0, 6), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=40)
def test_equals_the_loop(candidates: int, events: int, top: int, by_head: bool, biased: bool, seed: int):
    """Each head's own events or those of all, none of them found or some, and no events at all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    q, kv, bias = normal(candidates, 2, 3), normal(events, 2, 3 + 4), normal(candidates, 2, top)
    event = torch.randint(-1, max(events, 0), [candidates, 2 if by_head else 1, top], generator=generator)
    given_bias = bias if biased else None
    found = found_attention(q, kv, event, given_bias)
    assert_same(found, definition(q, kv, event, given_bias), [q, kv, bias])


@pytest.mark.parametrize("events", [0, 3])
def test_who_finds_nothing_reads_zero(events: int):
    """With finite gradients, which are zero."""
    q, kv = torch.randn(2, 1, 3, requires_grad=True), torch.randn(events, 1, 5, requires_grad=True)
    out = found_attention(q, kv, torch.full([2, 1, 4], -1))
    assert not out.any()
    gradients = torch.autograd.grad(out.sum(), [q, kv])
    assert not any(bool(g.any()) for g in gradients)


def test_rows_are_taken_in_any_shape():
    x = torch.arange(6.0).view(3, 2)
    assert take_found(x, torch.tensor([[2, 0]])).tolist() == [[[4.0, 5.0], [0.0, 1.0]]]
    assert take_found(x[:0], torch.tensor([[-1, -1]])).shape == (1, 2, 2)
