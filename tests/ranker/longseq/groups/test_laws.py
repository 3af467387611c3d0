"""What holds for every method that keeps a constant number of vectors of a history."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq.groups import LSH, SDIM, VQL, Aggregator, CFormer, KMeans, Patching, PolyEncoder
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    differentiable,
    inputs_of,
    outside,
    own_rows,
    permuted,
    shape,
    shapes,
)
from tests.ranker.longseq.groups.literal import DIM, METHODS, block_of

any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
caps = st.sampled_from([0, 1, 7, 25])
every = pytest.mark.parametrize("name", METHODS)
few = settings(deadline=None, max_examples=8)


@every
@given(batch=any_shape, length=caps)
@few
def test_sharing_a_row_is_having_ones_own(name: str, batch: Shape, length: int):
    """Requests that share a history row get what copies of it would give."""
    history, target = inputs_of(batch, DIM)
    block = block_of(METHODS[name], length=length)
    torch.testing.assert_close(block(own_rows(history), NO_PROBES, target), block(history, NO_PROBES, target))


@every
@given(batch=any_shape, length=caps)
@few
def test_unseen_events_change_nothing(name: str, batch: Shape, length: int):
    """Nor do they get a gradient, of the block's own loss neither."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    block = block_of(METHODS[name], length=length)
    memory = block.encode(history, NO_PROBES)
    out, loss = block.read(memory, target), block.auxiliary(history, memory)
    unseen = outside(batch, length)
    changed = history._replace(
        x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=torch.where(unseen, 0, history.time)
    )
    torch.testing.assert_close(block(changed, NO_PROBES, target), out)
    torch.testing.assert_close(block.auxiliary(changed, block.encode(changed, NO_PROBES)), loss)
    (gradient,) = torch.autograd.grad(out.square().sum() + loss, inputs[:1], allow_unused=True, materialize_grads=True)
    assert float(gradient[unseen].abs().sum()) < 1e-12  # differences of running sums round


@every
@given(batch=any_shape)
@few
def test_candidates_do_not_see_each_other(name: str, batch: Shape):
    """Reordering the candidates of a request reorders the outputs."""
    history, target = inputs_of(batch, DIM)
    block, order = block_of(METHODS[name]), permuted(batch)
    found = block(history, NO_PROBES, target._replace(x=target.x[order]))
    torch.testing.assert_close(found, block(history, NO_PROBES, target)[order])


@every
@given(batch=any_shape, shift_ms=st.integers(-(10**12), 10**12))
@few
def test_only_ages_count(name: str, batch: Shape, shift_ms: int):
    """Moving events and requests by the same time changes nothing."""
    history, target = inputs_of(batch, DIM)
    block = block_of(METHODS[name])
    moved = history._replace(time=history.time + shift_ms, now=history.now + shift_ms)
    torch.testing.assert_close(block(moved, NO_PROBES, target), block(history, NO_PROBES, target), rtol=0, atol=0)


