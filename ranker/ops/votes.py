"""Votes of a history on the tree of semantic IDs, and the leaves that top-down pruning keeps: a user's agents (HiSAC).

A *leaf* is a full semantic ID, a *node* of level l its first l codes. Each event votes for its leaf, and a node has the
votes of its children. Under each kept parent the k_l children with most votes are kept; ties go to the most recent
event, then to the lower code. An event without a code at every level has no place in the tree and no vote.

:func:`naive_tree_agents` is the definition, with dictionaries. :func:`tree_agents` sorts: O(P log P) for the P pairs of
a request and an event of its window, whatever the codes, and no loop but over the M levels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, offsets_of
from ranker.ops.padded import exporting
from ranker.ops.votes_traced import traced_best, traced_keys, traced_leaves, traced_pruning


class Leaves(NamedTuple):
    """The U leaves of all requests, by request, then by code; and who voted for them.

    code: `[U, M]`; request: `[U]`; votes: `[U]`; latest: `[U]` time of the leaf's latest event; offsets: `[R + 1]`.
    event, leaf: `[P']` the votes, by leaf: which event, for which leaf. All int64.
    """

    code: Tensor
    request: Tensor
    votes: Tensor
    latest: Tensor
    offsets: Tensor
    event: Tensor
    leaf: Tensor


class Agents(NamedTuple):
    """The A kept leaves of all requests, by request, then by code. What an offline cache keeps of a user.

    code: `[A, M]`; votes: `[A]`; request: `[A]`; offsets: `[R + 1]`; voters: `[R]` events of the request that voted,
    for any leaf: the rest of its window has no semantic ID. All int64.
    """

    code: Tensor
    votes: Tensor
    request: Tensor
    offsets: Tensor
    voters: Tensor


class Nodes(NamedTuple):
    """The nodes of one level. code: `[n, l]`; request, votes: `[n]` int64; kept: `[n]` bool; latest: `[n]`."""

    code: Tensor
    request: Tensor
    votes: Tensor
    latest: Tensor
    kept: Tensor


def naive_tree_agents(
    code: Tensor, time: Tensor, start: Tensor, end: Tensor, keep: list[int]
) -> list[list[tuple[tuple[int, ...], int]]]:
    """The definition: the agents of each request, as (codes, votes), in order of their codes."""
    found: list[list[tuple[tuple[int, ...], int]]] = []
    for r in range(start.numel()):
        votes: dict[tuple[int, ...], int] = {}
        latest: dict[tuple[int, ...], int] = {}
        for i in range(int(start[r]), int(end[r])):
            leaf = tuple(int(c) for c in code[i])
            for level in range(1, len(leaf) + 1) if min(leaf) > 0 else []:
                node = leaf[:level]
                votes[node] = votes.get(node, 0) + 1
                latest[node] = max(latest.get(node, int(time[i])), int(time[i]))
        kept: list[tuple[int, ...]] = [()]
        for level, k in enumerate(keep, 1):
            children = [[node for node in votes if node[:-1] == p and len(node) == level] for p in kept]
            kept = [node for of in children for node in sorted(of, key=lambda n: (-votes[n], -latest[n], n[-1]))[:k]]
        found.append([(node, votes[node]) for node in sorted(kept) if node])
    return found


def row_keys(request: Tensor, code: Tensor) -> Tensor:
    """Keys `[n]` int64 that order and tell apart the rows (request, code_1 … code_M), for codes below 2^31.

    A mixed-radix number while it fits into int64; before it would not, the keys so far give way to their ranks.
    """
    key = request
    if not torch.jit.is_scripting() and exporting():
        return traced_keys(request, code)
    if key.numel() == 0:
        return key
    span = int(key.max()) + 1
    for level in range(code.size(1)):
        digit = code[:, level]
        base = int(digit.max()) + 1
        if span > (1 << 62) // base:  # would come near the end of int64
            ordered, order = torch.sort(key)
            key = torch.empty_like(key).scatter_(0, order, _runs(ordered))
            span = int(key.max()) + 1
        key = key * base + digit
        span = span * base
    return key


def history_leaves(code: Tensor, time: Tensor, start: Tensor, end: Tensor) -> Leaves:
    """The leaves of every window ``[start, end)``: one sort of all pairs of a request and an event.

    Args:
        code: `[T, M]` int64 semantic IDs of the events, 0 for none.
        time: `[T]` int64, what decides which event is more recent.
        start, end: `[R]` int64, windows that may overlap.
    """
    if not torch.jit.is_scripting() and exporting():
        return _traced(code, time, start, end)
    event, request = expand_windows(start, end)
    votes = (code > 0).all(1)
    if not bool(votes.all()):
        pair = votes.index_select(0, event).nonzero().squeeze(1)
        event, request = event.index_select(0, pair), request.index_select(0, pair)
    key = row_keys(request, code.index_select(0, event))
    if key.numel() > 0 and int(key.max()) < 1 << 31:  # half the time
        key = key.int()
    key, order = torch.sort(key, stable=True)
    event, leaf = event.index_select(0, order), _runs(key)
    leaves = int(leaf[-1]) + 1 if leaf.numel() > 0 else 0
    count = torch.bincount(leaf, minlength=leaves)
    first = torch.cumsum(count, 0) - count
    of_request = request.index_select(0, order.index_select(0, first))
    return Leaves(
        code.index_select(0, event.index_select(0, first)),
        of_request,
        count,
        _segment_max(time.index_select(0, event), leaf, leaves),
        offsets_of(torch.bincount(of_request, minlength=start.numel())),
        event,
        leaf,
    )


@torch.jit.unused
def _traced(code: Tensor, time: Tensor, start: Tensor, end: Tensor) -> Leaves:
    return Leaves(*traced_leaves(code, time, start, end))


@torch.jit.unused
def _traced_kept(leaves: Leaves, keep: list[int]) -> Tensor:
    requests = leaves.offsets.numel() - 1
    return traced_pruning(leaves.code, leaves.request, leaves.votes, leaves.latest, requests, keep)


def tree_nodes(leaves: Leaves, keep: list[int]) -> list[Nodes]:
    """Every node of levels 1 … M with its votes, and whether pruning keeps it: what a picture of the tree needs.

    Args:
        keep: [k_1 … k_M], the most children kept under each kept parent.
    """
    request, votes, latest = leaves.request, leaves.votes, leaves.latest
    levels: list[Nodes] = []
    parent = request  # of each leaf, at the level above: at first its request
    parent_kept = torch.ones([leaves.offsets.numel() - 1], dtype=torch.bool, device=request.device)
    new = torch.zeros_like(request, dtype=torch.bool)  # leaves that begin a node: nodes are runs of sorted leaves
    new[1:] = request[1:] != request[:-1]
    for level, k in enumerate(keep):
        new[1:] = new[1:] | (leaves.code[1:, level] != leaves.code[:-1, level])
        node = torch.cumsum(new.long(), 0)
        nodes = int(node[-1]) + 1 if node.numel() > 0 else 0
        count = torch.bincount(node, minlength=nodes)
        first = torch.cumsum(count, 0) - count
        node_votes = torch.zeros_like(count).index_add_(0, node, votes)
        node_latest = _segment_max(latest, node, nodes)
        above = parent.index_select(0, first)
        rival = parent_kept.index_select(0, above).nonzero().squeeze(1)  # the children of kept parents
        best = _best(
            above.index_select(0, rival), node_votes.index_select(0, rival), node_latest.index_select(0, rival), k
        )
        kept = torch.zeros_like(count, dtype=torch.bool).index_fill_(0, rival.masked_select(best), True)
        code = leaves.code.index_select(0, first)[:, : level + 1]
        levels.append(Nodes(code, request.index_select(0, first), node_votes, node_latest, kept))
        parent, parent_kept = node, kept
    return levels


def tree_agents(code: Tensor, time: Tensor, start: Tensor, end: Tensor, keep: list[int]) -> Agents:
    """The agents of every request: see the top of this file, and :func:`history_leaves` for the arguments.

    >>> code = torch.tensor([[1, 1], [1, 2], [2, 1], [1, 2]])
    >>> tree_agents(code, torch.arange(4), torch.tensor([0]), torch.tensor([4]), [1, 1]).code
    tensor([[1, 2]])
    """
    return keep_agents(history_leaves(code, time, start, end), keep)


def keep_agents(leaves: Leaves, keep: list[int]) -> Agents:
    """The leaves kept by pruning the tree with `keep` = [k_1 … k_M]: at most Π k_l a request."""
    if len(keep) == 0 or len(keep) != leaves.code.size(1) or min(keep) < 1:
        raise ValueError(f"keep is {keep}: it needs a number >= 1 for each of the {leaves.code.size(1)} levels")
    if not torch.jit.is_scripting() and exporting():
        return _agents(leaves, _traced_kept(leaves, keep))
    return _agents(leaves, tree_nodes(leaves, keep)[-1].kept)


def keep_leaves(leaves: Leaves, most: int) -> Agents:
    """Without voting on the tree: every leaf is an agent, but at most the `most` with most votes of each request."""
    return _agents(leaves, _best(leaves.request, leaves.votes, leaves.latest, most))


def _agents(leaves: Leaves, kept: Tensor) -> Agents:
    """The leaves marked in `kept` `[U]`."""
    index = kept.nonzero().squeeze(1)
    request = leaves.request.index_select(0, index)
    return Agents(
        leaves.code.index_select(0, index),
        leaves.votes.index_select(0, index),
        request,
        offsets_of(torch.zeros_like(leaves.offsets[1:]).index_add_(0, request, torch.ones_like(request))),
        torch.zeros_like(leaves.offsets[1:]).index_add_(0, leaves.request, leaves.votes),
    )


def _best(parent: Tensor, votes: Tensor, latest: Tensor, k: int) -> Tensor:
    """Which children are among the k best of their parent: most votes, then latest, then first in the given order.

    parent: `[n]` ascending; children of one parent come in the order of their codes. Returns `[n]` bool.
    """
    if not torch.jit.is_scripting() and exporting():
        return traced_best(parent, votes, latest, torch.ones_like(votes, dtype=torch.bool), k)
    if votes.numel() == 0:
        return torch.zeros_like(votes, dtype=torch.bool)
    children = torch.bincount(parent)
    crowded = (children > k).index_select(0, parent)
    best = ~crowded  # of parents with no more than k children all are kept, unsorted
    rival = crowded.nonzero().squeeze(1)
    if rival.numel() == 0:
        return best
    parent, votes, latest = parent.index_select(0, rival), votes.index_select(0, rival), latest.index_select(0, rival)
    most = int(votes.max()) + 1  # votes >= 1: keys of two parents never meet
    key, age = parent * most - votes, int(latest.max()) - latest
    if int(age.max()) < (1 << 62) // (int(parent.max() + 1) * most):
        order = torch.sort(key * (int(age.max()) + 1) + age, stable=True)[1]
    else:
        order = torch.sort(age, stable=True)[1]
        order = order.index_select(0, torch.sort(key.index_select(0, order), stable=True)[1])
    # crowded parents are runs of the sorted order, in the places they had before
    children = torch.bincount(parent)
    first = torch.cumsum(children, 0) - children
    rank = torch.arange(rival.numel(), device=rival.device) - first.index_select(0, parent)
    return best.index_fill_(0, rival.index_select(0, order.masked_select(rank < k)), True)


def _runs(ordered: Tensor) -> Tensor:
    """The rank of each element among the distinct values of a sorted `[n]`."""
    new = torch.zeros_like(ordered)
    new[1:] = (ordered[1:] != ordered[:-1]).long()
    return torch.cumsum(new, 0)


def _segment_max(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """The greatest of `x` `[n]` int64 in each segment; every segment has one."""
    return x.new_zeros([segments]).scatter_reduce(0, segment, x, "amax", include_self=False)
