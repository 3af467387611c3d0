"""UxSID against loops over requests, anchors, candidates and events, written from the paper's equations."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ranker.longseq import History, Probes, Target
from ranker.longseq.uxsid import SingleHead, UxSID, orthogonality
from ranker.ops.jagged import segments_of
from ranker.ops.probing import distinct_probes
from tests.ranker.histories import (
    EDGES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    normalised,
    outside,
    own_rows,
    randomise,
    shape,
    shapes,
)

DIM, PROBE_DIM, CODES = 5, 3, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "one head, no age bias": {"heads": 1, "age_buckets": 0},
    "orthogonal by row": {"ortho": "row"},
    "no e_global": {"global_probe": False},
    "no e_local": {"local_probe": False},
    "no gate": {"gate": False},
    "no orthogonality loss": {"ortho_weight": 0.0},
}
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
caps = st.sampled_from([0, 1, 7, 25])
variants = st.sampled_from(list(VARIANTS))
few = settings(deadline=None, max_examples=15)


def block_of(length: int = 0, variant: str = "whole") -> UxSID:
    """A small block with random float64 weights."""
    sizes = {"width": 4, "anchors": 3, "anchor_hidden": 5, "gate_hidden": 6, "age_buckets": 8}
    block = UxSID(DIM, PROBE_DIM, length=length, **(sizes | VARIANTS[variant]))
    randomise(block)
    return block


def asked_of(batch: Shape, codes: int = CODES) -> tuple[History, Probes, Target]:
    """Random inputs: every candidate has one of few codes, so that many share a probe."""
    history, target = inputs_of(batch, DIM)
    generator = batch.generator()
    embedding = torch.randn(codes, PROBE_DIM, generator=generator, dtype=torch.float64)
    code = torch.randint(0, codes, [batch.candidates], generator=generator)
    code, request, probe, _ = distinct_probes(code, target.offsets)
    return history, Probes(embedding[code], code, request), target._replace(probe=probe)


class Expected(NamedTuple):
    """out `[N, d]`; loss: the block's own."""

    out: Tensor
    loss: Tensor


def attend(head: SingleHead, query: Tensor, tokens: list[Tensor], bias: list[Tensor]) -> Tensor:
    """softmax((q W^Q)(t W^K)ᵀ / √d + bias)(t W^V), token by token; zero without tokens."""
    out = torch.zeros_like(query)
    if tokens:
        q = head.query.weight @ query
        logits = [q @ (head.key.weight @ t) / len(q) ** 0.5 + b for t, b in zip(tokens, bias, strict=True)]
        for weight, t in zip(torch.softmax(torch.stack(logits), 0), tokens, strict=True):
            out = out + weight * (head.value.weight @ t)
    return out


def projected(layers: nn.Sequential, x: Tensor) -> Tensor:
    """An event or a group in width d."""
    linear, norm = layers
    assert isinstance(linear, nn.Linear)
    return normalised(norm, linear.weight @ x)


def interests_of(block: UxSID, events: list[Tensor], bias: list[Tensor]) -> list[Tensor]:
    """P, anchor by anchor: (3) and (4)."""
    compress = block.compress
    assert compress is not None
    p: list[Tensor] = []
    for k, anchor in enumerate(compress.anchors):
        h = attend(compress.head, anchor, events, bias)
        hidden = 1 / (1 + torch.exp(-(h @ compress.w1[k] + compress.b1[k])))
        y = h + hidden @ compress.w2[k] + compress.b2[k]
        p.append(normalised(compress.norm, y))
    return p


def orthogonality_of(p: list[Tensor], by_row: bool) -> Tensor:
    """(5) less its least value, entry by entry of P Pᵀ."""
    k = len(p)
    total = torch.zeros([], dtype=torch.float64)
    for i, a in enumerate(p):
        for j, b in enumerate(p):
            scale = (a @ a).sqrt() * (b @ b).sqrt() if by_row else sum(c @ c for c in p)
            total = total + (a @ b / scale - float(i == j)) ** 2
    return total.sqrt() - (0.0 if by_row else k**0.5 * (1 - 1 / k))


