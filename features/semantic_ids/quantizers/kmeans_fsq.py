"""Residual K-means, and finite scalar quantisation (FSQ, Mentzer et al. 2023) of what its levels leave over.

    s = A r_{M−1} + a;   ŝ = FSQ(s), each scalar on one of a few steps in [−1, 1];   r̂ = B ŝ + b

The last code counts the combinations of steps, so its codewords B ŝ + b need no table that items must fill. A and B
start from the residual's principal axes and learn by reconstruction; B is then solved for exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vector_quantize_pytorch import FSQ

from features.semantic_ids.config import KMeansFsqConfig
from features.semantic_ids.errors import SidsError
from features.semantic_ids.quantizers import residual
from features.semantic_ids.quantizers.protocol import Codes, Floats, Log, State
from features.semantic_ids.quantizers.reproducible import reproducibly
from features.semantic_ids.quantizers.residual_kmeans import cluster_levels, codewords_key

_CHUNK = 65_536  # rows that are projected at a time
_LARGEST_STEP = 16  # more steps on one scalar are no longer finite scalar quantisation's few
_LOG_EVERY = 500  # steps


class Scalars(nn.Module):
    """Down to a few scalars, their steps, and up again."""

    def __init__(self, dim: int, fsq_levels: list[int]) -> None:
        super().__init__()
        self.down = nn.Linear(dim, len(fsq_levels))
        self.fsq = FSQ(fsq_levels, preserve_symmetry=True)  # symmetric steps, which also allow two of them
        self.up = nn.Linear(len(fsq_levels), dim)

    def forward(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """`[n, d]` → steps `[n, s]` in [−1, 1], gradients straight through, and codes `[n]`."""
        steps, codes = self.fsq(self.down(residuals)[None])
        return steps[0], codes[0]

    def codewords(self) -> Floats:
        """`[K_M, d]` of all codes."""
        with torch.no_grad():
            return self.up(self.fsq.implicit_codebook).numpy()


@dataclass(frozen=True)
class KMeansFsq:
    """`centroids[l]` `[K_l, d]` of the levels before the last, and the last level's scalars."""

    centroids: list[Floats]
    scalars: Scalars

    def encode(self, vectors: Floats) -> tuple[Codes, Floats]:
        """See :class:`protocol.Quantizer`: the codewords' space is that of the content. The last code is the one its
        scalars round to, which need not be the nearest codeword's."""
        codes, left = residual.encode(vectors, self.centroids)
        with torch.no_grad():
            last = [self.scalars(part)[1] for part in torch.from_numpy(left).split(_CHUNK)]
        return np.column_stack([codes, torch.cat(last).numpy()]).astype(np.int32), vectors

    def codewords(self) -> list[Floats]:
        """`[K_l, d]` of each level."""
        return [*self.centroids, self.scalars.codewords()]

    def decode(self, summed: Floats) -> Floats:
        """The sums themselves."""
        return summed

    def state(self) -> State:
        """The centroids and both projections."""
        state: State = {codewords_key(level): codewords for level, codewords in enumerate(self.centroids)}
        return state | {name: value.numpy() for name, value in self.scalars.state_dict().items()}

    @classmethod
    def of_state(cls, config: KMeansFsqConfig, levels: list[int], dim: int, state: State) -> KMeansFsq:
        """The inverse of :meth:`state`."""
        scalars = Scalars(dim, config.fsq_levels or default_fsq_levels(levels[-1]))
        scalars.load_state_dict({name: torch.tensor(state[name]) for name in scalars.state_dict()})
        return cls([state[codewords_key(level)] for level in range(len(levels) - 1)], scalars.eval())


