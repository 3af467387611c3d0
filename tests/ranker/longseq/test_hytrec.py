"""HyTRec against loops over requests, layers, tokens and heads, written from the equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu

from ranker.longseq import History, Target
from ranker.longseq.hytrec import HyTRec
from ranker.longseq.hytrec_layers import Tadn, Tokens
from ranker.ops.running_mean import running_mean_plan
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    outside,
    own_rows,
    permuted,
    randomise,
    shape,
    shapes,
)

DIM, HEADS, D, KEYS = 5, 2, 3, 4
PERIOD_S = 20_000.0  # a few events' gaps, so that τ is neither 0 nor 1
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
decays, deviations = st.sampled_from(["now", "state"]), st.sampled_from(["mean", "previous"])


def block_of(**options: Any) -> HyTRec:
    """A small block with random float64 weights: three linear layers and a softmax one, unless told otherwise."""
    small = {"layers": 4, "short_length": 4, "window": 3, "chunk": 8, "key_dim": KEYS, "sharpness": 2.0}
    block = HyTRec(DIM, width=HEADS * D, heads=HEADS, period_s=PERIOD_S, **{**small, **options})
    randomise(block)
    return block


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x + b of one vector."""
    return layer.weight @ x + (0.0 if layer.bias is None else layer.bias)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """Of one vector."""
    return layer_norm(x, [x.numel()], layer.weight, layer.bias)


def feed(layer: Any, x: Tensor) -> Tensor:
    """The residual feed-forward net of one token."""
    return x + affine(layer.down, silu(affine(layer.up, norm(layer.norm, x))))


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query, every head, over a list of tokens; zero for none."""
    out: list[Tensor] = []
    for h in range(HEADS):
        of = slice(h * D, (h + 1) * D)
        if not keys:
            out.append(torch.zeros(D, dtype=torch.float64))
            continue
        logits = torch.stack([q[of] @ k[of] / D**0.5 for k in keys])
        weight = torch.softmax(logits, 0)
        out.append(sum((weight[i] * v[of] for i, v in enumerate(values)), torch.zeros(D, dtype=torch.float64)))
    return torch.cat(out)


def softmax_layer(layer: Any, x: list[Tensor], window: int, causal: bool) -> list[Tensor]:
    """Pre-norm attention and feed-forward of one sequence."""
    q, k, v = zip(*[affine(layer.projection, norm(layer.norm, token)).chunk(3) for token in x], strict=True)
    out: list[Tensor] = []
    for t in range(len(x)):
        seen = slice(max(0, t + 1 - window) if window else 0, t + 1) if causal else slice(None)
        out.append(feed(layer.feed_forward, x[t] + affine(layer.out, attend(q[t], list(k[seen]), list(v[seen])))))
    return out


def level(x: Tensor, small: float) -> Tensor:
    """Of a root mean square of 1, all numbers together, if it is not small."""
    return x / (x.square().mean() + small).sqrt()


def in_slots(block: HyTRec, x: Tensor) -> Tensor:
    """One head's query or key."""
    if block.sharpness:
        x = torch.softmax(block.sharpness * level(x, 1e-5), 0)
    return x / (x.square().sum() + 1e-6).sqrt()


def heads_in_slots(block: HyTRec, learned: Tensor, code: list[int]) -> list[Tensor]:
    """Every head's query or key: of the first heads one-hot by code, of the others learned."""
    n, found = block.key_dim, list[Tensor]()
    for one in code:
        hot = torch.zeros(n, dtype=torch.float64)
        if one:
            hot[one % n] = 1.0
        found.append(hot)
    return found + [in_slots(block, x) for x in (learned.split(n) if learned.numel() else [])]


