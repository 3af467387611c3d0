"""Jagged sequences in groups of similar length, for kernels that want a batch of equal ones.

Within a group the shortest has more than three quarters of the longest's tokens, so that padding is at most a third of
the tokens whatever the lengths, and the number of groups grows with the logarithm of the longest.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LengthGroup(NamedTuple):
    """g sequences, none empty.

    row: `[g, longest]` int64, the token at each place; padding, at the end, repeats the sequence's last.
    real: `[g, longest]` bool, false for padding.
    """

    row: Tensor
    real: Tensor


def length_groups(offsets: Tensor, most: int = 0) -> list[LengthGroup]:
    """Every sequence ``offsets[r] : offsets[r + 1]`` that has tokens, in one group, the longest first.

    Args:
        most: places of a group, unless it has one sequence; 0: any number.
    """
    length, order = torch.sort(offsets[1:] - offsets[:-1], descending=True, stable=True)
    lengths: list[int] = length.tolist()
    groups: list[LengthGroup] = []
    first = 0
    while first < len(lengths) and lengths[first] > 0:
        longest, end = lengths[first], first + 1
        while end < len(lengths) and 4 * lengths[end] > 3 * longest:
            if most > 0 and (end + 1 - first) * longest > most:
                break
            end += 1
        row = offsets[:-1][order[first:end]].unsqueeze(1) + torch.arange(longest, device=offsets.device)
        last = offsets[1:][order[first:end]].unsqueeze(1) - 1
        groups.append(LengthGroup(torch.minimum(row, last), row <= last))
        first = end
    return groups


def in_group(x: Tensor, group: LengthGroup) -> Tensor:
    """Tokens `[T, h, d]` to `[g, h, longest, d]`."""
    size = [group.row.size(0), group.row.size(1), x.size(1), x.size(2)]
    return x.index_select(0, group.row.flatten()).view(size).transpose(1, 2)


def out_of_groups(parts: list[Tensor], groups: list[LengthGroup]) -> Tensor:
    """`[g, h, longest, d]` of each group to tokens `[T, h, d]`. There is at least one group."""
    tokens = torch.cat([part.transpose(1, 2)[group.real] for part, group in zip(parts, groups)])  # noqa: B905
    row = torch.cat([group.row[group.real] for group in groups])
    return torch.zeros_like(tokens).index_copy(0, row, tokens)
