"""The chunked attention against its definition, the loop over requests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ranker.ops.attention import naive_window_attention, window_attention
from ranker.ops.frozen_attention import frozen_attention, window_logsumexp
from tests.ranker.histories import EDGES, Shape, assert_same, outside, shape, shapes


def operands(batch: Shape, heads: int, d: int, dv: int, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v and the bias of every pair, float64."""
    generator = batch.generator()

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    pairs = sum(b - a for a, b in zip(batch.start, batch.end, strict=True))
    q, k, v = normal(batch.candidates, heads, d), normal(batch.events, heads, d), normal(batch.events, heads, dv)
    return q, k, v, normal(pairs, heads) if bias else None


def check(batch: Shape, heads: int, d: int, dv: int, bias: bool, chunk: int) -> None:
    """Outputs and gradients of both forms are equal."""
    q, k, v, b = operands(batch, heads, d, dv, bias)
    start, end, offsets = batch.windows()
    inputs = [q, k, v] if b is None else [q, k, v, b]
    found = window_attention(q, offsets, k, v, start, end, b, chunk)
    assert_same(found, naive_window_attention(q, offsets, k, v, start, end, b), inputs)


@given(
    shapes(), st.integers(1, 3), st.sampled_from([1, 4]), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 200)
)
@settings(deadline=None)
def test_equals_the_definition(batch: Shape, heads: int, d: int, dv: int, bias: bool, chunk: int):
    """On any batch, with any chunk."""
    check(batch, heads, d, dv, bias, chunk)


@pytest.mark.parametrize("chunk", [0, 1, 2, 7, 128, 200])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", EDGES)
def test_equals_the_definition_at_the_edges(name: str, bias: bool, chunk: int):
    """On the batches that break things."""
    check(EDGES[name], 2, 4, 3, bias, chunk)


ALONE = {
    "some events of a row": shape([9], [(0, 2, 9)], [3]),
    "an empty window": shape([5], [(0, 1, 1)], [2]),
    "no candidates": shape([5], [(0, 0, 5)], [0]),
    "too many pairs for one product": shape([1100], [(0, 3, 1100)], [480]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ALONE)
def test_one_request_alone_equals_the_definition(name: str, bias: bool):
    """Scripted, too."""
    check(ALONE[name], 2, 4, 3, bias, 0)
    q, k, v, b = operands(ALONE[name], 2, 4, 3, bias)
    start, end, offsets = ALONE[name].windows()
    found = torch.jit.script(window_attention)(q, offsets, k, v, start, end, b)
    torch.testing.assert_close(found, naive_window_attention(q, offsets, k, v, start, end, b))


@pytest.mark.parametrize("requests", [1, 2])
def test_events_that_are_hidden_one_and_all_give_nothing(requests: int):
    """By a bias of −∞, in one head; the other sees some of them."""
    batch = shape([6] * requests, [(i, 0, 6) for i in range(requests)], [2] * requests)
    q, k, v, b = operands(batch, 2, 4, 3, True)
    assert b is not None
    bias = b.detach().clone()
    bias[:, 0], bias[:3, 1] = -math.inf, -math.inf
    start, end, offsets = batch.windows()
    found = window_attention(q, offsets, k, v, start, end, bias)
    expected = naive_window_attention(q, offsets, k, v, start, end, bias)
    assert not found[:, 0].any()
    torch.testing.assert_close(found[:, 1], expected[:, 1])
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(found.sum(), [q, k, v]))