def tadn_layer(
    block: HyTRec, layer: Tadn, x: list[Tensor], codes: list[list[int]], time_ms: list[int], now_ms: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Step 4 of the method, token by token, S in the paper's d_v × d_k; the outputs and each head's last S."""
    period_ms = 1000 * PERIOD_S
    a = torch.sigmoid(layer.balance)
    n = block.key_dim
    states = [torch.zeros(D, n, dtype=torch.float64) for _ in range(HEADS)]
    normed = [norm(layer.norm, token) for token in x]
    out: list[Tensor] = []
    for t, token in enumerate(normed):
        if block.from_mean:
            deviation = token - sum(normed[1 : t + 1], normed[0]) / (t + 1)
        else:
            deviation = token - normed[t - 1] if t else token
        tau = math.exp(-(now_ms - time_ms[t]) / period_ms) if block.decay_by_age else 1.0
        assert 0 < tau <= 1
        static = torch.sigmoid(affine(layer.static, token))
        g = a * torch.sigmoid(affine(layer.dynamic, torch.cat([token, deviation]))) * tau + (1 - a) * static
        assert (g > 0).all()
        assert (g < 1).all()
        mixed = g * deviation + (1 - g) * token
        keys = (HEADS - len(codes[t])) * n
        q, k, v, beta = affine(layer.projection, mixed).split([keys, keys, HEADS * D, HEADS])
        queries, written = heads_in_slots(block, q, codes[t]), heads_in_slots(block, k, codes[t])
        read: list[Tensor] = []
        for h in range(HEADS):
            of = slice(h * D, (h + 1) * D)
            unit_q, unit_k = queries[h], written[h]
            strength = torch.sigmoid(beta[h])
            forget = g[of].mean().clamp(min=1e-3) * strength
            state = states[h]
            if not block.decay_by_age and t:
                state = state * math.exp(-(time_ms[t] - time_ms[t - 1]) / period_ms)
            state = state @ (torch.eye(n, dtype=torch.float64) - forget * torch.outer(unit_k, unit_k))
            states[h] = state + strength * torch.outer(v[of] + layer.value_bias[of], unit_k)
            read.append(level(states[h] @ unit_q, 1e-2))
        out.append(feed(layer.feed_forward, x[t] + affine(layer.out, torch.cat(read))))
    return out, states


def reference(block: HyTRec, batch: Shape, history: History, target: Target) -> Tensor:
    """`[N, width]`."""
    width = HEADS * D
    rows: list[Tensor] = []
    for r in range(batch.requests):
        window = list(range(batch.start[r], batch.end[r]))
        window = window[-block.length :] if block.length else window
        long, short = window[: -block.short_length], window[-block.short_length :]
        if batch.offsets[r] == batch.offsets[r + 1]:
            continue
        x = [affine(block.event, history.x[i]) for i in long]
        states: list[list[Tensor]] = []
        for layer in block.layers:
            if isinstance(layer, Tadn):
                times = [int(history.time[i]) for i in long]
                codes = [history.code[i].tolist() for i in long]
                x, last = tadn_layer(block, layer, x, codes, times, int(history.now[r]))
                states.append(last)
            elif x:
                x = softmax_layer(layer, x, layer.window, causal=True)
        x = [norm(block.long_norm, token) for token in x]
        pooled = sum(x, torch.zeros(width, dtype=torch.float64)) / max(len(x), 1)
        y = [affine(block.event, history.x[i]) for i in short]
        y = softmax_layer(block.short, y, 0, causal=False) if y else y
        pairs = [affine(block.key_value, norm(block.short_norm, token)).chunk(2) for token in y]
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            queries, learned = affine(block.query, target.x[n]), (HEADS - block.code_heads) * block.key_dim
            own = affine(block.value, target.x[n]).split(width) if block.value else []
            found: list[Tensor] = []
            sizes: list[Tensor] = []
            agreed: list[Tensor] = []
            for i, last in enumerate(states):
                asked = heads_in_slots(block, queries[i * learned : (i + 1) * learned], target.code[n].tolist())
                for h in range(HEADS):
                    of = slice(h * D, (h + 1) * D)
                    read = level(last[h], 1e-5) @ asked[h]
                    found.append(level(read, 1e-4))
                    sizes.append((read.square().mean() + 1e-4).log().view(1))
                    agreed += [found[-1] * level(own[i][of], 1e-5)] if block.value else []
            answer = attend(queries[-width:], [k for k, _ in pairs], [v for _, v in pairs])
            outputs = torch.cat([*found, answer, *sizes, *agreed])
            rows.append(affine(block.out, outputs) + affine(block.pooled_out, pooled))
    return torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)


def coded(history: History, target: Target, heads: int) -> tuple[History, Target]:
    """With codes that are none, share a slot, or have one of their own."""
    generator = torch.Generator().manual_seed(0)
    of_events, of_candidates = (
        torch.randint(0, 2 * KEYS, [x.size(0), heads], generator=generator) for x in (history.x, target.x)
    )
    return history._replace(code=of_events), target._replace(code=of_candidates)


def check(block: HyTRec, batch: Shape) -> None:
    """Outputs and gradients, in events, candidates and all weights."""
    history, target, inputs = differentiable(*coded(*inputs_of(batch, DIM), block.code_heads))
    found = block(history, NO_PROBES, target)
    assert_same(found, reference(block, batch, history, target), [*inputs, *block.parameters()])


@given(shapes(longest=12, most_candidates=2), decays, deviations, st.sampled_from([0, 7]), st.sampled_from([0, 2, 5]))
@settings(deadline=None, max_examples=12)
def test_equals_the_loop(batch: Shape, decay: str, deviation: str, length: int, window: int):
    """On any batch, with any window and cap."""
    check(block_of(decay=decay, deviation=deviation, length=length, window=window, ratio=1, layers=2), batch)


SMALL_EDGES = [name for name in EDGES if name != "longer than a chunk and than any cap"]  # below, shorter


@pytest.mark.parametrize(
    ("decay", "deviation", "agreement"),
    [("now", "mean", True), ("state", "previous", True), ("now", "previous", False)],
)
def test_equals_the_loop_at_the_edges(decay: str, deviation: str, agreement: bool):
    """On the batches that break things, with three linear layers to one of softmax."""
    block = block_of(decay=decay, deviation=deviation, agreement=agreement)
    check_edges(block)


def test_equals_the_loop_without_the_softmax_over_slots():
    """And with as many slots as a head has dimensions."""
    block = block_of(sharpness=0.0, key_dim=0, decay="state")
    assert block.key_dim == D
    check_edges(block)


@pytest.mark.parametrize("heads", [1, HEADS])
def test_equals_the_loop_with_slots_by_code(heads: int):
    """Of one head, and of all, so that none learns its own."""
    check_edges(block_of(code_heads=heads, decay="state"))


def test_a_candidate_without_a_code_and_one_of_a_code_that_no_event_has_find_the_same():
    """Nothing, in the heads of codes: what is alike of them is read alike; a code that events have reads another."""
    history, target = inputs_of(shape([30], [(0, 0, 30)], [3]), DIM)
    block = block_of(code_heads=HEADS, decay="state")
    history = history._replace(code=torch.full([30, HEADS], 1))
    target = target._replace(x=target.x[:1].expand(3, -1), code=torch.tensor([[0], [2], [1]]).expand(-1, HEADS))
    none, other, found = block(history, NO_PROBES, target)
    torch.testing.assert_close(none, other)
    assert not torch.allclose(none, found)


def check_edges(block: HyTRec) -> None:
    for name in SMALL_EDGES:
        check(block, EDGES[name])


def test_equals_the_loop_over_many_chunks():
    """Longer than a chunk, than a block of running means, and than the cap."""
    batch = shape([90, 7], [(0, 0, 90), (1, 0, 7), (0, 0, 80)], [2, 1, 1])
    check(block_of(length=85, layers=2, ratio=1), batch)


def test_events_of_one_time_are_read_in_the_rows_order():
    """Ties neither decay nor swap: the order of the row decides."""
    batch = shape([12], [(0, 0, 12)], [1])
    history, target = inputs_of(batch, DIM)
    history = history._replace(time=torch.where(torch.arange(12) < 8, history.time[0], history.time))
    for decay in ("now", "state"):
        block = block_of(decay=decay)
        found = block(history, NO_PROBES, target)
        torch.testing.assert_close(found, reference(block, batch, history, target))
        swapped = history._replace(x=history.x[[1, 0, *range(2, 12)]])
        assert not torch.allclose(block(swapped, NO_PROBES, target), found)


IN_ROWS = shape(
    [90, 3, 40], [*((0, 0, 90 - i) for i in (3, 0, 1, 90)), (1, 0, 3), (2, 0, 40), (2, 0, 7), (2, 5, 40)], [1] * 8
)
"""Several requests a row: in no order, with the same window start or another, with and without a long branch."""


@pytest.mark.parametrize("training", [True, False])
@given(st.one_of(any_shape, st.just(IN_ROWS)), st.sampled_from([0, 1, 25]), decays, deviations)
@settings(deadline=None, max_examples=12)
def test_sharing_a_row_is_having_ones_own(training: bool, batch: Shape, length: int, decay: str, deviation: str):
    """Requests that share a history row get what copies of it would give, gradients too, of the next-item loss too."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    block = block_of(length=length, decay=decay, deviation=deviation, next_item_weight=0.5).train(training)

    def outputs(history: History) -> Tensor:
        memory = block.encode(history, NO_PROBES)
        # the same event in two rows is its own negative: compared is what the loss is made from
        losses = (memory.predicted, memory.following[memory.event])
        sums = [(one * memory.times.unsqueeze(1)).sum(0, keepdim=True) for one in losses]
        return torch.cat([block.read(memory, target), *sums])

    assert_same(outputs(history), outputs(own_rows(history)), [*inputs, *block.parameters()])


@pytest.mark.parametrize(("decay", "tokens"), [("state", 86 + 36 + 31), ("now", 83 + 86 + 85 + 36 + 3 + 31)])
def test_a_row_has_one_pass_where_the_time_of_the_request_does_not_matter(decay: str, tokens: int):
    """From each first event up to the last split of the requests that begin there."""
    block = block_of(decay=decay)
    seen: list[int] = []
    for layer in block.layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].size(0)))
    block.encode(inputs_of(IN_ROWS, DIM)[0], NO_PROBES)
    assert seen == [tokens] * 4


