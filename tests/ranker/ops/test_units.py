"""Requests that share a window: what is covered, what each query keeps of it, and that it saves work."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranker.ops.units import shared_windows, sizes_of, units_of
from tests.ranker.histories import Shape, shape, shapes


def gathered(offsets: Tensor, start: Tensor, end: Tensor) -> int:
    """Places of events that the units of a batch have."""
    width, chunk = sizes_of(offsets, start, end)
    return units_of(offsets, start, end, width, chunk).within.numel()


@given(shapes(longest=80), st.sampled_from([0, 8, 1000]))
@settings(deadline=None)
def test_every_query_keeps_its_own_window(batch: Shape, most_queries: int):
    """Groups are of neighbours, cover their windows and no more, and are of all requests once."""
    start, end, offsets = batch.windows()
    shared = shared_windows(offsets, start, end, most_queries)
    request = torch.repeat_interleave(torch.arange(batch.requests), offsets[1:] - offsets[:-1])
    if shared.low.numel() == 0:
        assert torch.equal(shared.start, start)
        assert torch.equal(shared.end, end)
        assert torch.equal(shared.q_offsets, offsets)
        return
    assert 0 < shared.start.numel() < batch.requests
    assert shared.q_offsets[0] == 0
    assert shared.q_offsets[-1] == batch.candidates
    assert set(shared.q_offsets.tolist()) <= set(offsets.tolist())
    group = torch.repeat_interleave(torch.arange(shared.start.numel()), shared.q_offsets[1:] - shared.q_offsets[:-1])
    assert torch.equal(shared.start[group] + shared.low, start[request])
    assert torch.equal(shared.start[group] + shared.high, end[request])
    assert bool((shared.high <= (shared.end - shared.start)[group]).all())


def test_the_requests_of_a_user_gather_their_events_once():
    """Thirty successive requests over 200 events each; those of the next user are apart."""
    windows = [(user, 0, 170 + i) for user in range(2) for i in range(30)]
    start, end, offsets = shape([200, 200], windows, [1] * 60).windows()
    shared = shared_windows(offsets, start, end)
    assert shared.start.tolist() == [0, 200]
    assert shared.end.tolist() == [199, 399]
    assert gathered(shared.q_offsets, shared.start, shared.end) * 20 < gathered(offsets, start, end)


def test_windows_that_drift_are_not_covered_by_one():
    """A group's window is at most about half as long again as its first request's."""
    windows = [(0, i, i + 50) for i in range(400)]
    start, end, offsets = shape([500], windows, [1] * 400).windows()
    shared = shared_windows(offsets, start, end)
    assert 10 < shared.start.numel() < 50
    assert int((shared.end - shared.start).max()) <= 76


def test_requests_of_many_candidates_are_left_apart():
    """There, what is gathered is little beside what is computed."""
    start, end, offsets = shape([50], [(0, 0, 49), (0, 0, 50)], [9, 9]).windows()
    assert shared_windows(offsets, start, end).start.numel() == 2
    assert shared_windows(offsets, start, end, 9).start.numel() == 1
