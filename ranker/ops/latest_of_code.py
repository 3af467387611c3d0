"""The index of a hard search: the latest K events of a window that have a given code (SIM, Pi et al. 2020)."""

import torch
from torch import Tensor


def naive_latest_of_code(code: Tensor, start: Tensor, end: Tensor, asked: Tensor, request: Tensor, top: int) -> Tensor:
    """The definition: see :func:`latest_of_code`."""
    event = torch.full([asked.numel(), top], -1)
    for p in range(asked.numel()):
        window = range(int(start[request[p]]), int(end[request[p]]))
        same = [i for i in window if code[i] == asked[p] and asked[p] != 0][::-1][:top]
        event[p, : len(same)] = torch.tensor(same, dtype=torch.int64)
    return event


def latest_of_code(code: Tensor, start: Tensor, end: Tensor, asked: Tensor, request: Tensor, top: int) -> Tensor:
    """For each probe, the latest K events of its request's window ``[start[r], end[r])`` that have its code.

    Windows are ranges of one list, ordered by code and then by place: one sort of the events whose code is asked for,
    however many requests share them, and two binary searches a probe.

    Args:
        code: `[T]` int64 codes of the events.
        start, end: `[R]` int64, windows that may overlap.
        asked, request: `[Q]` int64, each probe's code, and its request. Code 0 is none and finds nothing.
        top: K.

    Returns:
        `[Q, K]` int64, the latest first; −1 where there are fewer.
    """
    events = code.numel()
    codes, rank = torch.unique(asked, return_inverse=True)
    if events == 0 or codes.numel() == 0:
        return torch.full([asked.numel(), top], -1, dtype=torch.int64, device=code.device)
    rank_of = torch.searchsorted(codes, code).clamp(max=codes.numel() - 1)
    event = (codes[rank_of] == code).nonzero().squeeze(1)
    listed = torch.sort(rank_of[event] * events + event)[0]  # by code, then by place
    low = torch.searchsorted(listed, rank * events + start[request])
    high = torch.searchsorted(listed, rank * events + end[request])
    place = high.unsqueeze(1) - 1 - torch.arange(top, device=code.device)
    found = (place >= low.unsqueeze(1)) & (asked != 0).unsqueeze(1)
    place = torch.where(found, place, torch.zeros_like(place))
    if listed.numel() == 0:
        return torch.full_like(place, -1)
    return torch.where(found, listed[place] % events, torch.full_like(place, -1))
