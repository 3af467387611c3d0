"""Which groups of a user get a record: those that candidates of hers are likely to be of, by what she did before.

A block with probes keeps a record for each (user, code), and cannot keep all. Codes are numbers of a probe's feature
from 1; 0, no code, is a group too, which candidates without a code ask about.

All users of a batch are ranked at once, by sorting pairs (user, code). Symbols: R users, T events, Q pairs, K codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ranker.memory.config import CodesConfig
from ranker.ops.jagged import expand_windows

_DISTANCES = 1 << 22
"""held at a time"""


class Codes(NamedTuple):
    """code, request: `[Q]` int64, each pair once, ascending by request; a user's in the policy's order, 0 at the end.
    cut: pairs that the policy would have had without `most`."""

    code: Tensor
    request: Tensor
    cut: int


class _Seen(NamedTuple):
    """Groups of histories, each once: request `[P]`, code `[P]`, their events `[P]`, and the last of them `[P]`."""

    request: Tensor
    code: Tensor
    events: Tensor
    last: Tensor

    def at(self, which: Tensor) -> _Seen:
        """Some of them."""
        return _Seen(self.request[which], self.code[which], self.events[which], self.last[which])


def codes_of(config: CodesConfig, code: Tensor, start: Tensor, end: Tensor, nearest: Tensor | None = None) -> Codes:
    """The groups of each user that get a record.

    Args:
        code: `[T]` int64, of the events, 0 for none; start, end: `[R]`, each user's events.
        nearest: for the policy of that name, :func:`nearest_codes`.
    """
    seen = _seen(code, start, end)
    seen = seen.at(torch.argsort(seen.last, descending=True, stable=True))
    if config.policy != "seen":
        seen = seen.at(torch.argsort(seen.events, descending=True, stable=True))
    seen = seen.at(torch.argsort(seen.request, stable=True))
    kept = _first(seen.request, config.most)
    cut = seen.request.numel() - int(kept.sum()) if config.policy != "nearest" else 0
    request, found = seen.request[kept], seen.code[kept]
    if config.policy == "nearest":
        assert nearest is not None
        request, found = _filled_up(request, found, nearest, config.most)
    if config.without_code:
        every = torch.arange(start.numel(), device=code.device)
        request, found = torch.cat([request, every]), torch.cat([found, torch.zeros_like(every)])
        order = torch.argsort(request, stable=True)
        request, found = request[order], found[order]
    return Codes(found, request, cut)


def nearest_codes(codewords: Tensor, most: int) -> Tensor:
    """The codes by their codewords' distance from each, the nearest first, without itself: `[K + 1, min(most, K − 1)]`.

    Args:
        codewords: `[K, dim]`, of codes 1 … K; row 0 of the result means nothing. Of equally distant codes the smaller
            one is first.
    """
    words = codewords.double()
    k = words.size(0)
    rows = [torch.zeros([1, k], dtype=torch.int64)]
    step = max(_DISTANCES // k, 1)
    for first in range(0, k, step):
        some = words[first : first + step]
        distance = torch.cdist(some, words, compute_mode="donot_use_mm_for_euclid_dist")
        own = torch.arange(some.size(0))
        distance[own, first + own] = -1.0  # first of all, whatever shares its codeword
        rows.append(torch.argsort(distance, dim=1, stable=True) + 1)
    return torch.cat(rows)[:, 1 : most + 1]


def _seen(code: Tensor, start: Tensor, end: Tensor) -> _Seen:
    event, request = expand_windows(start, end)
    of_event = code[event]
    coded = of_event > 0
    event, request, of_event = event[coded], request[coded], of_event[coded]
    codes = int(of_event.max()) + 1 if of_event.numel() > 0 else 1
    pair, which, count = torch.unique(request * codes + of_event, return_inverse=True, return_counts=True)
    last = torch.full_like(pair, -1).scatter_reduce(0, which, event, "amax")
    return _Seen(torch.div(pair, codes, rounding_mode="floor"), pair % codes, count, last)


def _first(request: Tensor, most: int) -> Tensor:
    """Which are among the first `most` (0: all) of their request; `request` ascends."""
    if most == 0:
        return torch.ones_like(request, dtype=torch.bool)
    return _place(request) < most


def _place(request: Tensor) -> Tensor:
    """The place of each element among those of its request; `request` ascends."""
    return torch.arange(request.numel(), device=request.device) - torch.searchsorted(request, request)


def _filled_up(request: Tensor, code: Tensor, nearest: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Seen codes, and then the nearest of each, the second nearest of each, … until a request has `most`.

    Rounds are taken in growing numbers, since a few are enough for most users: a code that several have near counts
    once.
    """
    depth = nearest.size(1)
    rounds = 1
    done: list[tuple[Tensor, Tensor]] = []
    while request.numel() > 0:
        place, reach = _place(request), min(rounds, depth)
        near = nearest[code][:, :reach]
        # by round, then by the seen code's place; seen codes themselves are round 0
        turn = torch.arange(reach + 1, device=code.device).unsqueeze(0) * most + place.unsqueeze(1)
        found = torch.cat([code.unsqueeze(1), near], 1).flatten()
        of_request = request.repeat_interleave(reach + 1)
        of_request, found = _once(of_request, found, turn.flatten())
        kept = _first(of_request, most)
        of_request, found = of_request[kept], found[kept]
        if reach == depth:
            done.append((of_request, found))
            break
        full = torch.bincount(of_request) >= most
        done.append((of_request[full[of_request]], found[full[of_request]]))
        short = ~full[request]
        request, code, rounds = request[short], code[short], 2 * rounds
    if not done:
        return request, code
    whole = torch.cat([part for part, _ in done])
    order = torch.argsort(whole, stable=True)
    return whole[order], torch.cat([part for _, part in done])[order]


def _once(request: Tensor, code: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Each (request, code) once, by request and then by its first turn."""
    codes = int(code.max()) + 1
    pair, which = torch.unique(request * codes + code, return_inverse=True)
    first = torch.full_like(pair, torch.iinfo(torch.int64).max).scatter_reduce(0, which, turn, "amin")
    request = torch.div(pair, codes, rounding_mode="floor")
    order = torch.argsort(first, stable=True)
    order = order[torch.argsort(request[order], stable=True)]
    return request[order], pair[order] % codes
