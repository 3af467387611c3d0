"""What holds of LONGER, ELASTIC, SASRec and HSTU alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ranker.longseq.encoders import ELASTIC, HSTU, LONGER, SASRec
from ranker.longseq.encoders.tokens import Tokens
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
from tests.ranker.longseq.encoders.loops import DIM, HEADS, WIDTH

MADE: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "longer": (LONGER, {"recent": 3, "layers": 1}),
    "longer, inner": (LONGER, {"merge": 2, "inner": True, "layers": 1}),
    "elastic": (ELASTIC, {"experts": 3, "pool": 9, "retrieve": 2}),
    "sasrec": (SASRec, {"layers": 1}),
    "sasrec, last": (SASRec, {"layers": 1, "read": "last", "positions": "sinusoidal"}),
    "hstu": (HSTU, {"layers": 1, "positions": 9, "chunk": 8}),
    "hstu, last": (HSTU, {"layers": 1, "read": "last"}),
}
COMPRESSORS = ["longer", "elastic"]
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
every = pytest.mark.parametrize("name", MADE)
few = settings(deadline=None, max_examples=4)


def block_of(name: str, length: int = 400) -> Any:
    """A small block with random float64 weights."""
    made, options = MADE[name]
    block = made(DIM, width=WIDTH, heads=HEADS, length=length, **options)
    randomise(block)
    return block


@every
@given(any_shape, st.sampled_from([1, 25, 400]))
@few
def test_sharing_a_row_is_having_ones_own(name: str, batch: Shape, length: int):
    """Requests that share a history row get what copies of it would give, gradients too."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    block = block_of(name, length)
    out, alone = (block(h, NO_PROBES, target) for h in (history, own_rows(history)))
    assert_same(out, alone, [*inputs, *block.parameters()])


