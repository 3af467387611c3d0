"""CTR and CTCVR over all impressions (ESMM, Ma et al. 2018, arXiv:1804.07931): pCTCVR = pCTR · pCVR.

CVR has no loss of its own: it is learned through the product, so it sees every impression and not clicked ones only.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def esmm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed binary cross-entropies of each task: `[tasks]`.

    Args:
        logits: `[N, 1]` (click) or `[N, 2]` (click; conversion given a click).
        labels: `[N, tasks]` in {0, 1}: click; conversion, which counts on clicks only.
    """
    ctr = binary_cross_entropy_with_logits(logits[:, 0], labels[:, 0], reduction="sum")
    if logits.size(1) == 1:
        return ctr.unsqueeze(0)
    log_p = logsigmoid(logits[:, 0]) + logsigmoid(logits[:, 1])
    # 1 − p stays exact near p = 1, log(1 − e^x) by expm1 (x < 0), so that a confident mistake is still pushed back
    log_not_p = torch.log(-torch.expm1(log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)))
    both = labels[:, 0] * labels[:, 1]
    ctcvr = -(both * log_p + (1 - both) * log_not_p).sum()
    return torch.stack([ctr, ctcvr])


def click_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed binary cross-entropies of clicks for each of k predictions: `[k]` of logits `[N, k]`; labels as above."""
    clicks = labels[:, :1].expand_as(logits)
    return binary_cross_entropy_with_logits(logits, clicks, reduction="none").sum(0)


def esmm_probabilities(logits: Tensor) -> Tensor:
    """`[N, 1]` (pCTR) or `[N, 3]` (pCTR, pCTCVR, pCVR)."""
    p = torch.sigmoid(logits)
    if p.size(1) == 1:
        return p
    return torch.stack([p[:, 0], p[:, 0] * p[:, 1], p[:, 1]], 1)
