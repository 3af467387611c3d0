"""Votes on the tree of semantic IDs against their definition, and the laws they keep."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.ops import votes
from ranker.ops.votes import (
    Agents,
    history_leaves,
    keep_agents,
    keep_leaves,
    naive_tree_agents,
    row_keys,
    tree_agents,
    tree_nodes,
)
from tests.ranker.histories import EDGES, Shape, shapes

any_shape = st.one_of(shapes(), st.sampled_from(list(EDGES.values())))
scripted_tree_agents = torch.jit.script(tree_agents)


@st.composite
def ballots(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """code, time, start, end and keep: few codes and few times, so that votes and times tie; some events have none."""
    batch = draw(any_shape)
    levels = draw(st.integers(1, 4))
    code = torch.randint(0, draw(st.sampled_from([2, 3, 5])), [batch.events, levels], generator=batch.generator())
    if draw(st.booleans()):
        code = code.clamp(min=1)
    code = code * draw(st.sampled_from([1, 2**18]))
    gap = torch.randint(0, draw(st.sampled_from([1, 2, 9])), [batch.events], generator=batch.generator())
    start, end, _ = batch.windows()
    return code, gap.cumsum(0), start, end, draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels))


def as_lists(agents: Agents) -> list[list[tuple[tuple[int, ...], int]]]:
    """(codes, votes) of each request's agents, as the definition gives them."""
    found: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(agents.offsets.numel() - 1)]
    for code, count, r in zip(agents.code.tolist(), agents.votes.tolist(), agents.request.tolist(), strict=True):
        found[r].append((tuple(code), count))
    return found


