"""Leaves and agents as ``torch.export`` traces them: no decision by the data, and a node for every leaf.

What :mod:`ranker.ops.votes` decides by the data, whether keys fit and who needs to be sorted, is not decided here: keys
give way to their ranks at every level, and all children are sorted. A level has as many nodes as there are leaves, of
which those behind the last have no votes.
"""

import torch
from torch import Tensor

from ranker.ops.jagged import expand_windows, offsets_of
from ranker.ops.padded import held_open


def traced_leaves(
    code: Tensor, time: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of :func:`ranker.ops.votes.history_leaves`, in their order."""
    event, request = expand_windows(start, end)
    pair = (code > 0).all(1).index_select(0, event).nonzero().squeeze(1)
    event, request = event.index_select(0, pair), request.index_select(0, pair)
    key, order = torch.sort(traced_keys(request, code.index_select(0, event)), stable=True)
    event, request, leaf = event.index_select(0, order), request.index_select(0, order), _runs(key)
    none = torch.full([1], -1, dtype=torch.int64, device=code.device)
    leaves = held_open(torch.cat([leaf, none]).max() + 1)
    votes = torch.zeros([leaves], dtype=torch.int64, device=code.device)
    count = votes.index_add(0, leaf, torch.ones_like(leaf))
    first = torch.cumsum(count, 0) - count
    of_request, of_event = request.index_select(0, first), event.index_select(0, first)
    latest = votes.scatter_reduce(0, leaf, time.index_select(0, event), "amax", include_self=False)
    requests = torch.zeros_like(start).index_add(0, of_request, torch.ones_like(of_request))
    return code.index_select(0, of_event), of_request, count, latest, offsets_of(requests), event, leaf


def traced_keys(request: Tensor, code: Tensor) -> Tensor:
    """Keys as of :func:`ranker.ops.votes.row_keys`, for fewer than 2^31 rows."""
    key, none = request, torch.zeros_like(request[:0])
    none = torch.nn.functional.pad(none, [0, 1])
    for level in range(code.size(1)):
        ordered, order = torch.sort(key)
        digit = code[:, level]
        base = torch.cat([digit, none]).max() + 1
        key = torch.zeros_like(key).scatter(0, order, _runs(ordered)) * base + digit
    return key


def traced_pruning(
    code: Tensor, request: Tensor, votes: Tensor, latest: Tensor, requests: int, keep: list[int]
) -> Tensor:
    """Which leaves pruning keeps `[U]`: leaves of all requests, by request, then by code."""
    parent, kept = request, torch.ones([requests], dtype=torch.bool, device=code.device)
    begins = _begins(request)
    for level, k in enumerate(keep):
        begins = begins | _begins(code[:, level])
        node = torch.cumsum(begins.long(), 0) - 1
        none = torch.zeros_like(votes)
        node_votes = none.index_add(0, node, votes)
        node_latest = none.scatter_reduce(0, node, latest, "amax", include_self=False)
        above = none.scatter(0, node, parent)
        rival = kept.index_select(0, above) & (node_votes > 0)
        parent, kept = node, rival & traced_best(above, node_votes, node_latest, rival, k)
    return kept.index_select(0, parent)


def traced_best(parent: Tensor, votes: Tensor, latest: Tensor, rival: Tensor, k: int) -> Tensor:
    """Which rivals `[n]` are among the k best of their parent: most votes, then latest, then in the given order."""
    order = torch.sort(latest, descending=True, stable=True)[1]
    order = order.index_select(0, torch.sort(votes.index_select(0, order), descending=True, stable=True)[1])
    order = order.index_select(0, torch.sort(parent.index_select(0, order), stable=True)[1])
    # the others last, so that a parent's rivals are a run, the best first
    order = order.index_select(0, torch.sort((~rival.index_select(0, order)).long(), stable=True)[1])
    begins = _begins(parent.index_select(0, order)) | _begins(rival.index_select(0, order).long())
    place, run = torch.arange(parent.numel(), device=parent.device), torch.cumsum(begins.long(), 0) - 1
    first = torch.zeros_like(place).scatter_reduce(0, run, place, "amin", include_self=False)
    rank = place - first.index_select(0, run)
    return torch.zeros_like(rival).scatter(0, order, rank < k)


def _begins(ordered: Tensor) -> Tensor:
    """Where a run of equal numbers begins `[n]`."""
    # by index: compiled, a shifted copy would be read from before its first number, which need not be there
    place = torch.arange(ordered.numel(), device=ordered.device)
    return (place == 0) | (ordered != ordered.index_select(0, (place - 1).clamp(min=0)))


def _runs(ordered: Tensor) -> Tensor:
    """The rank of each element among the distinct values of a sorted `[n]`."""
    return torch.cumsum(_begins(ordered).long(), 0) - 1
