"""VQL against dense attention with quantised keys, its error's bound, and its caches as time goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Target
from ranker.longseq.groups import VQL
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    normalised,
    shape,
    shapes,
)
from tests.ranker.longseq.groups.literal import DIM, block_of, window_of

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "no decay": {"periods_s": []},
    "one code": {"codes": 1},
    "no loss": {"codebook_weight": 0.0},
    "not straight through": {"straight_through": False},
}
caps = st.sampled_from([0, 1, 7, 25])
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))


def of_head(h: int, d: int) -> slice:
    return slice(h * d, (h + 1) * d)


def key_of(block: VQL, x: Tensor, h: int) -> Tensor:
    """k of one event and head."""
    return normalised(block.project.key_norm, block.project.key.weight[of_head(h, block.head_dim)] @ x)


def nearest(block: VQL, k: Tensor, h: int) -> int:
    """z of one key."""
    return min(range(block.codes), key=lambda m: float((k - block.codebook[h, m]).detach().square().sum()))


def kernel(block: VQL, age_ms: int, h: int) -> Tensor:
    """κ(t_now − t_i) of one head, from the age alone."""
    shares = torch.softmax(block.mix[h], 0)
    return torch.stack([s * torch.exp(-rate * age_ms) for s, rate in zip(shares, block.rate, strict=True)]).sum()


def dense(block: VQL, history: History, r: int, window: list[int], candidate: Tensor, h: int) -> Tensor:
    """Softmax over all events with quantised keys and exact values: what one candidate reads by one head."""
    of, d = of_head(h, block.head_dim), block.head_dim
    if not window:
        return candidate.new_zeros(d)
    keys = [key_of(block, history.x[i], h) for i in window]
    code = [nearest(block, k, h) for k in keys]
    weight = [kernel(block, int(history.now[r]) - int(history.time[i]), h) for i in window]
    quantised: list[Tensor] = []
    for m in code:
        c = block.codebook[h, m]
        if block.straight_through:  # zero, but for the gradient: each key's share of its code's
            own = [(w.detach(), k) for w, k, z in zip(weight, keys, code, strict=True) if z == m]
            mean = torch.stack([w * k for w, k in own]).sum(0) / torch.stack([w for w, _ in own]).sum()
            c = c + mean - mean.detach()
        quantised.append(c)
    q = normalised(block.project.query_norm, block.project.query.weight[of] @ candidate)
    logits = [q @ c / d**0.5 + w.log() for c, w in zip(quantised, weight, strict=True)]
    values = [block.project.value.weight[of] @ history.x[i] for i in window]
    return torch.softmax(torch.stack(logits), 0) @ torch.stack(values)


def reference(block: VQL, batch: Shape, history: History, target: Target) -> Tensor:
    """Candidate by candidate and head by head, and last the loss, event by event."""
    rows, losses = [torch.zeros(0).double()], [torch.zeros(0).double()]
    for r in range(batch.requests):
        window = window_of(batch, r, block.length)
        terms: list[Tensor] = []
        for i in window:
            for h in range(block.heads):
                k = key_of(block, history.x[i], h)
                c = block.codebook[h, nearest(block, k, h)]
                terms.append((k.detach() - c).square().sum() + block.commitment * (k - c.detach()).square().sum())
        if window:
            losses.append(torch.stack(terms).mean().unsqueeze(0))
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            rows += [dense(block, history, r, window, target.x[n], h) for h in range(block.heads)]
    loss = torch.cat(losses)
    return torch.cat([*rows, block.codebook_weight * loss.sum().unsqueeze(0) / max(1, len(loss))])


def check(batch: Shape, length: int, variant: str) -> None:
    """Outputs, the loss, and gradients in events, candidates and all weights: the cached form is the dense one."""
    block = block_of(VQL, length=length, **VARIANTS[variant])
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    memory = block.encode(history, NO_PROBES)
    found = torch.cat([block.read(memory, target).flatten(), block.auxiliary(history, memory).unsqueeze(0)])
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()], 1e-8)


@given(shapes(longest=12, most_candidates=2), caps, st.sampled_from(list(VARIANTS)))
@settings(deadline=None, max_examples=40)
def test_the_cached_form_equals_the_dense_form(batch: Shape, length: int, variant: str):
    """On any batch."""
    check(batch, length, variant)


@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_the_cached_form_equals_the_dense_form_at_the_edges(name: str):
    """On the batches that break things."""
    check(EDGES[name], 60, "whole")


@given(st.integers(1, 2000), st.integers(1, 64), st.floats(0.0, 3.0), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_the_error_of_the_weights_is_bounded_for_every_length(events: int, codes: int, spread: float, seed: int):
    """‖a − â‖₁ ≤ 2 tanh(ε/2) ≤ ε, ε the greatest error of a logit by quantising keys."""
    block = block_of(VQL, codes=codes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        block.codebook.copy_(spread * torch.randn(block.codebook.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(events, DIM, generator=generator, dtype=torch.float64)
    k, _ = block.project.keys_values(x)
    q = block.project.queries(torch.randn(1, DIM, generator=generator, dtype=torch.float64))
    quantised = block.codebook[torch.arange(block.heads), block.nearest(k)]
    bias = torch.randn(events, 1, generator=generator, dtype=torch.float64)  # of time: the same for both
    logits, near = (torch.einsum("hd,lhd->lh", q[0], keys) / block.head_dim**0.5 for keys in (k, quantised))
    a, a_hat = torch.softmax(logits + bias, 0), torch.softmax(near + bias, 0)
    error = (logits - near).abs().amax(0)
    apart = (a - a_hat).abs().sum(0)
    assert (apart <= 2 * torch.tanh(error / 2) + 1e-12).all()
    assert (2 * torch.tanh(error / 2) <= error + 1e-12).all()


@given(any_shape, st.integers(0, 10**12))
@settings(deadline=None, max_examples=20)
def test_a_memory_is_brought_to_a_later_time_without_its_history(batch: Shape, later_ms: int):
    """As if it were made then, however late: nothing overflows and nothing is forgotten."""
    history, target = inputs_of(batch, DIM)
    block = block_of(VQL).eval()
    then = history.now + later_ms
    expected = block(history._replace(now=then), NO_PROBES, target)
    found = block.read(block.at_time(block.encode(history, NO_PROBES), then), target)
    torch.testing.assert_close(found, expected)
    assert bool(found.isfinite().all())


def test_events_of_one_time_and_of_old_ones_are_the_same():
    """Far beyond every period only the kernel that does not decay is left, and all events weigh alike."""
    batch = shape([9], [(0, 0, 9)], [2])
    history, target = inputs_of(batch, DIM)
    block = block_of(VQL)
    at_once = block(history._replace(time=0 * history.time, now=0 * history.now), NO_PROBES, target)
    torch.testing.assert_close(block(history._replace(now=history.now + 10**13), NO_PROBES, target), at_once)


def test_as_many_codes_as_keys_are_exact():
    """With every key a code, and no decay, the output is softmax attention with the keys themselves."""
    history, target = inputs_of(shape([6], [(0, 0, 6)], [3]), DIM)
    block = block_of(VQL, codes=6, periods_s=[])
    k, v = block.project.keys_values(history.x)
    with torch.no_grad():
        block.codebook.copy_(k.transpose(0, 1))
    weight = torch.softmax(torch.einsum("nhd,lhd->nhl", block.project.queries(target.x), k) / 3**0.5, 2)
    expected = torch.einsum("nhl,lhd->nhd", weight, v).flatten(1)
    torch.testing.assert_close(block(history, NO_PROBES, target), expected)
    assert block.used(history).tolist() == [1.0, 1.0]


def test_used_counts_the_codes_that_some_window_has():
    """Of each head; events that no request sees do not count."""
    history, _ = inputs_of(shape([6], [(0, 0, 2)], [1]), DIM)
    block = block_of(VQL, codes=4)
    code = block.nearest(block.project.keys_values(history.x)[0])[:2]
    assert block.used(history).tolist() == [len(set(code[:, h].tolist())) / 4 for h in range(2)]
    assert torch.equal(torch.jit.script(block).used(history), block.used(history))


def test_most_codes_have_keys_at_the_start():
    """Of small embeddings, as tables start: a codebook on another sphere than the keys would be dead."""
    torch.manual_seed(0)
    history, _ = inputs_of(shape([2000], [(0, 0, 2000)], [1]), 32)
    share = VQL(32).used(history._replace(x=0.01 * history.x.float()))
    assert (share > 0.9).all()


def test_training_on_the_loss_brings_keys_and_codes_together():
    """To less than half of where they start."""
    torch.manual_seed(0)
    history, _ = inputs_of(shape([400], [(0, 0, 400)], [1]), 8)
    block = VQL(8, head_dim=4, codebook_weight=1.0, commitment=0.25).double()
    optimizer = torch.optim.Adam(block.parameters(), lr=0.02)
    losses: list[float] = []
    for _ in range(60):
        loss = block.auxiliary(history, block.encode(history, NO_PROBES))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("straight", [True, False])
def test_the_task_reaches_the_keys_straight_through_alone(straight: bool):
    """In training; what is read is the same either way, and in evaluation."""
    history, target = inputs_of(shape([30], [(0, 0, 30)], [3]), DIM)
    block = block_of(VQL, straight_through=straight)
    out = block(history, NO_PROBES, target)
    (gradient,) = torch.autograd.grad(out.sum(), [block.project.key.weight], allow_unused=True, materialize_grads=True)
    assert bool(gradient.any()) == straight
    torch.testing.assert_close(block.eval()(history, NO_PROBES, target), out)