def probed(block: UxSID, c: Tensor, p: list[Tensor], events: list[Tensor], bias: list[Tensor]) -> list[Tensor]:
    """e_global and e_local of one semantic ID of one request, or the one that is not ablated: (6) to (9)."""
    rows: list[Tensor] = []
    if block.global_head is not None:
        rows.append(attend(block.global_head, c, events, bias))
    if block.local_head is not None:
        if block.gate is not None:
            first, _, second, _ = block.gate
            hidden = torch.clamp(first.weight @ rows[0] + first.bias, min=0)
            c = c / (1 + torch.exp(-(second.weight @ hidden + second.bias)))
        e_local = attend(block.local_head, c, p, [torch.zeros(()).double()] * len(p))
        rows.append(e_local if events else torch.zeros_like(c))
    return rows


def chosen(block: UxSID, candidate: Tensor, rows: list[Tensor]) -> Tensor:
    """The candidate's multi-head attention to the rows."""
    out: list[Tensor] = []
    d = block.width // block.heads
    for h in range(block.heads):
        of = slice(h * d, (h + 1) * d)
        q = block.read_query.weight[of] @ candidate
        logits = torch.stack([q @ (block.read_key.weight[of] @ row) / d**0.5 for row in rows])
        values = torch.stack([block.read_value.weight[of] @ row for row in rows])
        out.append(torch.softmax(logits, 0) @ values)
    return torch.cat(out)


