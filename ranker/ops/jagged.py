"""Ranges and segments: the vocabulary of jagged data.

A *window* is a half-open range ``[start, end)`` into T tokens; windows may overlap, which is how requests of one user
share one history row. *Pairs* are all (window, token) combinations, window after window: P = Σ (end − start).
"""

import torch
from torch import Tensor


def offsets_of(lengths: Tensor) -> Tensor:
    """Lengths `[R]` to offsets `[R + 1]`: ``offsets[r]`` is where segment r begins.

    >>> offsets_of(torch.tensor([2, 0, 3]))
    tensor([0, 2, 2, 5])
    """
    return torch.nn.functional.pad(torch.cumsum(lengths, 0), [1, 0])


def segments_of(offsets: Tensor, elements: int | None = None) -> Tensor:
    """Offsets `[R + 1]` to the segment of each element `[N]`.

    Args:
        elements: N where it is known, which saves looking it up.

    >>> segments_of(torch.tensor([0, 2, 2, 5]))
    tensor([0, 0, 2, 2, 2])
    """
    lengths = offsets[1:] - offsets[:-1]
    segments = torch.arange(lengths.numel(), device=offsets.device)
    return torch.repeat_interleave(segments, lengths, output_size=elements)


def expand_windows(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of the windows ``[start, end)``.

    Args:
        start, end: `[R]` int64, ``start <= end``.

    Returns:
        token `[P]`: index of the pair's token; window `[P]`: its window, ascending.

    >>> expand_windows(torch.tensor([0, 1]), torch.tensor([2, 4]))
    (tensor([0, 1, 1, 2, 3]), tensor([0, 0, 1, 1, 1]))
    """
    lengths = end - start
    window = torch.repeat_interleave(torch.arange(start.numel(), device=start.device), lengths)
    first_pair = torch.cumsum(lengths, 0) - lengths
    token = torch.arange(window.numel(), device=start.device) + (start - first_pair)[window]
    return token, window


def segment_sum(x: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sum the rows of `x` `[P, ...]` by `segment` `[P]`: `[segments, ...]`, zero where a segment has none."""
    shape = [segments] + list(x.shape[1:])  # noqa: RUF005  TorchScript unpacks no lists
    out = torch.zeros(shape, dtype=x.dtype, device=x.device)
    return out.index_add(0, segment, x)


def segment_softmax(scores: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Softmax of `scores` `[P, h]` within each segment; the greatest score is subtracted first."""
    index = segment.unsqueeze(1).expand_as(scores)
    top = torch.full([segments, scores.size(1)], float("-inf"), dtype=scores.dtype, device=scores.device)
    top = top.scatter_reduce(0, index, scores.detach(), "amax")
    weight = torch.exp(scores - top[segment])
    return weight / segment_sum(weight, segment, segments)[segment]


def window_mean(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean of `x` `[T, d]` over each window: `[R, d]`, zero for an empty one. O(T + R), however windows overlap.

    Sums are differences of a running sum, kept in float64 so that nothing is lost over long histories.
    """
    running = torch.nn.functional.pad(torch.cumsum(x.double(), 0), [0, 0, 1, 0])
    count = (end - start).clamp(min=1).unsqueeze(1)
    return ((running[end] - running[start]) / count).to(x.dtype)


def log_bucket(gap: Tensor, buckets: int) -> Tensor:
    """Bucket non-negative gaps by powers of two: 0 → 0, [1, 2) → 1, [2, 4) → 2, … capped at ``buckets − 1``."""
    return (torch.log2(gap.clamp(min=0).double() + 1e-9).floor() + 1).clamp(0, buckets - 1).long()