@given(shapes(), st.booleans(), st.integers(0, 64), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_candidates_that_see_the_first_events_alone_equal_the_definition(
    batch: Shape, bias: bool, chunk: int, seed: int
):
    """Each its own number of them: of several chunks, also fewer than the first of them has."""
    q, k, v, b = operands(batch, 2, 4, 3, bias)
    start, end, offsets = batch.windows()
    length = (end - start).repeat_interleave(offsets[1:] - offsets[:-1])
    share = torch.rand(batch.candidates, generator=torch.Generator().manual_seed(seed))
    seen = (share * length).long().clamp(min=1)
    inputs = [q, k, v] if b is None else [q, k, v, b]
    found = window_attention(q, offsets, k, v, start, end, b, chunk, seen)
    expected = naive_window_attention(q, offsets, k, v, start, end, b, 0, seen)
    assert_same(found, expected, inputs)
    for n in range(batch.candidates):  # the definition, by windows cut off behind what is seen
        r = int((offsets[1:] <= n).sum())
        alone = torch.tensor([0, 1]), k, v, start[r : r + 1], torch.minimum(end[r : r + 1], start[r] + seen[n])
        if b is None:
            torch.testing.assert_close(naive_window_attention(q[n : n + 1], *alone), expected[n : n + 1])


def test_the_definition_is_the_textbook_attention():
    """One request against a loop over candidates, heads and events, straight from softmax(q kᵀ / √d + b) v."""
    batch = shape([6], [(0, 1, 6)], [3])
    q, k, v, bias = operands(batch, 2, 4, 3, True)
    assert bias is not None
    q, k, v, bias = q.detach(), k.detach(), v.detach(), bias.detach()
    start, end, offsets = batch.windows()
    found = naive_window_attention(q, offsets, k, v, start, end, bias)
    for n in range(3):
        for h in range(2):
            weights = [
                math.exp(sum(float(q[n, h, i] * k[t, h, i]) for i in range(4)) / 2.0 + float(bias[t - 1, h]))
                for t in range(1, 6)
            ]
            for i in range(3):
                expected = sum(w * float(v[t, h, i]) for w, t in zip(weights, range(1, 6), strict=True)) / sum(weights)
                assert float(found[n, h, i]) == pytest.approx(expected, rel=1e-12)


@given(shapes(), st.integers(0, 64))
@settings(deadline=None, max_examples=30)
def test_events_outside_the_windows_change_nothing(batch: Shape, chunk: int):
    """Neither the output nor, through their own gradient, themselves."""
    q, k, v, _ = operands(batch, 2, 4, 4, False)
    start, end, offsets = batch.windows()
    unseen = outside(batch)
    out = window_attention(q, offsets, k, v, start, end, None, chunk)
    other = [torch.where(unseen.view(-1, 1, 1), 1e3 * torch.ones_like(x), x) for x in (k, v)]
    torch.testing.assert_close(window_attention(q, offsets, other[0], other[1], start, end, None, chunk), out)
    for gradient in torch.autograd.grad(out.square().sum(), [k, v]):
        assert not gradient[unseen].any()


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_large_logits_stay_finite(scale: float, chunk: int):
    """In float32, with the greatest logit in any chunk: softmax becomes a choice, and its gradients stay finite."""
    batch = shape([40], [(0, 0, 40)], [4])
    q, k, v, _ = operands(batch, 2, 4, 4, False)
    single = [(x.detach() * s).float().requires_grad_() for x, s in ((q, scale), (k, 1.0), (v, 1.0))]
    start, end, offsets = batch.windows()
    out = window_attention(single[0], offsets, single[1], single[2], start, end, None, chunk)
    exact = naive_window_attention(
        *(x.double() for x in single[:1]), offsets, *(x.double() for x in single[1:]), start, end
    )
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)
    assert all(bool(x.isfinite().all()) for x in torch.autograd.grad(out.sum(), single))


def products(batch: Shape) -> int:
    """Floating-point operations of the forward and backward products."""
    q, k, v, _ = operands(batch, 2, 8, 8, False)
    start, end, offsets = batch.windows()
    with FlopCounterMode(display=False) as counter:
        window_attention(q, offsets, k, v, start, end).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("longest", [1_000, 4_000])
def test_work_follows_the_sum_of_lengths(longest: int):
    """One long history among 63 short ones costs as its events do, not 64 times as much."""
    lengths = [longest] + [20] * 63
    skewed = shape(lengths, [(i, 0, n) for i, n in enumerate(lengths)], [4] * 64)
    # two products, forward and twice backward; heads · d, candidates, multiply and add
    per_event = 2 * 3 * 2 * 8 * 4 * 2
    # a chunk is less than twice the mean length, so that padding is at most twice the events
    assert products(skewed) < 3 * per_event * sum(lengths)
    assert products(skewed) < 0.1 * per_event * 64 * longest


def test_short_histories_are_not_padded_to_a_long_chunk():
    """Many histories of a few events cost at most one smallest chunk each."""
    lengths = [5] * 100
    batch = shape(lengths, [(i, 0, n) for i, n in enumerate(lengths)], [4] * 100)
    assert products(batch) <= 2 * 3 * 2 * 8 * 4 * 2 * 16 * 100


def test_scripted_is_the_same_on_other_sizes():
    """TorchScript gives the same numbers whatever sizes came before."""
    scripted = torch.jit.script(window_attention)
    for bias in (False, True):
        for batch in EDGES.values():
            q, k, v, b = operands(batch, 2, 4, 3, bias)
            start, end, offsets = batch.windows()
            expected = window_attention(q, offsets, k, v, start, end, b)
            for _ in range(2):
                torch.testing.assert_close(scripted(q, offsets, k, v, start, end, b), expected)


