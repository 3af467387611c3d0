"""Target attention against a loop over requests, candidates and heads, written from its weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Target, TargetAttention
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    normalised,
    outside,
    own_rows,
    permuted,
    randomise,
    shapes,
)

DIM = 5
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
caps = st.sampled_from([0, 1, 7, 25])


def block_of(length: int = 0, age_buckets: int = 8, heads: int = 2) -> TargetAttention:
    """A small block with random float64 weights."""
    block = TargetAttention(DIM, heads=heads, head_dim=3, length=length, age_buckets=age_buckets)
    randomise(block)
    return block


def reference(block: TargetAttention, batch: Shape, history: History, target: Target) -> Tensor:
    """softmax(q · k_i / √d + b[⌊log2 age_i⌋ + 1]) v_i over the request's latest events, head by head."""
    d = block.out_dim // block.heads
    out = torch.zeros(batch.candidates, block.out_dim, dtype=torch.float64)
    rows: list[Tensor] = []
    for r in range(batch.requests):
        window = range(batch.start[r], batch.end[r])
        window = window[-block.length :] if block.length else window
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            heads: list[Tensor] = []
            for h in range(block.heads):
                of = slice(h * d, (h + 1) * d)
                q = normalised(block.project.query_norm, block.project.query.weight[of] @ target.x[n])
                logits: list[Tensor] = []
                values: list[Tensor] = []
                for i in window:
                    logit = q @ normalised(block.project.key_norm, block.project.key.weight[of] @ history.x[i]) / d**0.5
                    if block.age_bias is not None:
                        age_s = max(0, (int(history.now[r]) - int(history.time[i])) // 1000)
                        logit = logit + block.age_bias[min(age_s.bit_length(), block.age_buckets - 1), h]
                    logits.append(logit)
                    values.append(block.project.value.weight[of] @ history.x[i])
                heads.append(
                    torch.softmax(torch.stack(logits), 0) @ torch.stack(values) if logits else out.new_zeros(d)
                )
            rows.append(torch.cat(heads))
    return torch.stack(rows) if rows else out


def check(batch: Shape, length: int, age_buckets: int) -> None:
    """Outputs and gradients, in events, candidates and all weights."""
    block = block_of(length, age_buckets)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    found = block(history, NO_PROBES, target)
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()])


@given(shapes(longest=12, most_candidates=2), caps, st.sampled_from([0, 8]))
@settings(deadline=None, max_examples=40)
def test_equals_the_loop(batch: Shape, length: int, age_buckets: int):
    """On any batch."""
    check(batch, length, age_buckets)


@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_equals_the_loop_at_the_edges(name: str):
    """On the batches that break things."""
    check(EDGES[name], 250, 8)


@given(any_shape, caps)
@settings(deadline=None, max_examples=30)
def test_sharing_a_row_is_having_ones_own(batch: Shape, length: int):
    """Requests that share a history row get what copies of it would give."""
    history, target = inputs_of(batch, DIM)
    block = block_of(length)
    torch.testing.assert_close(block(own_rows(history), NO_PROBES, target), block(history, NO_PROBES, target))


@given(any_shape, caps)
@settings(deadline=None, max_examples=30)
def test_unseen_events_change_nothing(batch: Shape, length: int):
    """Nor do they get a gradient."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    block = block_of(length)
    out = block(history, NO_PROBES, target)
    unseen = outside(batch, length)
    changed = history._replace(
        x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=torch.where(unseen, 0, history.time)
    )
    torch.testing.assert_close(block(changed, NO_PROBES, target), out)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
    assert not gradient[unseen].any()


@given(any_shape, st.integers(-(10**12), 10**12))
@settings(deadline=None, max_examples=30)
def test_only_ages_count(batch: Shape, shift_ms: int):
    """Moving events and requests by the same time changes nothing."""
    history, target = inputs_of(batch, DIM)
    block = block_of()
    moved = history._replace(time=history.time + shift_ms, now=history.now + shift_ms)
    torch.testing.assert_close(block(moved, NO_PROBES, target), block(history, NO_PROBES, target), rtol=0, atol=0)


@given(any_shape)
@settings(deadline=None, max_examples=30)
def test_candidates_do_not_see_each_other(batch: Shape):
    """Reordering the candidates of a request reorders the outputs."""
    history, target = inputs_of(batch, DIM)
    block, order = block_of(), permuted(batch)
    found = block(history, NO_PROBES, target._replace(x=target.x[order]))
    torch.testing.assert_close(found, block(history, NO_PROBES, target)[order])


@pytest.mark.parametrize("age_buckets", [0, 8])
def test_encode_then_read_and_script(age_buckets: int):
    """`forward` is `read` of `encode`; TorchScript gives the same on every size."""
    block = block_of(10, age_buckets)
    scripted = torch.jit.script(block)
    for batch in EDGES.values():
        history, target = inputs_of(batch, DIM)
        expected = block(history, NO_PROBES, target)
        found = block.read(block.encode(history, NO_PROBES), target)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for _ in range(2):
            torch.testing.assert_close(scripted(history, NO_PROBES, target), expected)
