"""LETTER's two losses on top of RQ-VAE's (Wang et al. 2024, "Learnable Item Tokenization for Generative
Recommendation"): codes that agree with behaviour, and codewords that spread evenly.

Both are contrasts of cosines at a temperature τ; the paper uses plain inner products, which grow with the vectors'
lengths. B: items of a batch, K: codewords of a level.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from features.semantic_ids.quantizers import residual
from features.semantic_ids.quantizers.residual_kmeans import cluster

_ITERATIONS = 10


def collaborative_loss(quantized: Tensor, collaborative: Tensor, temperature: float) -> Tensor:
    """Contrast of quantised items ẑ `[B, dc]` with behaviour embeddings h `[B, dc]`; items without behaviour (all 0)
    are left out.

    L_CF = −mean_i log( exp⟨ẑ_i, h_i⟩/τ / Σ_j exp⟨ẑ_i, h_j⟩/τ )
    """
    known = collaborative.any(1)
    z, h = F.normalize(quantized[known], dim=1), F.normalize(collaborative[known], dim=1)
    if len(h) < 2:
        return quantized.sum() * 0
    return F.cross_entropy(z @ h.T / temperature, torch.arange(len(h), device=h.device))


def diversity_loss(codewords: Tensor, chosen: Tensor, companions: Tensor, temperature: float) -> Tensor:
    """Draws each item's codeword `chosen` `[B]` of `[K, dz]` to another of its group, `companions` `[B]`, −1 for none,
    and away from all others.

    L_div = −mean_i log( exp⟨e_i, e_+⟩/τ / Σ_{j ≠ i} exp⟨e_i, e_j⟩/τ )
    """
    has_companion = companions >= 0
    chosen, companions = chosen[has_companion], companions[has_companion]
    if len(chosen) == 0:
        return codewords.sum() * 0
    e = F.normalize(codewords, dim=1)
    cosines = (e[chosen] @ e.T / temperature).scatter(1, chosen[:, None], -torch.inf)  # an item's own: not among j
    return F.cross_entropy(cosines, companions)


def group_codewords(codewords: Tensor, clusters: int, seed: int) -> Tensor:
    """The group `[K]` of each codeword: K-means of their directions."""
    directions = F.normalize(codewords.detach(), dim=1).cpu().numpy()
    centres = cluster(directions, min(clusters, len(directions)), _ITERATIONS, 1, seed)
    return torch.from_numpy(residual.nearest(directions, centres).astype(np.int64)).to(codewords.device)


def draw_companions(groups: Tensor, chosen: Tensor) -> Tensor:
    """For each of `chosen` `[B]` another codeword of its group, at random; −1 where it is alone."""
    others = (groups[:, None] == groups).fill_diagonal_(False)[chosen].float()
    alone = ~others.any(1)
    others[alone, 0] = 1  # multinomial needs something to draw
    return torch.multinomial(others, 1).squeeze(1).masked_fill(alone, -1)
