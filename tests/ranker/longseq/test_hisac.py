"""HiSAC against loops written from its equations, and the laws of a compressor."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq.hisac import ROUTINGS, SPACES, HiSAC
from ranker.longseq.protocol import History, Target
from ranker.ops.votes import naive_tree_agents
from tests.ranker.histories import (
    EDGES,
    NO_PROBES,
    Shape,
    assert_same,
    differentiable,
    inputs_of,
    normalised,
    outside,
    own_rows,
    permuted,
    randomise,
    shape,
    shapes,
)

DIM, DZ, CODES = 5, 3, 4
any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
WAYS = list(itertools.product(ROUTINGS, SPACES))


def codewords_of(levels: int = 2, codes: int = CODES) -> list[Tensor]:
    """Random codewords, those of a later level smaller, row 0 zero."""
    generator = torch.Generator().manual_seed(3)
    words = [torch.randn(codes + 1, DZ, generator=generator, dtype=torch.float64) / 2**level for level in range(levels)]
    for level in words:
        level[0] = 0.0
    return words


def block_of(**options: Any) -> HiSAC:
    """A small block with random float64 weights."""
    levels = len(options.get("keep", [2, 2]))
    defaults: dict[str, Any] = {"keep": [2, 2], "heads": 2, "head_dim": 3, "age_buckets": 8}
    block = HiSAC(DIM, codewords_of(levels), **{**defaults, **options})
    randomise(block)
    return block


def batch_of(batch: Shape, levels: int = 2, kind: str = "mixed") -> tuple[History, Target]:
    """Events with content vectors and semantic IDs: some without any, one for all of them, or many different ones."""
    history, target = inputs_of(batch, DIM)
    generator = batch.generator()
    code = torch.randint(0 if kind == "mixed" else 1, CODES + 1, [batch.events, levels], generator=generator)
    if kind == "one code":
        code = torch.full_like(code, 2)
    content = torch.randn(batch.events, DZ, generator=generator, dtype=torch.float64)
    return history._replace(code=code, content=content), target


def places(block: HiSAC, history: History, voters: list[int], agents: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """z of each voter and p of each agent, from the definitions."""
    words = codewords_of(len(block.keep))

    def summed(code: tuple[int, ...]) -> Tensor:
        return torch.stack([words[level][c] for level, c in enumerate(code)]).sum(0)

    code_of = {i: tuple(history.code[i].tolist()) for i in voters}
    if block.z == "embedding":
        x = history.x[voters].detach()
        x = x - x.mean(0)
        x = x / (x.square().sum(1).mean() + 1e-12).sqrt()
        members = [[n for n, i in enumerate(voters) if code_of[i] == agent] for agent in agents]
        return x, torch.stack([x[rows].mean(0) for rows in members])
    prototypes = torch.stack([summed(agent) for agent in agents])
    if block.z == "content":
        return history.content[voters], prototypes
    return torch.stack([summed(code_of[i]) for i in voters]), prototypes


def weights_of(block: HiSAC, z: Tensor, p: Tensor) -> Tensor:
    """The share of each event in each agent's representation `[A, L]`."""
    temperature = block.temperature
    logit = torch.stack([torch.stack([-(z_i - p_a).square().sum() / temperature for z_i in z]) for p_a in p])
    if block.routing == "items":
        return torch.softmax(logit, 1)
    share = torch.softmax(logit, 0)
    if block.routing == "hard":
        share = torch.zeros_like(logit)
        for i in range(len(z)):
            share[int(logit[:, i].argmax()), i] = 1.0
    return share / share.sum(1, keepdim=True).clamp(min=1e-300)


def agents_by_definition(block: HiSAC, history: History, r: int, start: int) -> list[tuple[tuple[int, ...], int]]:
    """Codes and votes of the agents of request r, whose window begins at `start`."""
    window = (torch.tensor([start]), history.end[r : r + 1])
    if block.voting:
        return naive_tree_agents(history.code, history.time, *window, block.keep)[0]
    everything = naive_tree_agents(history.code, history.time, *window, [10**6] * len(block.keep))[0]
    latest = {
        code: max(int(history.time[i]) for i in range(start, int(window[1])) if tuple(history.code[i].tolist()) == code)
        for code, _ in everything
    }
    return sorted(sorted(everything, key=lambda a: (-a[1], -latest[a[0]], a[0]))[: block.most_leaves])


