"""What all search methods keep to: requests share rows, see their own window alone, and score as exact attention does
where a window is no longer than K."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ranker.longseq import History, Probes, Target, TargetAttention
from ranker.longseq.search import ETA, MIRRN, TWIN, SimHard, SimSoft
from ranker.ops.probing import distinct_probes
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    differentiable,
    inputs_of,
    outside,
    own_rows,
    permuted,
    randomise,
    shape,
    shapes,
)
from tests.ranker.longseq.search.loops import BUCKETS, DIM, SIZES, caps

METHODS: dict[str, Callable[..., Any]] = {
    "sim_hard": SimHard,
    "sim_soft": lambda *given, **options: SimSoft(*given, search_dim=4, **options),
    "eta": ETA,
    "twin": TWIN,
    "mirrn": lambda *given, **options: MIRRN(*given, blocks=2, recent=3, **options),
}
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
methods = st.sampled_from(list(METHODS))
few = settings(max_examples=30)


class Case(NamedTuple):
    """A block with random float64 weights and inputs for it."""

    block: Any
    history: History
    probes: Probes
    target: Target


def case_of(method: str, batch: Shape, length: int = 0, top: int = 4, codes: int = 2) -> Case:
    """Events and candidates have one of few codes, of which 0 is none; SIM hard's probes are of these."""
    block = METHODS[method](DIM, top=top, length=length, **SIZES)
    randomise(block)
    history, target = inputs_of(batch, DIM)
    if method != "sim_hard":
        return Case(block, history, NO_PROBES, target)
    generator = batch.generator()
    event_code = torch.randint(0, codes + 1, [batch.events, 1], generator=generator)
    code = torch.randint(0, codes + 1, [batch.candidates], generator=generator)
    code, request, probe, first = distinct_probes(code, target.offsets)
    probes = Probes(target.x[first], code, request)
    return Case(block, history._replace(code=event_code), probes, target._replace(probe=probe))


@given(any_shape, caps, methods)
@few
def test_sharing_a_row_is_having_ones_own(batch: Shape, length: int, method: str):
    """Requests that share a history row get what copies of it would give."""
    block, history, probes, target = case_of(method, batch, length)
    torch.testing.assert_close(block(own_rows(history), probes, target), block(history, probes, target))


@given(any_shape, caps, methods)
@few
def test_unseen_events_change_nothing(batch: Shape, length: int, method: str):
    """Nor do they get a gradient."""
    block, history, probes, target = case_of(method, batch, length)
    history, target, inputs = differentiable(history, target)
    out = block(history, probes, target)
    unseen = outside(batch, length)
    changed = history._replace(
        x=torch.where(unseen.unsqueeze(1), 99.0, history.x), time=torch.where(unseen, 0, history.time)
    )
    torch.testing.assert_close(block(changed, probes, target), out)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
    assert not gradient[unseen].any()


@given(any_shape, st.integers(-(10**12), 10**12), methods)
@few
def test_only_ages_count(batch: Shape, shift_ms: int, method: str):
    """Moving events and requests by the same time changes nothing."""
    block, history, probes, target = case_of(method, batch)
    moved = history._replace(time=history.time + shift_ms, now=history.now + shift_ms)
    torch.testing.assert_close(block(moved, probes, target), block(history, probes, target), rtol=0, atol=0)


@given(any_shape, methods)
@few
def test_candidates_do_not_see_each_other(batch: Shape, method: str):
    """Reordering the candidates of a request reorders the outputs."""
    block, history, probes, target = case_of(method, batch)
    order = permuted(batch)
    probe = target.probe[order] if target.probe.numel() else target.probe
    found = block(history, probes, target._replace(x=target.x[order], probe=probe))
    torch.testing.assert_close(found, block(history, probes, target)[order])