@every
@given(any_shape, st.sampled_from([1, 25]))
@few
def test_unseen_events_change_nothing(name: str, batch: Shape, length: int):
    """Nor do they get a gradient."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    block = block_of(name, length)
    out = block(history, NO_PROBES, target)
    unseen = outside(batch, length)
    changed = history._replace(
        x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=torch.where(unseen, 0, history.time)
    )
    torch.testing.assert_close(block(changed, NO_PROBES, target), out)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
    assert not gradient[unseen].any()


@every
@given(any_shape, st.integers(-(10**9), 10**9))
@few
def test_only_ages_and_gaps_count(name: str, batch: Shape, shift_s: int):
    """Moving events and requests by the same time changes nothing."""
    history, target = inputs_of(batch, DIM)
    block = block_of(name)
    moved = history._replace(time=history.time + 1000 * shift_s, now=history.now + 1000 * shift_s)
    torch.testing.assert_close(block(moved, NO_PROBES, target), block(history, NO_PROBES, target), rtol=0, atol=0)


@every
@given(any_shape)
@few
def test_candidates_do_not_see_each_other(name: str, batch: Shape):
    """Reordering the candidates of a request reorders the outputs."""
    history, target = inputs_of(batch, DIM)
    block, order = block_of(name), permuted(batch)
    found = block(history, NO_PROBES, target._replace(x=target.x[order]))
    torch.testing.assert_close(found, block(history, NO_PROBES, target)[order])


@every
def test_without_events_candidates_find_zeros(name: str):
    """And every gradient is finite."""
    history, target, inputs = differentiable(*inputs_of(EDGES["empty beside full"], DIM))
    block = block_of(name)
    out = block(history, NO_PROBES, target)
    assert not out[:3].any()
    assert not out[5:].any()
    assert bool(out[3:5].all())
    gradients = torch.autograd.grad(out.square().sum(), [*inputs, *block.parameters()])
    assert all(bool(g.isfinite().all()) for g in gradients)


@every
@pytest.mark.parametrize("edge", ["no events", "nothing at all", "no requests, but events"])
def test_every_parameter_has_a_gradient_of_zero_without_events(name: str, edge: str):
    """Ranks average gradients parameter by parameter: one without events must bring as many."""
    history, target = inputs_of(EDGES[edge], DIM)
    block = block_of(name)
    gradients = torch.autograd.grad(block(history, NO_PROBES, target).sum(), list(block.parameters()))
    assert not any(bool(g.any()) for g in gradients)


@every
def test_encode_then_read_and_script(name: str):
    """`forward` is `read` of `encode`; TorchScript gives the same on every size."""
    block = block_of(name, 60)
    scripted = torch.jit.script(block)
    for edge in (
        "nothing at all",
        "no events",
        "overlapping windows of one row",
        "longer than a chunk and than any cap",
    ):
        history, target = inputs_of(EDGES[edge], DIM)
        memory = block.encode(history, NO_PROBES)
        expected = block(history, NO_PROBES, target)
        torch.testing.assert_close(block.read(memory, target), expected, rtol=0, atol=0)
        assert not block.auxiliary(history, memory).any()
        for _ in range(2):
            torch.testing.assert_close(scripted(history, NO_PROBES, target), expected)


def stored_bytes(block: Any, length: int) -> int:
    history, _ = inputs_of(shape([length], [(0, 0, length)], [1]), DIM)
    memory = block.eval().encode(history, NO_PROBES)
    return sum(x.numel() * x.element_size() for x in (memory.k, memory.v))


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressors_memory_does_not_grow_with_the_history(name: str):
    """It is at most what `memory_bytes` says, for 1 event or 3,000."""
    block = block_of(name, 0)
    assert stored_bytes(block, 1) <= block.memory_bytes(8)
    assert stored_bytes(block, 100) == stored_bytes(block, 3000) == block.memory_bytes(8)


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
def test_an_encoders_memory_is_an_output_an_event(name: str):
    """Or one for the product with the last."""
    for length in (1, 30, 50):
        assert stored_bytes(block_of(name, 40), length) == block_of(name, 40).memory_bytes(length, 8)
        last = block_of(f"{name}, last", 40)
        assert stored_bytes(last, length) == last.memory_bytes(length, 8) == 8 * WIDTH


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressors_work_follows_the_sum_of_lengths(name: str):
    """One long history among 63 short ones costs as its events do."""

    def products(lengths: list[int]) -> int:
        batch = shape(lengths, [(i, 0, n) for i, n in enumerate(lengths)], [1] * len(lengths))
        history, _ = inputs_of(batch, DIM)
        block = block_of(name, 0)
        with FlopCounterMode(display=False) as counter:
            block.encode(history, NO_PROBES)
        return counter.get_total_flops()

    even, skewed = products([70] * 64), products([64 * 70 - 63 * 8] + [8] * 63)
    assert skewed < 1.5 * even


def test_an_event_is_mapped_once_where_requests_share_it():
    """And only those that some window has, where these are fewer."""
    tokens, rows = Tokens(DIM, WIDTH), []
    tokens.double().project.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].size(0)))
    tokens.of_windows(inputs_of(shape([50], [(0, 0, 50), (0, 0, 40), (0, 10, 50)], [1] * 3), DIM)[0])
    tokens.of_windows(inputs_of(shape([50], [(0, 45, 50), (0, 38, 48)], [1] * 2), DIM)[0])
    assert rows == [50, 15]


@pytest.mark.parametrize("name", ["longer", "sasrec", "hstu"])
def test_an_untrained_candidate_attends_most_to_the_event_that_is_its_like(name: str):
    """Layers start as the identity, and queries as keys."""
    torch.manual_seed(0)
    made, options = MADE[name]
    block = made(12, width=12, heads=1, **options | ({"merge": 1, "recent": 20} if name == "longer" else {}))
    history, target = inputs_of(shape([12], [(0, 0, 12)], [12]), 12)
    history, target = history._replace(x=torch.eye(12)), target._replace(x=torch.eye(12))
    memory = block.encode(history, NO_PROBES)
    events = memory.k[: memory.k.size(0) - (4 if name == "longer" else 0), 0]
    logits: Tensor = block.outputs.project.queries(block.tokens(target.x))[:, 0] @ events.t()
    assert logits.argmax(1).tolist() == list(range(12))


@every
def test_small_embeddings_are_not_drowned(name: str):
    """What an untrained block finds for different histories differs, whatever the scale of the embeddings."""
    torch.manual_seed(0)
    made, options = MADE[name]
    block: nn.Module = made(DIM, width=WIDTH, heads=HEADS, **options).eval()
    batch = shape([9, 9], [(0, 0, 9), (1, 0, 9)], [1, 1])
    history, target = inputs_of(batch, DIM)
    history = history._replace(x=0.01 * history.x.float())
    target = target._replace(x=0.01 * target.x.float()[:1].expand(2, -1))
    out = block(history, NO_PROBES, target)
    assert (out[0] - out[1]).norm() > 0.1 * out.norm()
