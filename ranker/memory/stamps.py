"""Stamps: a record of each user beside those of her memories, that says what they were made from.

A refresh compares a stamp with the user's history, and remakes memories only where they differ; the codes in it tell
which records there are, without looking for each. A stamp lies at a block number that no model has, and holds no values
but `exact` numbers, integers below 2^24 as float32 has them all: the events known (in two parts), and for each block
with probes how many codes, and the codes. Its `time` is that of the last event known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from features.errors import UserError
from ranker.longseq.stored import Stored
from ranker.ops.jagged import expand_windows, offsets_of

BLOCK = 2**32 - 1
"""number of the block that stamps are of"""
_BITS = 24
_WHOLE = 1 << _BITS


class Asked(NamedTuple):
    """code, request: `[Q]` int64, the groups of one block that users have records of, ascending by request."""

    code: Tensor
    request: Tensor


class Stamps(NamedTuple):
    """events, last: `[R]` int64, of each user, how many were known and the time of the last; found: `[R]` bool, false
    for a user without a stamp; asked: for each block with probes, in their order."""

    events: Tensor
    last: Tensor
    found: Tensor
    asked: list[Asked]


def stamped(events: Tensor, last: Tensor, asked: Sequence[Asked]) -> Stored:
    """Stamps as records.

    Raises:
        UserError: a code is 2^24 or more.
    """
    counts = [torch.bincount(one.request, minlength=events.numel()) for one in asked]
    lengths = torch.full_like(events, 2 + len(asked)) + sum(counts, torch.zeros_like(events))
    place = offsets_of(lengths)[:-1]
    exact = torch.zeros([int(lengths.sum())])
    exact[place], exact[place + 1] = (events % _WHOLE).float(), (events >> _BITS).float()
    place = place + 2
    for one, count in zip(asked, counts, strict=True):
        if one.code.numel() and int(one.code.max()) >= _WHOLE:
            raise UserError(
                f"a probe's code is {int(one.code.max()):,}, and a stamp holds codes below {_WHOLE:,}; probe with a "
                "feature of fewer values"
            )
        exact[place] = count.float()
        exact[expand_windows(place + 1, place + 1 + count)[0]] = one.code.float()
        place = place + 1 + count
    none = torch.zeros([0])
    return Stored(none, exact, torch.stack([torch.zeros_like(lengths), lengths], 1), last)


def read_stamps(stored: Stored, blocks: int) -> Stamps:
    """What stamps say.

    Args:
        stored: of R users, a lost one of lengths 0, 0; blocks: those with probes.
    """
    lengths = stored.lengths[:, 1]
    found = lengths > 0
    numbers = torch.cat([stored.exact, torch.zeros([2])]).long()  # so that a lost last one reads something
    place = offsets_of(lengths)[:-1]
    events = torch.where(found, numbers[place] + (numbers[place + 1] << _BITS), 0)
    place = place + 2
    asked: list[Asked] = []
    for _ in range(blocks):
        count = torch.where(found, numbers[place.clamp(max=numbers.numel() - 1)], 0)
        at, request = expand_windows(place + 1, place + 1 + count)
        asked.append(Asked(numbers[at], request))
        place = place + 1 + count
    return Stamps(events, stored.time, found, asked)
