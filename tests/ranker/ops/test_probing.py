"""The distinct (request, code) pairs against a loop over candidates."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ranker.ops import probing
from ranker.ops.jagged import offsets_of
from ranker.ops.probing import distinct_probes, known_codes

codes = st.sampled_from([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)])
batches = st.lists(st.lists(codes, max_size=8), max_size=6)


def found_in(requests: list[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """code, request, probe, first of a batch given as each request's candidates' codes."""
    code = torch.tensor([c for candidates in requests for c in candidates], dtype=torch.int64)
    offsets = offsets_of(torch.tensor([len(candidates) for candidates in requests], dtype=torch.int64))
    code, request, probe, first = (x.tolist() for x in distinct_probes(code, offsets))
    return code, request, probe, first


@given(batches)
def test_equals_the_loop(requests: list[list[int]]):
    """Each pair once, in order, with the first candidate that has it; every candidate finds its own."""
    pairs = [(r, c) for r, candidates in enumerate(requests) for c in candidates]
    distinct = sorted(set(pairs))
    code, request, probe, first = found_in(requests)
    assert list(zip(request, code, strict=True)) == distinct
    assert probe == [distinct.index(pair) for pair in pairs]
    assert first == [pairs.index(pair) for pair in distinct]


def test_the_same_code_of_two_requests_is_two_probes():
    """And of one request it is one, however often and wherever it stands."""
    assert found_in([[5, 9, 5, 5], [], [9, 5]]) == ([5, 9, 5, 9], [0, 0, 2, 2], [0, 1, 0, 0, 3, 2], [0, 1, 5, 4])


@pytest.mark.parametrize("requests", [[], [[]], [[], []]])
def test_no_candidates_have_no_probes(requests: list[list[int]]):
    """Of the right type: they index."""
    assert found_in(requests) == ([], [], [], [])
    assert all(x.dtype == torch.int64 for x in distinct_probes(torch.zeros(0).long(), torch.zeros(1).long()))


def test_codes_far_apart_are_not_confused():
    """Where 2³² · request + code would take one request's code for the next one's."""
    requests = [[2**31, 2**31 + 2**32]] * 200
    code, request, probe, _ = found_in(requests)
    assert len(code) == 400
    assert [(request[p], code[p]) for p in probe] == [(r, c) for r, cs in enumerate(requests) for c in cs]


def test_scripted_is_the_same_on_other_sizes():
    """TorchScript gives the same whatever sizes came before."""
    scripted = torch.jit.script(distinct_probes)
    for requests in ([[3, 1, 3], [1]], [], [[], [2, 2]], [[1] * 9] * 4):
        code = torch.tensor([c for candidates in requests for c in candidates], dtype=torch.int64)
        offsets = offsets_of(torch.tensor([len(candidates) for candidates in requests], dtype=torch.int64))
        for ours, theirs in zip(scripted(code, offsets), distinct_probes(code, offsets), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_example_holds():
    """As the docstring prints it."""
    assert doctest.testmod(probing).failed == 0


def test_known_codes_go_by_their_own_codebook():
    codes = torch.tensor([[0, 4], [3, 2], [-1, 3]])
    assert known_codes(codes, [4, 3]).tolist() == [[0, 0], [3, 2], [0, 0]]
    assert known_codes(codes[:, :0], []).shape == (3, 0)
