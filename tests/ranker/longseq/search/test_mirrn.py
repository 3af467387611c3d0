"""MIRRN against loops over candidates, events, positions and frequencies; and its filter."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Target
from ranker.longseq.search import MIRRN
from ranker.longseq.search.mirrn import FrequencyFilter
from tests.ranker.histories import (
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    normalised,
    randomise,
    shape,
)
from tests.ranker.longseq.search.loops import (
    DIM,
    HEADS,
    SIZES,
    bucket,
    caps,
    head_attends,
    nearest,
    small_shape,
    window_of,
)

BLOCKS = 2


def block_of(top: int = 3, length: int = 0, age_buckets: int = 8) -> MIRRN:
    """A small block with random float64 weights."""
    sizes = SIZES | {"age_buckets": age_buckets}
    block = MIRRN(DIM, top=top, bits=6, recent=4, blocks=BLOCKS, length=length, **sizes)
    randomise(block)
    return block


def filtered(layer: FrequencyFilter, x: Tensor) -> Tensor:
    """x + F⁻¹(F(x) W) of one sequence `[K, dim]`, normalised: a literal DFT, frequency by frequency."""
    length, dim = x.shape
    size = dim // BLOCKS
    w = torch.complex(layer.real, layer.imaginary)
    mixed: list[Tensor] = []  # [K] of [dim]
    for f in range(length):
        of_f = torch.stack([cmath.exp(-2j * math.pi * f * t / length) * x[t] for t in range(length)]).sum(0)
        if f > length // 2:  # of a real sequence: the conjugate of its mirror, so that the result is real too
            mixed.append(mixed[length - f].conj())
            continue
        mixed.append(torch.cat([of_f[b * size : b * size + size] @ w[b] for b in range(BLOCKS)]))
    back = torch.stack(
        [sum(cmath.exp(2j * math.pi * f * t / length) * mixed[f] for f in range(length)).real for t in range(length)]  # type: ignore[union-attr]
    )
    return torch.stack([normalised(layer.norm, y) for y in x + back / length])


def interest(block: MIRRN, layer: FrequencyFilter, asked: Tensor, history: History, r: int, window: range) -> Tensor:
    """Search, order by time, position and age, filter, mean over what was found."""
    found = sorted(window[i] for i in nearest(block.planes, asked, [history.x[i] for i in window], block.top))
    rows = [torch.zeros(DIM, dtype=torch.float64)] * (block.top - len(found))
    for i in found:
        row = history.x[i] + block.position[int(history.end[r] - i).bit_length()]
        rows.append(row if block.age is None else row + block.age[bucket(history, r, i)])
    return filtered(layer, torch.stack(rows))[block.top - len(found) :].mean(0)


def reference(block: MIRRN, batch: Shape, history: History, target: Target) -> Tensor:
    """Each candidate attends to three interests, all searched for it anew."""
    out = [torch.zeros(0, block.out_dim, dtype=torch.float64)]
    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        events = [history.x[i] for i in window]
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            interests: list[Tensor] = []
            if events:
                recent, every = torch.stack(events[-4:]).mean(0), torch.stack(events).mean(0)
                layers = (block.of_target, block.of_recent, block.of_all)
                for layer, asked in zip(layers, (target.x[n], recent, every), strict=True):
                    interests.append(interest(block, layer, asked, history, r, window))
            none = [torch.zeros([], dtype=torch.float64)] * len(interests)
            heads = [head_attends(block.project, h, target.x[n], interests, none) for h in range(HEADS)]
            out.append(torch.cat(heads).unsqueeze(0))
    return torch.cat(out)


@given(small_shape, caps, st.sampled_from([1, 3, 6]), st.sampled_from([0, 8]))
@settings(max_examples=12)
def test_equals_the_loop(batch: Shape, length: int, top: int, age_buckets: int):
    """Outputs and gradients."""
    block = block_of(top, length, age_buckets)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    found = block(history, NO_PROBES, target)
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()], 1e-8)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9])
def test_the_filter_is_the_literal_transform(length: int):
    """Forward, mixed, back; sequences of odd and even length."""
    layer = FrequencyFilter(DIM, length, BLOCKS)
    randomise(layer)
    x = torch.randn(4, length, DIM, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    x.requires_grad_()
    expected = torch.stack([filtered(layer, sequence) for sequence in x])
    assert_same(layer(x), expected, [x, *layer.parameters()])


def test_the_filter_is_the_fast_transform_too():
    """As `torch.fft` has it, at the size in use."""
    layer = FrequencyFilter(48, 50, 4)
    randomise(layer)
    x = torch.randn(3, 50, 48, dtype=torch.float64)
    w = torch.complex(layer.real, layer.imaginary)
    mixed = torch.einsum("nfbi,bij->nfbj", torch.fft.rfft(x, dim=1).unflatten(2, [4, 12]), w).flatten(2)
    torch.testing.assert_close(layer(x), layer.norm(x + torch.fft.irfft(mixed, n=50, dim=1)))


def test_channels_mix_within_their_block_and_not_beyond():
    """And positions mix: a change of one channel at one position reaches its whole block at all of them."""
    layer = FrequencyFilter(DIM, 5, BLOCKS)
    randomise(layer)
    layer.norm = torch.nn.Identity()  # which would mix all channels
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    for channel in range(DIM):
        changed = x.clone()
        changed[0, 2, channel] += 1
        moved = (layer(changed) - layer(x)).abs()[0] > 1e-6
        block = channel // (DIM // BLOCKS)
        inside = torch.arange(DIM) // (DIM // BLOCKS) == block
        assert bool(moved[:, inside].all())
        assert not bool(moved[:, ~inside].any())


def test_what_knows_no_candidate_is_made_once_a_request():
    """Two of the three searches and filters cost the same for one candidate and for a hundred."""
    block = block_of()
    filtered: list[int] = []
    for layer in (block.of_recent, block.of_all, block.of_target):
        layer.register_forward_hook(lambda module, inputs, output: filtered.append(output.size(0)))
    history, target = inputs_of(shape([30], [(0, 0, 30)], [100]), DIM)
    block(history, NO_PROBES, target)
    assert filtered == [1, 1, 100]


def test_blocks_must_divide_the_width_of_an_event():
    with pytest.raises(ValueError, match=r"blocks: 4; must divide the width of an event \(6\)"):
        MIRRN(6, blocks=4)
