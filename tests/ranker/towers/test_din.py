"""DIN against its definition, built from its own weights: an MLP on [e_t; e_i; e_t − e_i; e_t ⊙ e_i] for every pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Target
from ranker.towers import DIN
from tests.ranker.histories import (
    EDGES,
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

DIM = 4
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
caps = st.sampled_from([0, 1, 7, 50])


def block_of(
    length: int = 0,
    softmax: bool = False,
    age_buckets: int = 8,
    hidden: tuple[int, ...] = (6, 3),
    normalise: bool = True,
) -> DIN:
    """A small block with random float64 weights."""
    block = DIN(DIM, list(hidden), length, softmax, age_buckets, normalise)
    randomise(block)
    return block


def seen(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """What the activation unit sees of an event or a candidate."""
    return x if isinstance(norm, torch.nn.Identity) else normalised(norm, x)


def reference(block: DIN, batch: Shape, history: History, target: Target) -> Tensor:
    """Σ_i MLP([e_t; e_i; e_t − e_i; e_t ⊙ e_i]) e_i over the latest events."""
    first = torch.cat([block.w_target, block.w_event, block.w_difference, block.w_product])
    linears = [layer for layer in block.rest if isinstance(layer, torch.nn.Linear)]
    rows: list[Tensor] = []
    for r in range(batch.requests):
        window = range(batch.start[r], batch.end[r])
        window = window[-block.length :] if block.length else window
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            e_t = seen(block.target_norm, target.x[n])
            weights: list[Tensor] = []
            for i in window:
                e_i = seen(block.event_norm, history.x[i])
                hidden = torch.cat([e_t, e_i, e_t - e_i, e_t * e_i]) @ first + block.bias
                if block.age is not None:
                    age_s = max(0, (int(history.now[r]) - int(history.time[i])) // 1000)
                    hidden = hidden + block.age[min(age_s.bit_length(), block.age_buckets - 1)]
                for linear in linears:
                    hidden = linear.weight @ hidden.relu() + linear.bias
                weights.append(hidden)
            row = target.x[n] * 0
            if weights:
                weight = torch.cat(weights)
                weight = weight.softmax(0) if block.softmax else weight
                row = row + weight @ history.x[list(window)]
            rows.append(row)
    return torch.stack(rows) if rows else target.x.new_zeros(0, DIM)


def check(
    batch: Shape, length: int, softmax: bool, age_buckets: int, hidden: tuple[int, ...], normalise: bool = True
) -> None:
    """Outputs and gradients, in events, candidates and all weights."""
    block = block_of(length, softmax, age_buckets, hidden, normalise)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    assert_same(block(history, target), reference(block, batch, history, target), [*inputs, *block.parameters()], 1e-8)


@given(
    shapes(longest=12, most_candidates=2),
    caps,
    st.booleans(),
    st.sampled_from([0, 8]),
    st.sampled_from([(6,), (6, 3)]),
    st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_equals_the_definition(
    batch: Shape, length: int, softmax: bool, age_buckets: int, hidden: tuple[int, ...], normalise: bool
):
    """With or without softmax, age buckets, a second layer and LayerNorms."""
    check(batch, length, softmax, age_buckets, hidden, normalise)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_equals_the_definition_at_the_edges(name: str, softmax: bool):
    """On the batches that break things; some windows are longer than the 50 events read."""
    check(EDGES[name], 50, softmax, 8, (6,))


@given(any_shape, caps)
@settings(deadline=None, max_examples=30)
def test_sharing_a_row_is_having_ones_own(batch: Shape, length: int):
    """Requests that share a history row get what copies of it would give."""
    history, target = inputs_of(batch, DIM)
    block = block_of(length)
    torch.testing.assert_close(block(own_rows(history), target), block(history, target))


@given(any_shape, caps, st.booleans())
@settings(deadline=None, max_examples=30)
def test_unseen_events_change_nothing(batch: Shape, length: int, softmax: bool):
    """Nor do they get a gradient."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    block = block_of(length, softmax)
    out = block(history, target)
    unseen = outside(batch, length)
    changed = history._replace(
        x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=torch.where(unseen, 0, history.time)
    )
    torch.testing.assert_close(block(changed, target), out)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
    assert not gradient[unseen].any()


@given(any_shape, st.integers(-(10**12), 10**12))
@settings(deadline=None, max_examples=30)
def test_only_ages_count_and_candidates_are_apart(batch: Shape, shift_ms: int):
    """Moving all times changes nothing; reordering a request's candidates reorders the outputs."""
    history, target = inputs_of(batch, DIM)
    block, order = block_of(), permuted(batch)
    expected = block(history, target)
    moved = history._replace(time=history.time + shift_ms, now=history.now + shift_ms)
    torch.testing.assert_close(block(moved, target), expected, rtol=0, atol=0)
    torch.testing.assert_close(block(history, target._replace(x=target.x[order])), expected[order])


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("age_buckets", [0, 8])
def test_scripted_is_the_same_on_other_sizes(softmax: bool, age_buckets: int):
    """TorchScript gives the same numbers whatever sizes came before."""
    block = block_of(10, softmax, age_buckets)
    scripted = torch.jit.script(block)
    for batch in EDGES.values():
        history, target = inputs_of(batch, DIM)
        for _ in range(2):
            torch.testing.assert_close(scripted(history, target), block(history, target))