@given(any_shape, st.sampled_from([0, 1, 25]), decays)
@settings(deadline=None, max_examples=15)
def test_unseen_events_change_nothing(batch: Shape, length: int, decay: str):
    """Nor do they get a gradient."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    block = block_of(length=length, decay=decay)
    out = block(history, NO_PROBES, target)
    unseen = outside(batch, length)
    changed = history._replace(
        x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=torch.where(unseen, 0, history.time)
    )
    torch.testing.assert_close(block(changed, NO_PROBES, target), out)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
    assert not gradient[unseen].any()


@given(any_shape, st.integers(-(10**12), 10**12), decays)
@settings(deadline=None, max_examples=15)
def test_only_ages_and_gaps_count(batch: Shape, shift_ms: int, decay: str):
    """Moving events and requests by the same time changes nothing."""
    history, target = inputs_of(batch, DIM)
    block = block_of(decay=decay)
    moved = history._replace(time=history.time + shift_ms, now=history.now + shift_ms)
    torch.testing.assert_close(block(moved, NO_PROBES, target), block(history, NO_PROBES, target), rtol=0, atol=0)


def test_what_decay_by_state_keeps_is_the_same_at_any_time():
    """So that it can be cached across requests; decay by age cannot."""
    history, _ = inputs_of(EDGES["overlapping windows of one row"], DIM)
    later = history._replace(now=history.now + 10**8)
    for decay in ("state", "now"):
        block = block_of(decay=decay)
        same = torch.equal(block.encode(history, NO_PROBES).state, block.encode(later, NO_PROBES).state)
        assert same == (decay == "state")


@given(any_shape)
@settings(deadline=None, max_examples=15)
def test_candidates_do_not_see_each_other(batch: Shape):
    """Reordering the candidates of a request reorders the outputs."""
    history, target = inputs_of(batch, DIM)
    block, order = block_of(), permuted(batch)
    found = block(history, NO_PROBES, target._replace(x=target.x[order]))
    torch.testing.assert_close(found, block(history, NO_PROBES, target)[order])


@given(any_shape, deviations, st.integers(-60, 60))
@settings(deadline=None, max_examples=15)
def test_gates_stay_within_their_bounds(batch: Shape, deviation: str, scale: int):
    """In [0, 1] however large the weights and old the events are, and what is erased never vanishes against what is
    written: the memory stays finite."""
    history, target = inputs_of(batch, DIM)
    block = block_of(deviation=deviation)
    with torch.no_grad():
        for layer in block.layers:
            if isinstance(layer, Tadn):
                layer.dynamic.weight.mul_(scale)
                layer.balance.fill_(scale)
    seen: list[Tensor] = []
    for layer in block.layers:
        if isinstance(layer, Tadn):
            inner = layer.gates
            layer.gates = lambda *inputs, inner=inner: seen.append(inner(*inputs)) or seen[-1]
    out = block(history._replace(now=history.now + 10**11), NO_PROBES, target)
    assert out.isfinite().all()
    assert len(seen) == 3
    assert all(((g >= 0) & (g <= 1)).all() for g in seen)


def test_gates_that_are_shut_erase_a_thousandth_of_what_they_write():
    """And not less: an old value would never give way."""
    history, _ = inputs_of(shape([60], [(0, 0, 60)], [1]), DIM)
    block = block_of(decay="state")
    layer = next(layer for layer in block.layers if isinstance(layer, Tadn))
    with torch.no_grad():
        for gate in (layer.static, layer.dynamic):
            gate.weight.zero_()
            gate.bias.fill_(-20.0)
    x = block.event(history.x)
    writes, _ = layer.writes(x, block._tokens(history, torch.tensor([0, 60]), x, None))
    torch.testing.assert_close(writes.erase, 1e-3 * writes.write)


@pytest.mark.parametrize(
    "options", [{"agreement": False}, {}, {"decay": "state", "deviation": "previous", "next_item_weight": 0.5}]
)
def test_encode_then_read_and_script(options: dict[str, Any]):
    """`forward` is `read` of `encode`; TorchScript gives the same on every size."""
    block = block_of(length=60, window=20, **options)
    scripted = torch.jit.script(block)
    for batch in EDGES.values():
        history, target = inputs_of(batch, DIM)
        memory = block.encode(history, NO_PROBES)
        expected = block(history, NO_PROBES, target)
        torch.testing.assert_close(block.read(memory, target), expected, rtol=0, atol=0)
        for _ in range(2):
            torch.testing.assert_close(scripted(history, NO_PROBES, target), expected)


def test_starts_with_a_long_memory_and_alike():
    """Gates begin at σ(gate_bias), and a candidate's queries and values are those of an event like it."""
    history, target = inputs_of(shape([60], [(0, 0, 60)], [1]), DIM)
    torch.manual_seed(0)
    for bias in (-4.0, 0.0):
        block = HyTRec(DIM, width=HEADS * D, heads=HEADS, layers=2, ratio=2, gate_bias=bias, decay="state").double()
        gates = torch.cat([layer.gate for layer in block.gates(history).layers])
        assert (gates.mean().logit() - bias).abs() < 0.3
        keys = block.layers[0].keys
        _, k, v, _ = block.layers[0].projection(block.event(target.x)).split([keys, keys, HEADS * D, HEADS], 1)
        torch.testing.assert_close(block.query(target.x)[:, :keys], k)
        torch.testing.assert_close(block.value(target.x)[:, : HEADS * D], v)


