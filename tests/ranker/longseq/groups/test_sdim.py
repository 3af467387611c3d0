"""SDIM against a loop over hashes and events, and what SimHash promises of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Target
from ranker.longseq.groups import SDIM
from tests.ranker.histories import EDGES, NO_PROBES, Shape, assert_same, differentiable, inputs_of, shape, shapes
from tests.ranker.longseq.groups.literal import DIM, age_bias, block_of, window_of

caps = st.sampled_from([0, 1, 7, 25])


def reference(block: SDIM, batch: Shape, history: History, target: Target) -> Tensor:
    """ℓ_j = Σ_i [hash_j(s_i) = hash_j(q)] s_i, normalised, and the mean over j."""
    rows = [torch.zeros(0, DIM).double()]

    def signs(x: Tensor, j: int) -> list[bool]:
        return [bool(x.detach() @ plane > 0) for plane in block.planes[:, j].t()]

    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            found: list[Tensor] = []
            for j in range(block.hashes):
                total = torch.zeros(DIM, dtype=torch.float64)
                for i in window:
                    if signs(history.x[i], j) == signs(target.x[n], j):
                        total = total + age_bias(block.age.bias, history, r, i).exp() * history.x[i]
                found.append(total / total.norm() if total.any() else total)
            rows.append(torch.stack(found).mean(0).unsqueeze(0))
    return torch.cat(rows)


def check(batch: Shape, length: int, age_buckets: int) -> None:
    """Outputs, and gradients in events, candidates and weights; by the buckets of all, and the candidates' own."""
    block = block_of(SDIM, length=length, age_buckets=age_buckets)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    for found in (block(history, NO_PROBES, target), block.read_few(history, target)):
        # the norm has 1e-12 added to its square, and a bucket's sum may be small
        assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()], 1e-6)


@given(shapes(longest=12, most_candidates=2), caps, st.sampled_from([0, 8]))
@settings(deadline=None, max_examples=40)
def test_equals_the_loop(batch: Shape, length: int, age_buckets: int):
    """On any batch."""
    check(batch, length, age_buckets)


@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_equals_the_loop_at_the_edges(name: str):
    """On the batches that break things."""
    check(EDGES[name], 60, 8)


def test_few_candidates_are_fewer_than_half_the_buckets():
    """What training goes by: a candidate or three a request, of eight buckets."""
    block = block_of(SDIM, bits=3)
    for candidates, few in ((1, True), (3, True), (4, False), (11, False)):
        assert block.few(*inputs_of(shape([9], [(0, 0, 9)], [candidates]), DIM)) is few


def test_the_buckets_length_is_one():
    """Whatever the number of events and their lengths."""
    block = block_of(SDIM)
    history, _ = inputs_of(EDGES["longer than a chunk and than any cap"], DIM)
    norm = block.encode(history._replace(x=1e-3 * history.x), NO_PROBES).bucket.norm(dim=3)
    torch.testing.assert_close(norm, norm.round(), rtol=0, atol=1e-6)
    assert norm.any()


def test_planes_are_kept_with_the_state_and_not_trained():
    torch.manual_seed(0)
    block, other = SDIM(DIM), SDIM(DIM)
    assert "planes" in block.state_dict()
    assert not any("planes" in name for name, _ in block.named_parameters())
    assert not torch.equal(block.planes, other.planes)
    torch.manual_seed(0)
    assert torch.equal(SDIM(DIM).planes, block.planes)


@pytest.mark.parametrize("degrees", [10.0, 60.0, 120.0])
def test_an_event_is_found_as_often_as_its_angle_says(degrees: float):
    """(1 − θ/π)^bits of 4,000 hashes find a single event at an angle θ, within four standard deviations."""
    torch.manual_seed(0)
    block = SDIM(DIM, hashes=4000, bits=3, age_buckets=0).double()
    theta = math.radians(degrees)
    event = torch.tensor([[math.cos(theta), math.sin(theta), 0, 0, 0]], dtype=torch.float64)
    candidate = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64)
    history, target = inputs_of(shape([1], [(0, 0, 1)], [1]), DIM)
    out = block(history._replace(x=event), NO_PROBES, target._replace(x=candidate))
    expected = (1 - theta / math.pi) ** 3
    assert abs(float(out[0] @ event[0]) - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
