"""A loss of the order within a user or a request, beside the log loss of every impression.

What is the same for a whole group does not count in it, so that it teaches the order within a user, which UAUC
measures, and nothing about levels. With the log loss beside it scores stay calibrated, as in JRC (Sheng et al. 2022,
arXiv:2208.06164), whose contextual loss it is with one logit instead of two.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def ranking_loss(logit: Tensor, label: Tensor, group: Tensor) -> Tensor:
    """Summed softmax losses of each click against the non-clicks of its group.

    Σ −log e^s / (e^s + Σ e^t) over clicks s and the non-clicks t of their group; zero for groups without either.

    Args:
        logit: `[N]`; label: `[N]` in {0, 1}; group: `[N]` int64, any values.
    """
    _, place = torch.unique(group, return_inverse=True)
    clicked = label > 0.5
    groups = logit.numel()  # at most
    others = logit.masked_fill(clicked, float("-inf"))
    top = torch.full([groups], float("-inf"), dtype=logit.dtype, device=logit.device)
    top = top.scatter_reduce(0, place, others.detach(), "amax").clamp(min=-1e30).index_select(0, place)
    total = torch.zeros([groups], dtype=logit.dtype, device=logit.device)
    total = total.index_add(0, place, torch.exp(others - top)).index_select(0, place)[clicked]
    ahead = total.clamp(min=torch.finfo(total.dtype).tiny).log() + top[clicked] - logit[clicked]
    return (softplus(ahead) * (total > 0)).sum()