def writes_alone(layer: Tadn, x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of tokens that are each the first of a history: they deviate from nothing."""
    offsets, none = torch.arange(x.size(0) + 1), x[:, :0]
    writes, _ = layer.writes(x, Tokens(offsets, none, none, running_mean_plan(offsets, x), None, x.long()[:, :0]))
    return writes.k, writes.v


def test_keys_start_from_one_feature():
    """Events that have it in common write to the same slots, in every layer, whatever else they are; the values of all
    features are kept."""
    torch.manual_seed(0)
    block = HyTRec(DIM, width=HEADS * D, heads=HEADS, decay="state", key_start=2, key_width=2).double()
    history, _ = inputs_of(shape([60], [(0, 0, 60)], [1]), DIM)
    other = history.x + 1.0
    other[:, 2:4] = history.x[:, 2:4]
    assert torch.linalg.matrix_rank(block.event.weight) == DIM
    for layer in block.layers:
        if isinstance(layer, Tadn):
            (k, v), (like, unlike) = (writes_alone(layer, block.event(x)) for x in (history.x, other))
            torch.testing.assert_close(like, k, rtol=0, atol=0.02)
            assert not torch.allclose(unlike, v, rtol=0, atol=0.1)
            x = torch.randn(7, HEADS * D, dtype=torch.float64)
            torch.testing.assert_close(layer.feed_forward(x + layer.out(x)), x)  # the identity at first


def test_what_is_read_does_not_grow_with_the_history():
    """States have a root mean square of 1 after 10 events of the long branch and after 5,000."""
    torch.manual_seed(0)
    block = HyTRec(DIM, width=HEADS * D, heads=HEADS, decay="state", period_s=1e9).double()
    for length in (60, 5050):
        history, _ = inputs_of(shape([length], [(0, 0, length)], [1]), DIM)
        state = block.encode(history, NO_PROBES).state
        torch.testing.assert_close(state.square().mean((2, 3)), torch.ones_like(state[:, :, 0, 0]), atol=1e-3, rtol=0)


def test_an_event_that_is_all_zeros_has_gradients_of_the_others_size():
    """As before the first step of a table that starts at zero: its key has no direction."""
    batch = shape([80], [(0, 0, 80)], [1])
    largest: list[float] = []
    for zeros in (0, 3):
        torch.manual_seed(0)
        block = block_of(decay="state")
        history, target = inputs_of(batch, DIM)
        history = history._replace(x=history.x.index_fill(0, torch.arange(zeros), 0.0).requires_grad_())
        with torch.no_grad():
            block.event.bias.zero_()
        block(history, NO_PROBES, target).square().sum().backward()
        largest.append(max(float(p.grad.abs().max()) for p in block.parameters() if p.grad is not None))
    assert largest[1] < 10 * largest[0]


def test_memory_is_of_one_size():
    """At most what `memory_bytes` says, for 10 events or 5,000."""
    block = block_of(next_item_weight=0.5).eval()
    for length in (1, 10, 5000):
        batch = shape([length], [(0, 0, length)], [1])
        memory = block.encode(inputs_of(batch, DIM)[0], NO_PROBES)
        stored = [memory.state, memory.pooled, memory.k, memory.v]
        size = sum(x.numel() * x.element_size() for x in stored)
        assert size == block.memory_bytes(8) or (length < block.short_length and size < block.memory_bytes(8))
        assert memory.predicted.numel() == memory.following.numel() == memory.event.numel() == 0


def test_the_next_item_loss_is_the_softmax_over_the_batchs_next_items():
    """Of each of the long branch's latest outputs, the event that follows it against those that follow the others."""
    batch = shape([9, 3, 6], [(0, 0, 9), (1, 0, 3), (2, 0, 6), (0, 0, 8)], [0, 0, 0, 0])
    block = block_of(next_item_weight=0.5, next_items=3)
    history, _, inputs = differentiable(*inputs_of(batch, DIM))
    memory = block.encode(history, NO_PROBES)
    follows = torch.tensor([2, 3, 4, 5, 13, 14])
    events = follows[memory.event].repeat_interleave(memory.times).tolist()
    assert sorted(events) == sorted([5, 4, 3, 14, 13, 4, 3, 2])
    predicted = memory.predicted.repeat_interleave(memory.times, 0)
    logits = predicted @ torch.stack([affine(block.follow, history.x[i]) for i in events]).t()
    total = torch.zeros([], dtype=torch.float64)
    for i, event in enumerate(events):
        others = [j for j, other in enumerate(events) if j == i or other != event]
        total = total - torch.log_softmax(logits[i][others] / (HEADS * D) ** 0.5, 0)[others.index(i)]
    expected = 0.5 * total / len(events)
    found = block.auxiliary(history, block.encode(history, NO_PROBES))
    assert_same(found, expected, [*inputs, *block.parameters()])


def test_scores_of_the_next_item_come_from_the_past_alone():
    """They agree with the loss's predictions, and the events to be predicted change nothing."""
    batch = shape([9, 3], [(0, 0, 9), (1, 0, 3)], [0, 0])
    block = block_of(next_item_weight=0.5, next_items=1)
    history, _ = inputs_of(batch, DIM)
    memory = block.encode(history, NO_PROBES)
    scores = block.score_next(history, history.x)
    expected = memory.predicted @ torch.stack([affine(block.follow, x) for x in history.x]).t() / (HEADS * D) ** 0.5
    torch.testing.assert_close(scores, expected)
    changed = history.x.clone()
    changed[5:9] = 7.0
    torch.testing.assert_close(block.score_next(history._replace(x=changed), history.x), scores)
    with pytest.raises(ValueError, match="next_item_weight: 0"):
        block_of().score_next(history, history.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, r"heads: 5; must divide width \(32\)"),
        ({"layers": 0}, "layers: 0; must be at least 1"),
        ({"short_length": 0}, "short_length: 0; must be at least 1"),
        ({"period_s": 0.0}, "period_s: 0.0; must be positive"),
        ({"decay": "both"}, "decay: 'both'; must be 'now' or 'state'"),
        ({"key_dim": -1}, "key_dim: -1, .*must not be negative"),
        ({"width": 8, "key_start": 0, "key_width": 16}, r"width: 8; must be above .*\(16\): raise width"),
        ({"width": DIM - 2, "key_start": 0, "key_width": DIM - 2, "heads": 1}, r"must be above .*: raise width"),
        ({"width": 8, "key_dim": 1}, "key_dim: 1; a softmax over one slot"),
        ({"width": 8, "heads": 8, "key_dim": 0}, "key_dim: 1; a softmax over one slot"),
        ({"code_heads": 3}, "code_heads: 3; must be of 0 to 2, the heads: raise heads"),
        ({"deviation": "none"}, "deviation: 'none'; must be 'mean' or 'previous'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    """With their value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        HyTRec(DIM, **options)