def reference(block: HiSAC, history: History, target: Target) -> Tensor:
    """Votes, prototypes, routing, keys and values, attention with log w_a: request by request, head by head."""
    d = block.out_dim // block.heads
    rows: list[Tensor] = []
    for r in range(len(history.start)):
        a, b = int(history.start[r]), int(history.end[r])
        a = max(a, b - block.length) if block.length else a
        agents = agents_by_definition(block, history, r, a)
        voters = [i for i in range(a, b) if min(history.code[i].tolist()) > 0]
        representations: list[Tensor] = []
        if agents:
            e: list[Tensor] = []
            for i in voters:
                e_i = history.x[i]
                if block.decay is not None:
                    age_s = max(0, (int(history.now[r]) - int(history.time[i])) // 1000)
                    e_i = block.decay[min(age_s.bit_length(), block.age_buckets - 1)] * e_i
                e.append(e_i)
            alpha = weights_of(block, *places(block, history, voters, [code for code, _ in agents]))
            representations = [sum((w * e_i for w, e_i in zip(ws, e, strict=True)), torch.zeros(DIM)) for ws in alpha]
        total = sum(votes**block.gamma for _, votes in agents)
        for n in range(int(target.offsets[r]), int(target.offsets[r + 1])):
            heads: list[Tensor] = []
            for h in range(block.heads):
                of = slice(h * d, (h + 1) * d)
                q = normalised(block.project.query_norm, block.project.query.weight[of] @ target.x[n])
                logits = [
                    q @ normalised(block.project.key_norm, block.project.key.weight[of] @ r_a) / math.sqrt(d)
                    + math.log(votes**block.gamma / total)
                    for r_a, (_, votes) in zip(representations, agents, strict=True)
                ]
                values = [block.project.value.weight[of] @ r_a for r_a in representations]
                heads.append(
                    torch.softmax(torch.stack(logits), 0) @ torch.stack(values) if logits else torch.zeros(d).double()
                )
            rows.append(torch.cat(heads))
    return torch.stack(rows) if rows else torch.zeros(0, block.out_dim, dtype=torch.float64)


def check(batch: Shape, kind: str = "mixed", **options: Any) -> None:
    """Outputs and gradients, in events, candidates and all weights."""
    block = block_of(**options)
    history, target, inputs = differentiable(*batch_of(batch, len(block.keep), kind))
    found = block(history, NO_PROBES, target)
    assert_same(found, reference(block, history, target), [*inputs, *block.parameters()])


@given(
    shapes(longest=12, most_candidates=2),
    st.sampled_from(WAYS),
    st.sampled_from([[1], [2, 2], [3, 1, 2]]),
    st.booleans(),
    st.sampled_from([0, 1, 7]),
    st.sampled_from([0, 8]),
    st.sampled_from([0.0, 0.5, 1.0]),
)
@settings(deadline=None, max_examples=80)
def test_equals_the_loop(
    batch: Shape, way: tuple[str, str], keep: list[int], voting: bool, length: int, age_buckets: int, gamma: float
):
    """On any batch, with any options."""
    routing, z = way
    options = {"keep": keep, "voting": voting, "length": length, "age_buckets": age_buckets, "gamma": gamma}
    check(batch, routing=routing, z=z, most_leaves=3, temperature=0.7, **options)


@pytest.mark.parametrize("kind", ["mixed", "one code", "all with a code"])
@pytest.mark.parametrize("name", [name for name in EDGES if name != "skewed candidates"])
def test_equals_the_loop_at_the_edges(name: str, kind: str):
    """On the batches that break things."""
    check(EDGES[name], kind, length=25)


@pytest.mark.parametrize(("routing", "z"), WAYS)
def test_equals_the_loop_in_every_way(routing: str, z: str):
    """Each routing in each space, with a history of several chunks beside an empty one."""
    check(shape([70, 0], [(0, 0, 70), (1, 0, 0), (0, 5, 40)], [2, 1, 1]), routing=routing, z=z, keep=[3, 2])


@given(any_shape, st.sampled_from(ROUTINGS))
@settings(deadline=None, max_examples=30)
def test_routing_leaves_is_routing_events(batch: Shape, routing: str):
    """Where every event lies on its codewords, one row for all events of a leaf gives what the events one by one do."""
    history, target, inputs = differentiable(*batch_of(batch))
    by_leaf, by_event = block_of(z="codewords", routing=routing), block_of(z="content", routing=routing)
    words = codewords_of()
    history = history._replace(content=words[0][history.code[:, 0]] + words[1][history.code[:, 1]])
    assert_same(by_leaf(history, NO_PROBES, target), by_event(history, NO_PROBES, target), inputs)


@given(any_shape, st.sampled_from(WAYS), st.booleans(), st.sampled_from([0, 7]))
@settings(deadline=None, max_examples=30)
def test_agents_made_offline_give_the_same(batch: Shape, way: tuple[str, str], voting: bool, length: int):
    """To the last bit."""
    block = block_of(routing=way[0], z=way[1], voting=voting, length=length)
    history, _ = batch_of(batch)
    on_the_fly = block.encode(history, NO_PROBES)
    for ours, theirs in zip(block.encode_with(history, block.agents_of(history)), on_the_fly, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("routing", "z"), WAYS)
def test_agents_of_an_older_history_still_work(routing: str, z: str):
    """Agents without events any more, and requests that had none then: finite, and zeros for the latter."""
    block = block_of(routing=routing, z=z)
    history, target = batch_of(shape([20, 20], [(0, 0, 20), (1, 0, 20)], [2, 2]), kind="all with a code")
    old = history._replace(code=torch.cat([CODES + 1 - history.code[:20], torch.zeros_like(history.code[20:])]))
    out = block.read(block.encode_with(history, block.agents_of(old)), target)
    assert out.isfinite().all()
    assert out[:2].abs().sum() > 0
    assert not out[2:].any()


@given(any_shape, st.sampled_from([0, 1, 7, 25]), st.sampled_from(WAYS))
@settings(deadline=None, max_examples=30)
def test_sharing_a_row_is_having_ones_own(batch: Shape, length: int, way: tuple[str, str]):
    """Requests that share a history row get what copies of it would give."""
    history, target = batch_of(batch)
    block = block_of(length=length, routing=way[0], z=way[1])
    torch.testing.assert_close(block(own_rows(history), NO_PROBES, target), block(history, NO_PROBES, target))


@given(any_shape, st.sampled_from([0, 1, 7, 25]), st.sampled_from(WAYS))
@settings(deadline=None, max_examples=30)
def test_unseen_events_and_those_without_a_semantic_id_change_nothing(batch: Shape, length: int, way: tuple[str, str]):
    """Nor do they get a gradient."""
    history, target, inputs = differentiable(*batch_of(batch))
    block = block_of(length=length, routing=way[0], z=way[1])
    out = block(history, NO_PROBES, target)
    unseen = outside(batch, length)
    silent = unseen | (history.code == 0).any(1)
    changed = history._replace(
        x=torch.where(silent.unsqueeze(1), 99.0, history.x),
        content=torch.where(silent.unsqueeze(1), 99.0, history.content),
        code=torch.where(unseen.unsqueeze(1), 1, history.code),
    )
    torch.testing.assert_close(block(changed, NO_PROBES, target), out)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1])
    assert not gradient[silent].any()