def exact_of(method: str, block: Any) -> TargetAttention:
    """Target attention with a search method's weights."""
    exact = TargetAttention(DIM, heads=2, head_dim=3, length=block.length, age_buckets=BUCKETS).double()
    attention: nn.Module = block if method == "twin" else block.attend
    exact.project.load_state_dict(attention.project.state_dict())  # type: ignore[union-attr]
    with torch.no_grad():
        exact.age_bias.copy_(attention.age_bias)  # type: ignore[union-attr, operator]
    return exact


@given(shapes(longest=30), st.sampled_from([0, 25]), st.sampled_from(["sim_hard", "sim_soft", "eta", "twin"]))
@few
def test_of_windows_no_longer_than_k_it_is_target_attention(batch: Shape, length: int, method: str):
    """So that methods differ in what they find alone. (SIM hard: where all is of one category.)"""
    block, history, probes, target = case_of(method, batch, length, top=30)
    if method == "twin":
        nn.init.zeros_(block.cross.weight)
    history, probes = history._replace(code=torch.ones_like(history.code)), probes._replace(code=probes.code * 0 + 1)
    expected = exact_of(method, block)(history, NO_PROBES, target)
    torch.testing.assert_close(block(history, probes, target), expected)


@pytest.mark.parametrize("method", [SimSoft, ETA, TWIN])
def test_an_untrained_search_finds_the_event_most_like_the_candidate(method: Callable[..., Any]):
    """Of 200, with K = 1: what is read is that event's value."""
    torch.manual_seed(0)
    block = method(16, top=1, heads=1, head_dim=16, age_buckets=0)
    target = Target(torch.randn(10, 16), torch.tensor([0, 10]), NO_PROBES.code, torch.zeros([10, 0], dtype=torch.int64))
    x = torch.cat([torch.randn(190, 16), target.x + 0.1 * torch.randn(10, 16)])
    history, _ = inputs_of(shape([200], [(0, 0, 200)], [10]), 16)
    history = history._replace(x=x, content=x[:, :0])
    project = block.project if method is TWIN else block.attend.project
    torch.testing.assert_close(block(history, NO_PROBES, target), project.value(x)[190:])


@pytest.mark.parametrize("method", METHODS)
def test_without_events_the_output_is_zero(method: str):
    """And every gradient is finite beside requests with events."""
    block, history, probes, target = case_of(method, EDGES["empty beside full"], codes=0)
    history, probes = history._replace(code=history.code + 1), probes._replace(code=probes.code + 1)
    out = block(history, probes, target)
    assert not out[[0, 1, 2, 5]].any()
    assert bool(out[3:5].all())
    gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()), allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in gradients if g is not None)
    nothing = case_of(method, EDGES["no events"])
    assert not nothing.block(nothing.history, nothing.probes, nothing.target).any()


@pytest.mark.parametrize("method", METHODS)
def test_scripted_is_the_same(method: str):
    """TorchScript gives the same on every size, in training and not, and so does `read` of `encode`."""
    scripted: Any = None
    for batch in EDGES.values():
        block, history, probes, target = case_of(method, batch, 10)
        scripted = scripted or torch.jit.script(block)
        expected = block(history, probes, target)
        torch.testing.assert_close(block.read(block.encode(history, probes), target), expected, rtol=0, atol=0)
        scripted.load_state_dict(block.state_dict())
        for training in (True, False):
            torch.testing.assert_close(scripted.train(training)(history, probes, target), expected)


def largest_tensor(case: Case) -> int:
    """Elements of the largest tensor that `read` makes."""
    memory = case.block.encode(case.history, case.probes)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        case.block.read(memory, case.target)
    return max(e.cpu_memory_usage for e in profile.events()) // 8


@pytest.mark.parametrize("method", ["sim_soft", "twin", "mirrn"])
def test_reading_a_long_history_makes_no_table_of_candidates_by_events(method: str):
    """Nor any tensor beyond the search's bound on its scores, or of N · K."""
    case = case_of(method, shape([30_000], [(0, 0, 30_000)], [500]), top=20)
    assert largest_tensor(case) <= 1 << 22 < 500 * 30_000