def default_fsq_levels(codes: int) -> list[int]:
    """Steps of each scalar whose product is `codes`: fours, where that goes; the largest first.

    512 → 8 · 4 · 4 · 4;  1,000 → 8 · 5 · 5 · 5.
    """
    left, factors = codes, []
    while left % 4 == 0:
        left, factors = left // 4, [*factors, 4]
    twice, left = left % 2 == 0, left // math.gcd(left, 2)
    for prime in (3, 5, 7, 11, 13):
        while left % prime == 0:
            left, factors = left // prime, [*factors, prime]
    if left > 1:
        raise SidsError(
            f"quantizer.fsq_levels: {codes} codes of the last level have no factors of at most {_LARGEST_STEP} (left "
            f"over: {left}); choose another number of codes, e.g. {1 << (codes.bit_length() - 1)}, in levels"
        )
    if twice:
        smallest = min(factors, default=1)
        if 2 * smallest <= _LARGEST_STEP and factors:
            factors.remove(smallest)
            factors.append(2 * smallest)
        else:
            factors.append(2)
    return sorted(factors, reverse=True)


def fit(config: KMeansFsqConfig, levels: list[int], vectors: Floats, seed: int, threads: int, log: Log) -> KMeansFsq:
    """From a sample of content vectors `[n, d]`."""
    fsq_levels = config.fsq_levels or default_fsq_levels(levels[-1])
    with residual.faiss_threads(threads):
        centroids, left = cluster_levels(levels[:-1], vectors, config.iterations, config.restarts, seed, log)
    with reproducibly(seed):
        scalars = Scalars(vectors.shape[1], fsq_levels)
        residuals = torch.tensor(left, dtype=torch.float32)
        _start_from_principal_axes(scalars, residuals)
        _solve_up(scalars, residuals)
        _learn(scalars, residuals, config, log)
        _solve_up(scalars, residuals)
    return KMeansFsq(centroids, scalars.eval())


@torch.no_grad()
def _start_from_principal_axes(scalars: Scalars, residuals: Tensor) -> None:
    """Scalars are the first principal components at variance 1, which tanh spreads over the steps."""
    x = residuals.double()
    centred = x - x.mean(0)
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(x))  # rising
    count = min(scalars.down.out_features, scalars.down.in_features)
    first = axes.flip(1)[:, :count] / variance.flip(0)[:count].clamp(min=1e-12).sqrt()
    weight = torch.zeros_like(scalars.down.weight)
    weight[:count] = first.T * (variance.sum() > 0)
    if variance.sum() > 0:  # more scalars than columns: any other direction
        spread = variance.mean().sqrt() * math.sqrt(x.shape[1])
        weight[count:] = torch.randn_like(weight[count:]) / spread
    scalars.down.weight.copy_(weight)
    scalars.down.bias.copy_(-(scalars.down.weight @ x.mean(0).float()))


@torch.no_grad()
def _solve_up(scalars: Scalars, residuals: Tensor) -> None:
    """B and b of least error for the steps as they are."""
    ones = torch.ones(len(residuals), 1, dtype=torch.float64)
    steps = torch.cat([scalars(residuals)[0].double(), ones], 1)
    solution = torch.linalg.pinv(steps.T @ steps, hermitian=True) @ (steps.T @ residuals.double())
    scalars.up.weight.copy_(solution[:-1].T)
    scalars.up.bias.copy_(solution[-1])


def _learn(scalars: Scalars, residuals: Tensor, config: KMeansFsqConfig, log: Log) -> None:
    """Both projections, by the error of reconstruction as a share of the residuals' variance."""
    variance = (residuals - residuals.mean(0)).square().mean()
    if variance == 0:
        return
    optimizer = torch.optim.Adam(scalars.parameters(), lr=config.lr)
    for step in range(config.steps):
        batch = residuals[torch.randint(len(residuals), (config.batch,))]
        loss = F.mse_loss(scalars.up(scalars(batch)[0]), batch) / variance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == config.steps:
            left = float(loss.detach())
            log(f"scalars, step {step + 1:,} of {config.steps:,}: {left:.1%} of the residual's variance left")