@given(any_shape, st.integers(-(10**12), 10**12))
@settings(deadline=None, max_examples=20)
def test_only_ages_count(batch: Shape, shift_ms: int):
    """Moving events and requests by the same time changes nothing."""
    history, target = batch_of(batch)
    moved = history._replace(time=history.time + shift_ms, now=history.now + shift_ms)
    block = block_of()
    torch.testing.assert_close(block(moved, NO_PROBES, target), block(history, NO_PROBES, target), rtol=0, atol=0)


@given(any_shape)
@settings(deadline=None, max_examples=20)
def test_candidates_do_not_see_each_other(batch: Shape):
    """Reordering the candidates of a request reorders the outputs."""
    history, target = batch_of(batch)
    block, order = block_of(), permuted(batch)
    found = block(history, NO_PROBES, target._replace(x=target.x[order]))
    torch.testing.assert_close(found, block(history, NO_PROBES, target)[order])


@pytest.mark.parametrize("voting", [True, False])
def test_memory_does_not_grow_with_the_history(voting: bool):
    """Sixteen leaves at most, whatever the length; the same bytes for 200 events and for 2,000."""
    block = block_of(keep=[2, 3], voting=voting, most_leaves=6)
    sizes: list[int] = []
    for length in (200, 2000):
        history, _ = batch_of(shape([length], [(0, 0, length)], [1]))
        sizes.append(sum(x.numel() * x.element_size() for x in block.encode(history, NO_PROBES)))
        assert block.encode(history, NO_PROBES).log_weight.numel() == 6
    assert sizes[0] == sizes[1]


