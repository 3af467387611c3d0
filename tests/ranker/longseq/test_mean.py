"""Mean pooling against a loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import MeanPooling
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    outside,
    own_rows,
    shapes,
)

any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
caps = st.sampled_from([0, 1, 3, 10])


def reference(batch: Shape, x: Tensor, length: int) -> Tensor:
    """The mean of each request's latest events, for each of its candidates."""
    rows: list[Tensor] = []
    for r in range(batch.requests):
        events = x[batch.start[r] : batch.end[r]][-length:]  # [-0:] keeps all
        mean = events.mean(0) if len(events) else x.new_zeros(x.size(1))
        rows += [mean] * (batch.offsets[r + 1] - batch.offsets[r])
    return torch.stack(rows) if rows else x.new_zeros(0, x.size(1))


@given(any_shape, caps)
@settings(deadline=None)
def test_equals_the_loop(batch: Shape, length: int):
    """Outputs and gradients, cut to the latest events or not."""
    history, target, inputs = differentiable(*inputs_of(batch, 3))
    found = MeanPooling(3, length)(history, NO_PROBES, target)
    assert found.shape == (batch.candidates, 3)
    assert_same(found, reference(batch, history.x, length), inputs)


@given(any_shape, caps)
@settings(deadline=None, max_examples=30)
def test_sharing_a_row_is_having_ones_own(batch: Shape, length: int):
    """Requests that share a history row get what copies of it would give."""
    history, target = inputs_of(batch, 3)
    block = MeanPooling(3, length)
    torch.testing.assert_close(block(history, NO_PROBES, target), block(own_rows(history), NO_PROBES, target))


@given(any_shape, caps)
@settings(deadline=None, max_examples=30)
def test_unseen_events_and_time_change_nothing(batch: Shape, length: int):
    """The mean knows only its window's vectors."""
    history, target, inputs = differentiable(*inputs_of(batch, 3))
    block = MeanPooling(3, length)
    out = block(history, NO_PROBES, target)
    unseen = outside(batch, length)
    changed = history._replace(x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=history.time + 7)
    torch.testing.assert_close(block(changed, NO_PROBES, target), out)
    if out.requires_grad:
        (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
        assert gradient[unseen].abs().sum() < 1e-12


def test_encode_then_read_and_script():
    """The memory, one row a request, is all that `read` needs; TorchScript gives the same on every size."""
    for length in (0, 2):
        block = MeanPooling(3, length)
        scripted = torch.jit.script(block)
        for batch in EDGES.values():
            history, target = inputs_of(batch, 3)
            memory = block.encode(history, NO_PROBES)
            assert memory.mean.shape == (batch.requests, 3)
            expected = block(history, NO_PROBES, target)
            torch.testing.assert_close(block.read(memory, target), expected, rtol=0, atol=0)
            for _ in range(2):
                torch.testing.assert_close(scripted(history, NO_PROBES, target), expected)
