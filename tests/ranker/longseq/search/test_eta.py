"""ETA against loops over candidates, events and bits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Target
from ranker.longseq.search import ETA
from ranker.ops.simhash import hash_signs
from tests.ranker.histories import NO_PROBES, Shape, assert_same, differentiable, inputs_of, randomise
from tests.ranker.longseq.search.loops import (
    DIM,
    HEADS,
    SIZES,
    attends,
    caps,
    key,
    nearest,
    query,
    small_shape,
    tops,
    window_of,
)


def reference(block: ETA, batch: Shape, history: History, target: Target) -> Tensor:
    """Hashes of all heads' queries and keys, Hamming distances bit by bit, then attention."""
    project = block.attend.project
    out = [torch.zeros(0, block.out_dim, dtype=torch.float64)]
    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        keys = [torch.cat([key(project, h, history.x[i]) for h in range(HEADS)]) for i in window]
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            asked = torch.cat([query(project, h, target.x[n]) for h in range(HEADS)])
            found = [window[i] for i in nearest(block.planes, asked, keys, block.top)]
            out.append(attends(project, block.attend.age_bias, target.x[n], history, r, found).unsqueeze(0))
    return torch.cat(out)


@given(small_shape, caps, tops, st.sampled_from([1, 8]))
@settings(max_examples=25)
def test_equals_the_loop(batch: Shape, length: int, top: int, bits: int):
    """Outputs and gradients; with one bit, ties are the rule."""
    block = ETA(DIM, top=top, bits=bits, length=length, **SIZES)
    randomise(block)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    found = block(history, NO_PROBES, target)
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()])


@given(st.integers(1, 40), st.integers(0, 2**31))
@settings(max_examples=20)
def test_products_of_codes_are_hamming_distances(bits: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x, planes = torch.randn(6, 5, generator=generator), torch.randn(5, bits, generator=generator)
    code = hash_signs(x, planes).int()
    other = (code.unsqueeze(0) != code.unsqueeze(1)).sum(2)
    assert torch.equal(code @ code.T, bits - 2 * other)


def test_hashes_of_near_vectors_are_near():
    """A bit differs with the share of the angle in half a turn (Charikar 2002)."""
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(3, 20_000, generator=generator)
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, -2.0], [-1.0, 0.0, 0.0]])
    code = hash_signs(x, planes)
    shares = (code[0] != code).double().mean(1)
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.25, 0.5, 1.0]).double(), atol=0.02, rtol=0)


def test_planes_are_kept_with_the_state_and_not_trained():
    block = ETA(DIM, **SIZES)
    assert "planes" in block.state_dict()
    assert not any(name == "planes" for name, _ in block.named_parameters())
