"""Groups of sequences of similar length."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ranker.ops.jagged import offsets_of
from ranker.ops.length_groups import in_group, length_groups, out_of_groups

any_lengths = st.lists(st.integers(0, 60), max_size=9)


@given(any_lengths, st.sampled_from([0, 1, 50]))
@example([], 0)
@example([0, 0], 0)
@example([60] * 4, 120)
@settings(deadline=None, max_examples=60)
def test_every_token_comes_out_where_it_was(lengths: list[int], most: int):
    """Groups have all tokens once, little padding, and no more places than asked for."""
    offsets = offsets_of(torch.tensor(lengths, dtype=torch.int64))
    x = torch.randn(sum(lengths), 2, 3, requires_grad=True)
    groups = length_groups(offsets, most)
    assert (len(groups) == 0) == (sum(lengths) == 0)
    if groups:
        parts = [in_group(x, group) for group in groups]
        assert all(
            part.shape == (len(group.row), 2, group.row.size(1), 3) for part, group in zip(parts, groups, strict=True)
        )
        out = out_of_groups(parts, groups)
        assert torch.equal(out, x)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert bool((gradient == 1).all())
    for group in groups:
        assert not most or len(group.row) == 1 or group.row.numel() <= most
        assert group.row.numel() * 3 <= int(group.real.sum()) * 4


def test_groups_are_few():
    """As the logarithm of the longest."""
    assert len(length_groups(offsets_of(torch.arange(2000)))) < 30