def test_nothing_of_size_agents_by_events_is_kept_for_the_backward_pass():
    """What autograd holds follows the events."""
    block = block_of(keep=[4, 4])
    history, target, _ = differentiable(*batch_of(shape([4000], [(0, 0, 4000)], [2])))
    held: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        held[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        block(history, NO_PROBES, target)
    assert sum(held.values()) < 6 * DIM * 4000
    assert max(held.values()) <= max(DIM, DZ + 2) * 4001


@pytest.mark.parametrize("routing", ["items", "agents"])
def test_a_low_temperature_chooses(routing: str):
    """Towards zero, every agent of "items" is its nearest event; "agents" becomes "hard"."""
    history, _ = batch_of(shape([30], [(0, 0, 30)], [1]), kind="all with a code")
    sharp = block_of(routing=routing, temperature=1e-7, age_buckets=0)
    agents = sharp.agents_of(history)
    _, weights = sharp.routing_weights(history, agents)
    if routing == "items":
        assert torch.equal((weights > 0.5).sum(1), torch.ones(len(weights), dtype=torch.int64))
    else:
        event, hard = block_of(routing="hard", age_buckets=0).routing_weights(history, agents)
        assert event.tolist() != sorted(event.tolist())  # by leaf
        reached = hard.sum(1) > 0  # an agent that no event is nearest to has no mean to compare
        assert reached.any()
        torch.testing.assert_close(weights[reached], hard[reached], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("routing", "z"), WAYS)
def test_routing_weights_are_those_of_the_definition(routing: str, z: str):
    """Also where the block itself sums leaves; they sum to one."""
    history, _ = batch_of(shape([25], [(0, 3, 25)], [1]))
    block = block_of(routing=routing, z=z)
    agents = block.agents_of(history)
    event, weights = block.routing_weights(history, agents)
    codes = [tuple(code) for code in agents.code.tolist()]
    expected = weights_of(block, *places(block, history, event.tolist(), codes))
    torch.testing.assert_close(weights, expected)
    assert sorted(event.tolist()) == [i for i in range(3, 25) if min(history.code[i].tolist()) > 0]


@pytest.mark.parametrize("z", ["content", "codewords"])
def test_float32_far_from_the_origin(z: str):
    """Content vectors around a point 1,000 times their spread away: float32 routes as float64 does."""
    shift = 1000.0
    words = codewords_of()
    words[0][1:] += shift
    history, target = batch_of(shape([400], [(0, 0, 400)], [3]), kind="all with a code")
    noise = 0.1 * history.content
    history = history._replace(content=words[0][history.code[:, 0]] + words[1][history.code[:, 1]] + noise)
    # what float32 cannot hold of the inputs is no fault of the routing
    history = history._replace(content=history.content.float().double())
    block = HiSAC(DIM, [level.float().double() for level in words], [2, 2], temperature=0.5, z=z)
    randomise(block)
    exact = block(history, NO_PROBES, target)
    single = HiSAC(DIM, [level.float() for level in words], [2, 2], temperature=0.5, z=z)
    single.load_state_dict(block.state_dict())
    history = history._replace(x=history.x.float(), content=history.content.float())
    found = single(history, NO_PROBES, target._replace(x=target.x.float()))
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("routing", "z"), WAYS)
def test_encode_then_read_and_script(routing: str, z: str):
    """`forward` is `read` of `encode`; TorchScript gives the same on every size, cached agents included."""
    block = block_of(routing=routing, z=z, voting=routing != "agents", age_buckets=0 if z == "content" else 8)
    scripted = torch.jit.script(block)
    for batch in EDGES.values():
        history, target = batch_of(batch)
        expected = block(history, NO_PROBES, target)
        found = block.read(block.encode(history, NO_PROBES), target)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        for _ in range(2):
            torch.testing.assert_close(scripted(history, NO_PROBES, target), expected)
        memory = scripted.encode_with(history, scripted.agents_of(history))
        torch.testing.assert_close(scripted.read(memory, target), expected)


def test_codebooks_are_frozen_and_travel_with_the_weights():
    """They are in the state, not among the parameters."""
    block = block_of()
    assert "codewords" in block.state_dict()
    assert "codewords" not in dict(block.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": [2]}, "keep"),
        ({"keep": [2, 0]}, "keep"),
        ({"routing": "soft"}, "routing is 'soft'.*items"),
        ({"z": "text"}, "z is 'text'.*content"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"most_leaves": 0}, "most_leaves 0"),
        ({"codewords": [torch.ones(3, 2), torch.zeros(3, 2)]}, "level 1.*row 0 zero"),
        ({"codewords": [torch.zeros(3, 2), torch.zeros(3, 4)]}, "level 2.*width 2"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str):
    """With the name, the value and what is allowed."""
    arguments: dict[str, Any] = {"codewords": codewords_of(), "keep": [2, 2], **options}
    with pytest.raises(ValueError, match=message):
        HiSAC(DIM, **arguments)


def test_histories_that_do_not_fit_the_codebooks_are_refused():
    """Another number of levels, a code beyond the codebook, content of another width."""
    history, target = batch_of(shape([6], [(0, 0, 6)], [1]), kind="all with a code")
    block = block_of()
    with pytest.raises(ValueError, match="1 levels of semantic IDs, codewords 2"):
        block(history._replace(code=history.code[:, :1]), NO_PROBES, target)
    with pytest.raises(ValueError, match="codebooks end at"):
        block(history._replace(code=history.code + CODES), NO_PROBES, target)
    with pytest.raises(ValueError, match="width 0, codewords 3"):
        block(history._replace(content=history.content[:, :0]), NO_PROBES, target)