def window_of(block: UxSID, batch: Shape, history: History, r: int) -> tuple[list[Tensor], list[Tensor]]:
    """E and the bias by age of the request's latest events."""
    window = range(batch.start[r], batch.end[r])
    window = window[-block.length :] if block.length else window
    bias = [torch.zeros((), dtype=torch.float64)] * len(window)
    if block.age_bias is not None:
        ages_s = [max(0, (int(history.now[r]) - int(history.time[i])) // 1000) for i in window]
        bias = [block.age_bias[min(age.bit_length(), block.age_buckets - 1), 0] for age in ages_s]
    return [projected(block.event, history.x[i]) for i in window], bias


def reference(block: UxSID, batch: Shape, history: History, probes: Probes, target: Target) -> Expected:
    """Candidate by candidate: nothing is shared between those of one semantic ID."""
    out, losses = [torch.zeros(0, block.width).double()], [torch.zeros(0).double()]
    for r in range(batch.requests):
        events, bias = window_of(block, batch, history, r)
        p = interests_of(block, events, bias) if block.compress is not None else []
        if p and events:
            losses.append(orthogonality_of(p, block.by_row).unsqueeze(0))
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            c = projected(block.group, probes.x[target.probe[n]])
            out.append(chosen(block, target.x[n], probed(block, c, p, events, bias)).unsqueeze(0))
    loss = torch.cat(losses)
    return Expected(torch.cat(out), block.ortho_weight * loss.sum() / max(1, len(loss)))


def check(batch: Shape, length: int, variant: str) -> None:
    """Outputs, the block's own loss, and gradients in events, candidates, probes and all weights."""
    block = block_of(length, variant)
    history, probes, target = asked_of(batch)
    history, target, inputs = differentiable(history, target)
    probes = probes._replace(x=probes.x.clone().requires_grad_())
    memory = block.encode(history, probes)
    found = torch.cat([block.read(memory, target).flatten(), block.auxiliary(history, memory).unsqueeze(0)])
    expected = reference(block, batch, history, probes, target)
    expected = torch.cat([expected.out.flatten(), expected.loss.unsqueeze(0)])
    assert_same(found, expected, [*inputs, probes.x, *block.parameters()], 1e-8)


@given(shapes(longest=9, most_candidates=2), caps, variants)
@settings(deadline=None, max_examples=40)
def test_equals_the_loop(batch: Shape, length: int, variant: str):
    """On any batch, whatever is ablated."""
    check(batch, length, variant)


@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_equals_the_loop_at_the_edges(name: str):
    """On the batches that break things."""
    check(EDGES[name], 250, "whole")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["empty beside full", "overlapping windows of one row"])
def test_equals_the_loop_in_every_variant(name: str, variant: str):
    """With empty histories, and with requests that share events."""
    check(EDGES[name], 7, variant)


@given(any_shape, caps, variants)
@few
def test_sharing_a_row_is_having_ones_own(batch: Shape, length: int, variant: str):
    """Requests that share a history row get what copies of it would give."""
    history, probes, target = asked_of(batch)
    block = block_of(length, variant)
    torch.testing.assert_close(block(own_rows(history), probes, target), block(history, probes, target))


@given(any_shape, caps, variants)
@few
def test_unseen_events_change_nothing(batch: Shape, length: int, variant: str):
    """Nor do they get a gradient."""
    history, probes, target = asked_of(batch)
    history, target, inputs = differentiable(history, target)
    block = block_of(length, variant)
    out = block(history, probes, target)
    unseen = outside(batch, length)
    changed = history._replace(
        x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=torch.where(unseen, 0, history.time)
    )
    torch.testing.assert_close(block(changed, probes, target), out)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
    assert not gradient[unseen].any()


@given(any_shape, variants)
@few
def test_the_order_of_events_does_not_count(batch: Shape, variant: str):
    """Only their times do: the memory is a function of the set of events."""
    history, probes, target = asked_of(batch)
    history, block, generator = own_rows(history), block_of(0, variant), batch.generator()
    lengths = (history.end - history.start).tolist()
    order = torch.cat([torch.zeros(0).long()] + [torch.randperm(n, generator=generator) for n in lengths])
    order = order + history.start[segments_of(torch.cat([history.start[:0], history.start, history.end[-1:]]))]
    mixed = history._replace(x=history.x[order], time=history.time[order])
    torch.testing.assert_close(block(mixed, probes, target), block(history, probes, target))


@given(any_shape, caps, variants)
@few
def test_offline_and_online_memories_are_the_same(batch: Shape, length: int, variant: str):
    """Encoding every semantic ID of interest for every request gives the rows that the asked ones alone get."""
    history, probes, _ = asked_of(batch)
    block = block_of(length, variant).eval()
    every = torch.arange(CODES).repeat(batch.requests)
    embedding = torch.randn(CODES, PROBE_DIM, generator=batch.generator(), dtype=torch.float64)  # as in asked_of
    request = torch.arange(batch.requests).repeat_interleave(CODES)
    offline = block.encode(history, Probes(embedding[every], every, request)).rows
    online = block.encode(history, probes).rows
    torch.testing.assert_close(offline[probes.request * CODES + probes.code], online)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_memory_does_not_grow_with_the_history(variant: str):
    """Two rows a probe, one where one is ablated; the interests are kept only in training, only for the loss."""
    block = block_of(0, variant)
    ablated = "no e_global" in variant or "no e_local" in variant
    for length in (1, 10, 1000):
        history, probes, _ = asked_of(shape([length], [(0, 0, length)], [9]))
        memory = block.eval().encode(history, probes)
        stored_bytes = sum(x.untyped_storage().nbytes() for x in memory)
        assert stored_bytes == probes.code.numel() * (1 if ablated else 2) * 4 * 8
        assert not block.auxiliary(history, memory).any()
        trained = block.train().encode(history, probes)
        torch.testing.assert_close(trained.rows, memory.rows, rtol=0, atol=0)
        carried = variant not in ("no e_local", "no orthogonality loss")
        assert trained.interests.numel() == (3 * 4 if carried else 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_events_the_memory_is_zero(variant: str):
    """As a key that a store lacks; the output and every gradient are finite beside requests with events."""
    history, probes, target = asked_of(EDGES["empty beside full"])
    block = block_of(0, variant)
    memory = block.encode(history, probes)
    assert not memory.rows[probes.request != 1].any()
    assert memory.rows[probes.request == 1].all()
    loss = block.read(memory, target).square().sum() + block.auxiliary(history, memory)
    gradients = torch.autograd.grad(loss, list(block.parameters()), allow_unused=True, materialize_grads=True)
    assert all(bool(g.isfinite().all()) for g in (*gradients, loss))


@pytest.mark.parametrize("variant", VARIANTS)
def test_scripted_is_the_same(variant: str):
    """TorchScript gives the same on every size, in training and not, and so does `read` of `encode`."""
    block = block_of(10, variant)
    scripted = torch.jit.script(block)
    for batch in EDGES.values():
        history, probes, target = asked_of(batch)
        expected = block(history, probes, target)
        torch.testing.assert_close(block.read(block.encode(history, probes), target), expected, rtol=0, atol=0)
        for training in (True, False):
            torch.testing.assert_close(scripted.train(training)(history, probes, target), expected)


@given(st.integers(1, 8), st.integers(0, 8), st.floats(0.01, 100.0), st.integers(0, 2**31))
@few
def test_orthogonality_is_zero_at_its_best(k: int, more: int, norm: float, seed: int):
    """For orthogonal rows, of equal norm unless each is divided by its own; and never less."""
    generator = torch.Generator().manual_seed(seed)
    any_p = norm * torch.randn(3, k, k + more, generator=generator, dtype=torch.float64)
    best = norm * torch.linalg.qr(any_p.transpose(1, 2)).Q.transpose(1, 2)
    uneven = best * torch.rand(3, k, 1, generator=generator, dtype=torch.float64).add(0.1)
    for by_row in (False, True):
        assert (orthogonality(any_p, by_row) > -1e-9).all()
        assert orthogonality(best, by_row).abs().max() < 1e-9
    assert orthogonality(uneven, True).abs().max() < 1e-9


def test_orthogonality_of_equal_rows_is_at_its_worst():
    """K equal rows: √(K − 1) from the identity, or √(K² − K) by row."""
    p = torch.ones(1, 16, 16, dtype=torch.float64)
    assert float(orthogonality(p, False)) == pytest.approx(15**0.5 - 3.75)
    assert float(orthogonality(p, True)) == pytest.approx(240**0.5)


@given(any_shape, caps, variants)
@few
def test_the_attention_shown_is_the_attention_used(batch: Shape, length: int, variant: str):
    """Its mean of the events' values is e_global; the anchors' is what they compress."""
    history, probes, _ = asked_of(batch)
    block = block_of(length, variant)
    rows = block.encode(history, probes).rows
    shown = block.attention(history, probes)
    assert len(shown) == batch.requests
    for r, weights in enumerate(shown):
        events, bias = window_of(block, batch, history, r)
        e = torch.stack(events) if events else torch.zeros(0, 4).double()
        asked = probes.request == r
        if block.global_head is not None:
            torch.testing.assert_close(block.global_head.value(weights.probes @ e), rows[asked, 0])
        else:
            assert weights.probes.shape == (0, len(events))
        if block.compress is not None:
            p = block.compress((weights.anchors @ e).unsqueeze(0))[0]
            torch.testing.assert_close(p, torch.stack(interests_of(block, events, bias)))
        else:
            assert weights.anchors.shape == (0, len(events))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 8, "anchors": 9}, r"anchors: 9; must be at least 1 and at most width \(8\)"),
        ({"anchors": 0}, "anchors: 0; must be at least 1"),
        ({"heads": 3}, r"heads: 3; must divide width \(32\)"),
        ({"global_probe": False, "local_probe": False}, "global_probe and local_probe are both off"),
        ({"ortho": "rows"}, "ortho: 'rows'; must be 'frobenius' or 'row'"),
    ],
)
def test_refuses_what_cannot_work(wrong: dict[str, Any], message: str):
    """Naming the option, its value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        UxSID(DIM, PROBE_DIM, **wrong)


def test_more_anchors_than_width_do_not_matter_without_them():
    """Where e_local is ablated there are no anchors."""
    assert UxSID(DIM, PROBE_DIM, width=4, anchors=16, local_probe=False).anchors == 0


def test_an_untrained_probe_attends_most_to_events_of_its_own_group():
    torch.manual_seed(0)
    groups = torch.nn.functional.normalize(torch.randn(6, PROBE_DIM), dim=1)
    block = UxSID(DIM, PROBE_DIM, width=4, anchors=3, age_buckets=0, probe_start=1)
    x = torch.zeros(6, DIM).index_copy(1, torch.arange(1, 1 + PROBE_DIM), groups)
    history, _ = inputs_of(shape([6], [(0, 0, 6)], [1]), DIM)
    probes = Probes(groups, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    (weight,) = block.attention(history._replace(x=x), probes)
    assert weight.probes.argmax(1).tolist() == [0, 1, 2, 3, 4, 5]
