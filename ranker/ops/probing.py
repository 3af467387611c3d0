"""The distinct target groups that a batch asks about: work that depends on a candidate's group alone is done once each.

A *probe* is a pair (request, code): a request's candidates that share a code share the probe.
"""

import torch
from torch import Tensor

from ranker.ops.jagged import segments_of


def distinct_probes(code: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each (request, code) of a batch's candidates once, ascending by request, then by code.

    Args:
        code: `[N]` int64, any value: the group of each candidate.
        offsets: `[R + 1]` int64, the candidates of request r are ``offsets[r] : offsets[r + 1]``.

    Returns:
        code `[Q]` and request `[Q]` of the probes; probe `[N]`: each candidate's; first `[Q]`: the first candidate of
        each, where what belongs to the group (its embedding) can be looked up once.

    >>> distinct_probes(torch.tensor([7, 4, 7, 7]), torch.tensor([0, 3, 4]))
    (tensor([4, 7, 7]), tensor([0, 0, 1]), tensor([1, 0, 1, 2]), tensor([1, 0, 3]))
    """
    request = segments_of(offsets)
    # a code's rank among the batch's codes is below N: request · N + rank fits 64 bits, whatever the codes
    _, rank = torch.unique(code, return_inverse=True)
    pairs, probe = torch.unique(request * code.numel() + rank, return_inverse=True)
    candidate = torch.arange(code.numel(), device=code.device)
    first = torch.full_like(pairs, code.numel()).scatter_reduce(0, probe, candidate, "amin")
    return code[first], request[first], probe, first


def known_codes(codes: Tensor, sizes: list[int]) -> Tensor:
    """Codes `[·, features]` that their codebook does not have are 0, none."""
    if len(sizes) == 0:
        return codes
    size = torch.tensor(sizes, device=codes.device)
    return torch.where((codes >= 0) & (codes < size), codes, torch.zeros_like(codes))
