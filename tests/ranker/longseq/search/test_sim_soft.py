"""SIM soft against loops over candidates and events, its own loss included; and the sums that make it cheap."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranker.longseq import History, Target
from ranker.longseq.search import SimSoft
from ranker.ops.outer_sums import naive_outer_sums, outer_sums
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    normalised,
    outside,
    randomise,
    shape,
    shapes,
)
from tests.ranker.longseq.search.loops import (
    DIM,
    SIZES,
    attends,
    best,
    caps,
    key,
    query,
    small_shape,
    tops,
    value,
    window_of,
)

any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))


def block_of(top: int = 3, length: int = 0) -> SimSoft:
    """A small block with random float64 weights."""
    block = SimSoft(DIM, top=top, search_dim=4, length=length, **SIZES)
    randomise(block)
    return block


def reference(block: SimSoft, batch: Shape, history: History, target: Target) -> tuple[Tensor, Tensor]:
    """(1) and (2), candidate by candidate and event by event."""
    out, logits = [torch.zeros(0, block.out_dim).double()], [torch.zeros(0, 1).double()]
    first, _, last = block.click
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            c = query(block.search, 0, target.x[n])
            likeness = [c @ key(block.search, 0, history.x[i]) / 4**0.5 for i in window]
            found = [window[i] for i in best(likeness, block.top)]
            attend = block.attend
            out.append(attends(attend.project, attend.age_bias, target.x[n], history, r, found).unsqueeze(0))
            u = torch.zeros(4).double()
            for i, like in zip(window, likeness, strict=True):
                u = u + like * value(block.search, 0, history.x[i]) / len(window)
            u = normalised(block.gathered_norm, u)
            hidden = torch.clamp(first.weight @ torch.cat([c, u, c * u]) + first.bias, min=0)
            logits.append((last.weight @ hidden + last.bias).unsqueeze(0))
    return torch.cat(out), torch.cat(logits)


@given(small_shape, caps, tops)
@settings(max_examples=25)
def test_equals_the_loop(batch: Shape, length: int, top: int):
    """Outputs, the search unit's logits, and gradients."""
    block = block_of(top, length)
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    memory = block.encode(history, NO_PROBES)
    found = block.read(memory, target), block.click_logits(memory, target)
    for ours, theirs in zip(found, reference(block, batch, history, target), strict=True):
        assert_same(ours, theirs, [*inputs, *block.parameters()], 1e-8)


def test_the_search_unit_learns_from_its_own_loss_alone():
    """What it finds has no gradient in it; without its loss it would stay as it started."""
    block = block_of()
    history, target = inputs_of(shape([20], [(0, 0, 20)], [3]), DIM)
    memory = block.encode(history, NO_PROBES)
    unit = list(block.search.parameters())
    of_read = torch.autograd.grad(block.read(memory, target).sum(), unit, allow_unused=True)
    assert all(gradient is None for gradient in of_read)
    of_loss = torch.autograd.grad(block.click_logits(memory, target).sum(), unit)
    assert all(bool(gradient.any()) for gradient in of_loss)


def test_the_search_units_sums_are_of_training_alone():
    block = block_of()
    history, target = inputs_of(EDGES["overlapping windows of one row"], DIM)
    trained, evaluated = block.train().encode(history, NO_PROBES), block.eval().encode(history, NO_PROBES)
    assert trained.mean.numel() == 4 * 4 * 4
    assert evaluated.mean.numel() == 0
    torch.testing.assert_close(block.read(trained, target), block.read(evaluated, target), rtol=0, atol=0)


def test_the_search_units_logit_does_not_grow_with_the_history():
    """A history a hundred times over says the same."""
    block = block_of()
    logits: list[Tensor] = []
    for times in (1, 100):
        history, target = inputs_of(shape([7], [(0, 0, 7)], [3]), DIM)
        repeated = history._replace(x=history.x.repeat(times, 1), time=history.time.repeat(times), end=7 * history.end)
        repeated = repeated._replace(end=torch.tensor([7 * times]))
        logits.append(block.click_logits(block.encode(repeated, NO_PROBES), target))
    torch.testing.assert_close(logits[0], logits[1])


@given(any_shape, st.sampled_from([1, 4, 64]))
@settings(max_examples=40)
def test_sums_of_outer_products_equal_the_definition(batch: Shape, size: int):
    """And events in no window have no part in them, nor a gradient."""
    generator = batch.generator()
    k, v = (torch.randn(batch.events, d, generator=generator, dtype=torch.float64) for d in (3, 2))
    start, end, _ = batch.windows()
    unseen = outside(batch).unsqueeze(1)
    seen = [x.masked_fill(unseen, 1e9).requires_grad_() for x in (k, v)]
    found = outer_sums(seen[0], seen[1], start, end, size)
    assert_same(found, naive_outer_sums(seen[0], seen[1], start, end), seen)


def test_stretches_that_windows_share_are_summed_once():
    """Eight requests of one row cost its events once, not eight times."""
    k = torch.randn(640, 16)
    start, end = torch.zeros(8, dtype=torch.int64), torch.arange(80, 641, 80)
    with torch.profiler.profile(with_flops=True) as profile:
        outer_sums(k, k, start, end)
    products = sum(event.flops for event in profile.events() if event.name == "aten::bmm")
    assert 0 < products <= 2 * 16 * 16 * 64 * 8 * 2  # each of eight stretches of 80 events in two pieces of 64
