"""Groups that get a record: batches of users at once against one user after another."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ranker.memory.config import CodesConfig
from ranker.memory.policy import Codes, codes_of, nearest_codes


def ranked(config: CodesConfig, history: list[int], near: list[list[int]]) -> list[int]:
    """The groups of one user, read off the policies' words."""
    latest_first = [code for code in dict.fromkeys(reversed(history)) if code]
    if config.policy == "seen":
        found = latest_first
    else:
        count = Counter(history)
        found = sorted(latest_first, key=lambda code: -count[code])
    if config.policy == "nearest":
        seen = found[: config.most]
        in_turn = [near[code][place] for place in range(len(near[0])) for code in seen]
        found = list(dict.fromkeys(seen + in_turn))
    return found[: config.most] if config.most else found


def literal(config: CodesConfig, histories: list[list[int]], near: list[list[int]]) -> list[list[int]]:
    """Of all users."""
    return [ranked(config, history, near) + [0] * config.without_code for history in histories]


def by_user(codes: Codes, users: int) -> list[list[int]]:
    """What was found, user by user."""
    assert codes.request.tolist() == sorted(codes.request.tolist())
    found: list[list[int]] = [[] for _ in range(users)]
    for request, code in zip(codes.request.tolist(), codes.code.tolist(), strict=True):
        found[request].append(code)
    return found


def batch_of(histories: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Events of all, and each user's window."""
    offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
    return (
        torch.tensor([code for history in histories for code in history], dtype=torch.int64),
        offsets[:-1],
        offsets[1:],
    )


@st.composite
def _codewords(draw: st.DrawFn) -> torch.Tensor:
    """Few places, so that distances tie."""
    k = draw(st.integers(2, 9))
    return torch.tensor(draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=k, max_size=k))).float()


@settings(deadline=None, max_examples=300)
@given(
    codewords=_codewords(),
    data=st.data(),
    policy=st.sampled_from(["seen", "frequent", "nearest"]),
    most=st.integers(1, 12),
    without_code=st.booleans(),
)
def test_a_batch_of_users_is_ranked_as_each_alone(
    codewords: torch.Tensor, data: st.DataObject, policy: str, most: int, without_code: bool
):
    histories = data.draw(st.lists(st.lists(st.integers(0, codewords.size(0)), max_size=12), max_size=6))
    config = CodesConfig.model_validate({"policy": policy, "most": most, "without_code": without_code})
    nearest = nearest_codes(codewords, most)
    found = codes_of(config, *batch_of(histories), nearest)
    assert by_user(found, len(histories)) == literal(config, histories, nearest.tolist())


@settings(deadline=None)
@given(histories=st.lists(st.lists(st.integers(0, 20))), policy=st.sampled_from(["seen", "frequent"]))
def test_without_a_cap_every_group_of_the_history_has_a_record(histories: list[list[int]], policy: str):
    config = CodesConfig.model_validate({"policy": policy, "most": 0})
    found = codes_of(config, *batch_of(histories))
    assert [sorted(codes) for codes in by_user(found, len(histories))] == [sorted({0, *h}) for h in histories]
    assert found.cut == 0


def test_groups_beyond_the_cap_are_counted():
    found = codes_of(CodesConfig(most=2), *batch_of([[1, 2, 3, 4], [5], [1, 1, 2, 3]]))
    assert by_user(found, 3) == [[4, 3, 0], [5, 0], [3, 2, 0]]
    assert found.cut == 3


@given(codewords=_codewords())
def test_nearest_codes_are_by_distance_and_then_by_number(codewords: torch.Tensor):
    k = codewords.size(0)
    nearest = nearest_codes(codewords, 100).tolist()
    for code in range(1, k + 1):
        others = [other for other in range(1, k + 1) if other != code]
        distance = {o: float((codewords[o - 1] - codewords[code - 1]).square().sum()) for o in others}
        assert nearest[code] == sorted(others, key=lambda other: (distance[other], other))


def test_distances_are_the_same_in_blocks_of_codes():
    """More codes than are compared at a time."""
    codewords = torch.arange(2500.0).unsqueeze(1)
    nearest = nearest_codes(codewords, 2)
    assert nearest.shape == (2501, 2)
    assert nearest[[1, 2, 1500, 2500]].tolist() == [[2, 3], [1, 3], [1499, 1501], [2499, 2498]]


def test_every_code_for_everybody_is_refused():
    with pytest.raises(ValidationError, match="most: 0 would be every code"):
        CodesConfig(policy="nearest", most=0)
