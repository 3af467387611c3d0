"""SIM hard against loops, and its index against the definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History, Probes, Target
from ranker.longseq.search import SimHard
from ranker.ops.latest_of_code import latest_of_code, naive_latest_of_code
from ranker.ops.probing import distinct_probes
from tests.ranker.histories import EDGES, Shape, assert_same, differentiable, inputs_of, randomise, shape, shapes
from tests.ranker.longseq.search.loops import DIM, SIZES, attends, caps, small_shape, tops, window_of

CODES = 4
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))


def asked_of(batch: Shape, codes: int = CODES) -> tuple[History, Probes, Target]:
    """Random inputs: events and candidates have one of few codes, 0 among them."""
    history, target = inputs_of(batch, DIM)
    generator = batch.generator()
    code = torch.randint(0, codes, [batch.candidates], generator=generator)
    code, request, probe, first = distinct_probes(code, target.offsets)
    event_code = torch.randint(0, codes, [batch.events, 1], generator=generator)
    return history._replace(code=event_code), Probes(target.x[first], code, request), target._replace(probe=probe)


def reference(block: SimHard, batch: Shape, history: History, probes: Probes, target: Target) -> Tensor:
    """The latest events of each candidate's own code, then attention; none for a candidate without a code."""
    out = [torch.zeros(0, block.out_dim, dtype=torch.float64)]
    for r in range(batch.requests):
        for n in range(batch.offsets[r], batch.offsets[r + 1]):
            code = int(probes.code[target.probe[n]])
            same = [i for i in window_of(batch, r, block.length) if int(history.code[i, 0]) == code != 0]
            project, age_bias = block.attend.project, block.attend.age_bias
            out.append(attends(project, age_bias, target.x[n], history, r, same[-block.top :]).unsqueeze(0))
    return torch.cat(out)


@given(small_shape, caps, tops)
@settings(max_examples=25)
def test_equals_the_loop(batch: Shape, length: int, top: int):
    """Outputs and gradients."""
    block = SimHard(DIM, top=top, length=length, **SIZES)
    randomise(block)
    history, probes, target = asked_of(batch)
    history, target, inputs = differentiable(history, target)
    found = block(history, probes, target)
    assert_same(found, reference(block, batch, history, probes, target), [*inputs, *block.parameters()])


@given(any_shape, st.sampled_from([1, 3, 60]), st.sampled_from([2, 5, 2**62]))
@settings(max_examples=40)
def test_the_index_is_the_latest_events_of_the_code(batch: Shape, top: int, codes: int):
    """On any batch, with any codes."""
    history, probes, _ = asked_of(batch, codes)
    code = history.code[:, 0]
    found = latest_of_code(code, history.start, history.end, probes.code, probes.request, top)
    assert torch.equal(found, naive_latest_of_code(code, history.start, history.end, probes.code, probes.request, top))


def test_the_definition_on_an_example():
    """Two windows of one row; the second probe's code is none, the third's in no event."""
    code = torch.tensor([7, 7, 0, 7, 5])
    found = naive_latest_of_code(
        code, torch.tensor([0, 1]), torch.tensor([5, 3]), torch.tensor([7, 0, 9, 7]), torch.tensor([0, 0, 0, 1]), 2
    )
    assert found.tolist() == [[3, 1], [-1, -1], [-1, -1], [1, -1]]


@given(any_shape, caps)
@settings(max_examples=15)
def test_offline_and_online_memories_are_the_same(batch: Shape, length: int):
    """Indexing every category for every request gives what the asked ones alone give."""
    block = SimHard(DIM, top=3, length=length, **SIZES)
    randomise(block)
    history, probes, target = asked_of(batch)
    every = Probes(
        torch.zeros(CODES * batch.requests, DIM).double(),
        torch.arange(CODES).repeat(batch.requests),
        torch.arange(batch.requests).repeat_interleave(CODES),
    )
    of_every = target._replace(probe=(probes.request * CODES + probes.code)[target.probe])
    torch.testing.assert_close(
        block.read(block.encode(history, every), of_every), block.read(block.encode(history, probes), target)
    )


def test_the_memory_does_not_grow_with_the_history():
    """At most K events a probe, each once, whatever the history; shared events are projected once."""
    block = SimHard(DIM, top=3, **SIZES)
    stored: list[int] = []
    for events in (50, 5_000):
        history, probes, _ = asked_of(shape([events], [(0, 0, events)] * 2, [40, 40]))
        memory = block.double().encode(history, probes)
        assert memory.kv.size(0) == 3 * (CODES - 1)  # the same for both requests
        stored.append(sum(x.numel() for x in memory))
    assert stored[0] == stored[1]