@given(ballots())
@settings(deadline=None, max_examples=150)
def test_equals_the_definition(ballot: tuple[Tensor, Tensor, Tensor, Tensor, list[int]]):
    """On any batch; TorchScript too; the offsets and counts beside the agents are theirs."""
    code, _, start, end, keep = ballot
    agents = tree_agents(*ballot)
    assert as_lists(agents) == naive_tree_agents(*ballot)
    for ours, theirs in zip(agents, scripted_tree_agents(*ballot), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(agents.offsets[1:] - agents.offsets[:-1], torch.bincount(agents.request, minlength=len(start)))
    whole = [int((code[a:b] > 0).all(1).sum()) for a, b in zip(start.tolist(), end.tolist(), strict=True)]
    assert agents.voters.tolist() == whole
    for of, voters in zip(as_lists(agents), whole, strict=True):
        assert sum(count for _, count in of) <= voters
        assert len(of) <= math.prod(keep)
        assert (len(of) > 0) == (voters > 0)


@given(ballots())
@settings(deadline=None, max_examples=50)
def test_children_add_up_and_kept_nodes_form_a_tree(ballot: tuple[Tensor, Tensor, Tensor, Tensor, list[int]]):
    """V(node) = Σ V(children); the parent of a kept node is kept; the last level's nodes are the leaves."""
    code, time, start, end, keep = ballot
    leaves = history_leaves(code, time, start, end)
    levels = tree_nodes(leaves, keep)
    above = {(r,): count for r, count in enumerate(keep_agents(leaves, keep).voters.tolist())}
    kept_above = set(above)
    for level, nodes in enumerate(levels, 1):
        assert nodes.code.shape == (nodes.request.numel(), level)
        names = [(r, *c) for r, c in zip(nodes.request.tolist(), nodes.code.tolist(), strict=True)]
        assert len(set(names)) == len(names)
        sums = dict.fromkeys(above, 0)
        for name, count in zip(names, nodes.votes.tolist(), strict=True):
            sums[name[:-1]] += count
        assert sums == above
        kept = {name for name, is_kept in zip(names, nodes.kept.tolist(), strict=True) if is_kept}
        assert {name[:-1] for name in kept} <= kept_above
        above, kept_above = dict(zip(names, nodes.votes.tolist(), strict=True)), kept
    assert torch.equal(levels[-1].code, leaves.code)
    assert torch.equal(levels[-1].votes, leaves.votes)
    assert torch.equal(torch.bincount(leaves.leaf, minlength=len(leaves.votes)), leaves.votes)
    assert torch.equal(leaves.code[leaves.leaf], code[leaves.event])


@given(ballots(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_the_order_of_simultaneous_events_changes_nothing(
    ballot: tuple[Tensor, Tensor, Tensor, Tensor, list[int]], seed: int
):
    """Only times and codes decide, not where a log happened to put an event."""
    code, time, start, end, keep = ballot
    window = torch.tensor([int(start.min()), int(end.max())]) if len(start) else torch.tensor([0, 0])
    whole = (code, time, window[:1], window[1:], keep)
    order = torch.randperm(len(time), generator=torch.Generator().manual_seed(seed))
    a, b = window.tolist()
    inside = order[(order >= a) & (order < b)]
    moved = code.clone()
    moved_time = time.clone()
    moved[a:b], moved_time[a:b] = code[inside], time[inside]
    assert as_lists(tree_agents(*whole)) == as_lists(tree_agents(moved, moved_time, *whole[2:]))


@given(ballots(), st.integers(1, 4))
@settings(deadline=None, max_examples=50)
def test_without_the_tree_the_leaves_with_most_votes_stay(
    ballot: tuple[Tensor, Tensor, Tensor, Tensor, list[int]], most: int
):
    """All of them where the cap allows; where a semantic ID has one level, both ways of keeping are one."""
    code, time, start, end, _ = ballot
    leaves = history_leaves(code, time, start, end)
    everything = keep_leaves(leaves, 10**6)
    assert torch.equal(everything.code, leaves.code)
    assert torch.equal(everything.votes, leaves.votes)
    single = history_leaves(code[:, :1], time, start, end)
    assert as_lists(keep_leaves(single, most)) == as_lists(keep_agents(single, [most]))
    capped = as_lists(keep_leaves(leaves, most))
    for few, all_of_them in zip(capped, as_lists(everything), strict=True):
        assert [n for _, n in sorted(few, key=lambda x: -x[1])] == sorted((n for _, n in all_of_them), reverse=True)[
            :most
        ]


def one(code: list[list[int]], keep: list[int], time: list[int] | None = None) -> list[tuple[tuple[int, ...], int]]:
    """The agents of one request with these events, by default one a millisecond."""
    times = torch.tensor(time or list(range(len(code))))
    return as_lists(tree_agents(torch.tensor(code), times, torch.tensor([0]), torch.tensor([len(code)]), keep))[0]


def test_ties_go_to_the_most_recent_event_then_to_the_lower_code():
    """One vote each: the later; at the same time: the lower. More votes win over both."""
    assert one([[3], [1], [2]], [1]) == [((2,), 1)]
    assert one([[3], [1], [2]], [1], [5, 5, 5]) == [((1,), 1)]
    assert one([[3], [3], [1], [2]], [1]) == [((3,), 2)]


def test_a_node_wins_by_the_votes_of_all_its_leaves():
    """Code 1 has three leaves of one vote, code 2 one leaf of two: the level-1 vote goes to 1, and its latest leaf."""
    assert one([[1, 1], [1, 2], [2, 9], [2, 9], [1, 3]], [1, 1]) == [((1, 3), 1)]
    assert one([[1, 1], [1, 2], [2, 9], [2, 9], [1, 3]], [2, 1]) == [((1, 3), 1), ((2, 9), 2)]


def test_a_node_is_as_recent_as_its_latest_leaf():
    """Both level-1 codes have two votes; the later event is of code 1, in a leaf that is not its largest."""
    assert one([[1, 1], [2, 1], [2, 2], [1, 2]], [1, 2]) == [((1, 1), 1), ((1, 2), 1)]


def test_an_event_without_a_full_semantic_id_has_no_vote():
    """Not even for the levels it has a code at."""
    assert one([[1, 0], [1, 0], [0, 2], [2, 2]], [1, 1]) == [((2, 2), 1)]
    assert one([[1, 0], [0, 0]], [1, 1]) == []


@given(st.integers(1, 8), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_keys_order_rows_without_overflow(levels: int, seed: int):
    """Eight levels of codes up to 2^31 − 1: equal rows, equal keys, and the order is the rows'."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.tensor([1, 2, 2**20, 2**31 - 1])
    code = few[torch.randint(0, 4, [40, levels], generator=generator)]
    request = torch.randint(0, 3, [40], generator=generator)
    rows = [(r, *c) for r, c in zip(request.tolist(), code.tolist(), strict=True)]
    keys = row_keys(request, code).tolist()
    assert min(keys) >= 0
    assert [rows[i] for i in sorted(range(40), key=lambda i: keys[i])] == sorted(rows)
    assert len(set(keys)) == len(set(rows))


def test_codes_without_end():
    """Eight levels of codes near 2^20 vote as small codes do."""
    small = torch.randint(1, 3, [60, 8], generator=torch.Generator().manual_seed(0))
    time, window, keep = torch.arange(60), (torch.tensor([0]), torch.tensor([60])), [2] * 8
    large = tree_agents(small + 2**20, time, *window, keep)
    assert torch.equal(large.code - 2**20, tree_agents(small, time, *window, keep).code)


@pytest.mark.parametrize(("levels", "keep"), [(2, [3]), (0, []), (1, [2, 2]), (2, [2, 0])])
def test_a_wrong_number_of_levels_is_refused(levels: int, keep: list[int]):
    """With what was given and what was expected."""
    code = torch.ones(3, levels, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"keep .*level"):
        tree_agents(code, torch.arange(3), torch.tensor([0]), torch.tensor([3]), keep)


def test_docstring_examples_run():
    """What the documentation shows is what happens."""
    assert doctest.testmod(votes).failed == 0


@pytest.mark.parametrize("name", EDGES)
def test_the_edges(name: str):
    """One code for all, and a code of its own for every event, on the batches that break things."""
    batch: Shape = EDGES[name]
    start, end, _ = batch.windows()
    time = torch.arange(batch.events)
    all_different = torch.arange(1, 2 * batch.events + 1).view(-1, 2)
    for code in (torch.ones_like(all_different), all_different):
        assert as_lists(tree_agents(code, time, start, end, [4, 2])) == naive_tree_agents(
            code, time, start, end, [4, 2]
        )