def stored_bytes(value: Any) -> int:
    """Of all tensors of a memory."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(stored_bytes(part) for part in value)


@every
def test_the_memory_does_not_grow_with_the_history(name: str):
    """`memory_bytes` a request, for one event or 3,000; candidates still read what differs."""
    block = block_of(METHODS[name]).eval()
    for length in (3000, 1, 10):
        history, target = inputs_of(shape([length], [(0, 0, length)], [4]), DIM)
        memory = block.encode(history, NO_PROBES)
        assert stored_bytes(memory) == block.memory_bytes(8)
        assert not block.auxiliary(history, memory).any()
    out = block.read(memory, target)
    assert out.shape == (4, block.out_dim)
    assert (out[0] - out[1]).abs().max() > 1e-4


@every
def test_without_events_a_candidate_reads_zeros(name: str):
    """And the gradients of everything are finite, beside requests with events and alone."""
    for edge in ("empty beside full", "no events"):
        history, target, inputs = differentiable(*inputs_of(EDGES[edge], DIM))
        block = block_of(METHODS[name])
        memory = block.encode(history, NO_PROBES)
        out = block.read(memory, target)
        full = torch.tensor([edge == "empty beside full" and 3 <= n < 5 for n in range(len(out))])
        assert not out[~full].any()
        assert out[full].abs().sum() > 0 or edge == "no events"
        loss = out.square().sum() + block.auxiliary(history, memory)
        gradients = torch.autograd.grad(loss, [*inputs, *block.parameters()], allow_unused=True, materialize_grads=True)
        assert all(bool(g.isfinite().all()) for g in (*gradients, loss))


@every
@pytest.mark.parametrize("ages", [True, False])
def test_scripted_is_the_same(name: str, ages: bool):
    """TorchScript gives the same on every size, in training and not, and so does `read` of `encode`."""
    method = METHODS[name]
    block = block_of(method, length=10, **({} if ages or method is VQL else {"age_buckets": 0}))
    scripted = torch.jit.script(block)
    for batch in EDGES.values():
        history, target = inputs_of(batch, DIM)
        expected = block(history, NO_PROBES, target)
        torch.testing.assert_close(block.read(block.encode(history, NO_PROBES), target), expected, rtol=0, atol=0)
        for training in (True, False):
            torch.testing.assert_close(scripted.train(training)(history, NO_PROBES, target), expected)


@every
def test_an_untrained_candidate_reads_what_its_own_kind_of_events_would_give(name: str):
    """More or less, in a history with a kind of events in each half."""
    torch.manual_seed(0)
    method = METHODS[name]
    block = method(16)
    kinds = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    batch = shape([80], [(0, 0, 80), (0, 0, 40), (0, 40, 80)], [2, 2, 2])
    history, target = inputs_of(batch, 16)
    noise = 0.05 * history.x.float()
    history = history._replace(x=kinds.repeat_interleave(40, 0) + noise, content=noise[:, :0])
    both, first, second = block(history, NO_PROBES, target._replace(x=kinds.repeat(3, 1))).detach().split(2)
    for candidate, own, other in ((0, first, second), (1, second, first)):
        ours, theirs = ((both[candidate] - alone[candidate]).norm() for alone in (own, other))
        assert ours < theirs


@pytest.mark.parametrize(
    ("method", "wrong", "message"),
    [
        (SDIM, {"hashes": 0}, "hashes: 0; must be at least 1"),
        (SDIM, {"bits": 11}, r"bits: 11; must be from 1 to 10: there are 2\^bits buckets"),
        (VQL, {"codes": 0}, "codes: 0; must be at least 1"),
        (VQL, {"periods_s": [60.0, 0.0]}, r"periods_s: \[60.0, 0.0\]; must be positive, in seconds"),
        (CFormer, {"layers": 0}, "layers: 0; must be at least 1"),
        (CFormer, {"queries": 9, "width": 8}, r"queries: 9; must be at most width \(8\): raise width"),
        (CFormer, {"queries": 3, "width": 9}, r"heads: 2; must divide width \(9\)"),
        (KMeans, {"clusters": 0}, "clusters: 0; must be at least 1"),
        (KMeans, {"steps": -1}, "steps: -1; must be at least 0"),
        (KMeans, {"head_dim": 1}, "head_dim: 1; must be at least 2"),
        (LSH, {"bits": 0}, r"bits: 0; must be from 1 to 10: there are 2\^bits groups"),
        (Patching, {"patches": 0}, "patches: 0; must be at least 1"),
        (Aggregator, {"queries": 0}, "queries: 0; must be at least 1"),
        (PolyEncoder, {"width": 1}, "width: 1; must be at least 2"),
    ],
)
def test_refuses_what_cannot_work(method: type[Any], wrong: dict[str, Any], message: str):
    """Naming the option, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        method(DIM, **wrong)
