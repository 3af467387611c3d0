"""Aggregator, C-Former and Poly-encoder against loops over requests, questions and events."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranker.longseq import History, Target
from ranker.longseq.groups import Aggregator, CFormer, PolyEncoder
from ranker.longseq.groups.cformer import CrossLayer
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    normalised,
    shapes,
)
from tests.ranker.longseq.groups.literal import DIM, age_bias, attended, block_of, gathered, projected, window_of

VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "Aggregator": (Aggregator, {}),
    "Aggregator, no ages": (Aggregator, {"age_buckets": 0}),
    "Poly-encoder": (PolyEncoder, {}),
    "Poly-encoder, no ages": (PolyEncoder, {"age_buckets": 0}),
    "C-Former": (CFormer, {}),
    "C-Former, no ages, no orthogonality": (CFormer, {"age_buckets": 0, "orthogonality_weight": 0.0}),
    "C-Former, no reconstruction": (CFormer, {"reconstruction_weight": 0.0}),
    "C-Former, no loss": (CFormer, {"reconstruction_weight": 0.0, "orthogonality_weight": 0.0}),
}
caps = st.sampled_from([0, 1, 7, 25])


def layered(layer: CrossLayer, slot: Tensor, e: list[Tensor], bias: list[Tensor]) -> Tensor:
    """One slot through one layer, head by head."""
    d = len(slot) // layer.heads
    asked = layer.query.weight @ normalised(layer.norm, slot)
    found: list[Tensor] = []
    for h in range(layer.heads):
        of = slice(h * d, (h + 1) * d)
        keys = [(layer.key_value.weight[: len(slot)] @ e_i)[of] for e_i in e]
        values = [(layer.key_value.weight[len(slot) :] @ e_i)[of] for e_i in e]
        found.append(gathered(asked[of], keys, bias, values))
    slot = slot + layer.out.weight @ torch.cat(found)
    norm, wide, _, narrow = layer.feed_forward
    assert isinstance(wide, nn.Linear)
    assert isinstance(narrow, nn.Linear)
    hidden = torch.clamp(wide.weight @ normalised(norm, slot) + wide.bias, min=0)
    return slot + narrow.weight @ hidden + narrow.bias


def lost(block: CFormer, events: list[Tensor], centroids: list[Tensor]) -> Tensor:
    """Σ‖x − x̂‖² / Σ‖x‖² of events at even quantiles."""
    sample = [events[(2 * j + 1) * len(events) // (2 * block.reconstructed)] for j in range(block.reconstructed)]
    wrong, whole = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x in sample:
        x = x.detach()
        keys = [projected(block.gather.event, c) for c in centroids]
        none = [torch.zeros((), dtype=torch.float64)] * len(keys)
        found = gathered(projected(block.gather.event, x), keys, none, centroids)
        wrong, whole = wrong + (x - found).square().sum(), whole + x.square().sum()
    return wrong / whole


def unlike(slots: list[Tensor]) -> Tensor:
    """‖S Sᵀ − I‖ / K of rows of length 1."""
    total = torch.zeros((), dtype=torch.float64)
    for i, a in enumerate(slots):
        for j, b in enumerate(slots):
            total = total + (a @ b / (a.norm() * b.norm()) - float(i == j)) ** 2
    return total.sqrt() / len(slots)


def reference(block: Any, batch: Shape, history: History, target: Target) -> Tensor:
    """Outputs, and last the block's own loss."""
    rows = [torch.zeros(0).double()]
    losses = [torch.zeros(0).double()]
    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        x = [history.x[i] for i in window]
        e = [projected(block.gather.event, x_i) for x_i in x]
        bias = [age_bias(block.gather.age.bias, history, r, i) for i in window]
        questions = list(block.codes if isinstance(block, PolyEncoder) else block.queries)
        if isinstance(block, CFormer) and x:
            for layer in block.layers:
                questions = [layered(layer, slot, e, bias) for slot in questions]
            questions = [normalised(block.norm, slot) for slot in questions]
        found = [gathered(q, e, bias, e if isinstance(block, PolyEncoder) else x) for q in questions] if x else []
        if isinstance(block, CFormer) and x:
            loss = block.reconstruction_weight * lost(block, x, found)
            losses.append((loss + block.orthogonality_weight * unlike(questions)).unsqueeze(0))
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            if not isinstance(block, PolyEncoder):
                alike = [torch.ones((), dtype=torch.float64)] * len(found)
                rows.append(attended(block.attention.project, target.x[n], found, alike))
            elif x:
                t = projected(block.candidate, target.x[n])
                rows.append(gathered(t, found, [torch.zeros(()).double()] * len(found), found))
            else:
                rows.append(target.x.new_zeros(block.out_dim))
    loss = torch.cat(losses)
    return torch.cat([*rows, loss.sum().unsqueeze(0) / max(1, len(loss))])


def check(batch: Shape, length: int, variant: str) -> None:
    """Outputs, the block's own loss, and gradients in events, candidates and all weights."""
    method, options = VARIANTS[variant]
    block = block_of(method, length=length, **options)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    memory = block.encode(history, NO_PROBES)
    found = torch.cat([block.read(memory, target).flatten(), block.auxiliary(history, memory).unsqueeze(0)])
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()], 1e-8)


@given(shapes(longest=9, most_candidates=2), caps, st.sampled_from(list(VARIANTS)))
@settings(deadline=None, max_examples=30)
def test_equals_the_loop(batch: Shape, length: int, variant: str):
    """On any batch, whatever is turned off."""
    check(batch, length, variant)


@pytest.mark.parametrize("variant", ["Aggregator", "Poly-encoder", "C-Former"])
@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_equals_the_loop_at_the_edges(name: str, variant: str):
    """On the batches that break things."""
    check(EDGES[name], 60, variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_loop_in_every_variant(variant: str):
    """With requests that share events."""
    check(EDGES["overlapping windows of one row"], 7, variant)


def test_only_training_keeps_what_the_loss_needs():
    """A store gets the groups alone."""
    history, _ = inputs_of(EDGES["empty beside full"], DIM)
    block = block_of(CFormer)
    kept, stored = block.train().encode(history, NO_PROBES), block.eval().encode(history, NO_PROBES)
    assert kept.slot.shape == (3, 3, 4)
    assert kept.centroid.shape == (3, 3, DIM)
    assert stored.slot.numel() == stored.centroid.numel() == 0
    assert float(block.train().auxiliary(history, kept).detach()) > 0
    for ours, theirs in zip(kept.group, stored.group, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_loss_does_not_shrink_events():
    """An event that is its own centroid is lost by nothing, and events as targets get no gradient."""
    block = block_of(CFormer, queries=1, orthogonality_weight=0.0, reconstructed=2)
    history, _, inputs = differentiable(*inputs_of(EDGES["one event"], DIM))
    loss = block.auxiliary(history, block.encode(history, NO_PROBES))
    assert float(loss.detach()) < 1e-12
    (gradient,) = torch.autograd.grad(loss, inputs[:1])
    assert float(gradient.norm()) < 1e-9