def frozen_operands(batch: Shape, d: int = 4, dv: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, its offsets, k, bias of keys, v, and the naive form's bias of pairs; only v takes a gradient."""
    q, k, v, _ = operands(batch, 1, d, dv, False)
    start, end, offsets = batch.windows()
    bias = torch.randn(batch.events, generator=batch.generator(), dtype=torch.float64)
    pairs = torch.cat([bias[:0], *(bias[a:b] for a, b in zip(start.tolist(), end.tolist(), strict=True))])
    return q.detach().squeeze(1), offsets, k.detach().squeeze(1), bias, v, pairs.unsqueeze(1)


def check_frozen(batch: Shape) -> None:
    """Outputs and gradients of the values equal the definition's; so do normaliser and greatest key."""
    q, offsets, k, bias, v, pairs = frozen_operands(batch)
    start, end, _ = batch.windows()
    found = frozen_attention(q, offsets, k, bias, v.squeeze(1), start, end)
    scaled = (q * math.sqrt(q.size(1))).unsqueeze(1)
    assert_same(found, naive_window_attention(scaled, offsets, k.unsqueeze(1), v, start, end, pairs).squeeze(1), [v])
    logsumexp, best = window_logsumexp(q, offsets, k, bias, start, end)
    for r in range(batch.requests):
        a, b = batch.start[r], batch.end[r]
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            logits = q[n] @ k[a:b].t() + bias[a:b]
            torch.testing.assert_close(logsumexp[n], torch.logsumexp(logits, 0))
            assert int(best[n]) == (a + int(logits.argmax()) if a < b else -1)


@given(shapes())
@settings(deadline=None, max_examples=50)
def test_frozen_attention_equals_the_definition(batch: Shape):
    """On any batch."""
    check_frozen(batch)


@pytest.mark.parametrize("name", EDGES)
def test_frozen_attention_equals_the_definition_at_the_edges(name: str):
    """On the batches that break things."""
    check_frozen(EDGES[name])


def test_frozen_attention_over_several_blocks_tiles_and_chunks():
    """More queries than a tile, more keys than a chunk, more units than a block."""
    check_frozen(shape([1500, 900], [(0, 0, 1500), (1, 0, 900), (0, 100, 1400)], [300, 520, 3]))


def test_of_equal_keys_the_first_is_greatest():
    """Wherever their chunks begin."""
    q, k = torch.ones(1, 2), torch.ones(700, 2)
    k[:300] = 0.0
    _, best = window_logsumexp(q, torch.tensor([0, 1]), k, torch.zeros(700), torch.tensor([5]), torch.tensor([700]))
    assert best.tolist() == [300]


def test_frozen_attention_keeps_nothing_of_size_queries_by_events():
    """What autograd holds between forward and backward follows queries + events."""
    batch = shape([2000], [(0, 0, 2000)], [200])
    q, offsets, k, bias, v, _ = frozen_operands(batch)
    start, end, _ = batch.windows()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        frozen_attention(q, offsets, k, bias, v.squeeze(1), start, end)
    assert sum(kept) < 10 * (2000 + 200)


def test_frozen_attention_with_far_logits():
    """In float32, logits far below zero in some chunks and above in others: finite, as in float64."""
    batch = shape([600], [(0, 0, 600)], [4])
    q, offsets, k, bias, v, _ = frozen_operands(batch)
    start, end, _ = batch.windows()
    bias = bias + torch.linspace(-1e4, 1e3, 600)
    single = frozen_attention(q.float(), offsets, k.float(), bias.float(), v.squeeze(1).float(), start, end)
    double = frozen_attention(q, offsets, k, bias, v.squeeze(1), start, end)
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-3)


def test_scripted_frozen_attention_is_the_same():
    """Output, gradient, normaliser and greatest key."""
    scripted, scripted_logsumexp = torch.jit.script(frozen_attention), torch.jit.script(window_logsumexp)
    for batch in EDGES.values():
        q, offsets, k, bias, v, _ = frozen_operands(batch)
        start, end, _ = batch.windows()
        for _ in range(2):
            expected = frozen_attention(q, offsets, k, bias, v.squeeze(1), start, end)
            assert_same(scripted(q, offsets, k, bias, v.squeeze(1), start, end), expected, [v])
        for ours, theirs in zip(
            scripted_logsumexp(q, offsets, k, bias, start, end),
            window_logsumexp(q, offsets, k, bias, start, end),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)
