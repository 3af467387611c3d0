"""The encoder and decoder around RQ-VAE's codewords, as plain modules: all of RQ-VAE that coding items needs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from features.semantic_ids.quantizers.protocol import Floats

_CHUNK = 65_536  # rows that pass the network at a time


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers with ReLU in between."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ReLU(), nn.Linear(before, after)]
    return nn.Sequential(*layers[1:])


class Autoencoder(nn.Module):
    """Content `[n, d]` to latent vectors `[n, dz]` and back. Content is centred, and scaled by one number for all
    columns: distances keep their proportions."""

    centre: Tensor
    scale: Tensor

    def __init__(self, dim: int, hidden: list[int], latent: int) -> None:
        super().__init__()
        widths = [dim, *hidden, latent]
        self.encoder = mlp(widths)
        self.decoder = mlp(widths[::-1])
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))

    def standardize_by(self, vectors: Tensor) -> None:
        """Set centre and scale so that `vectors` have mean 0 and, over all columns, variance 1."""
        self.centre.copy_(vectors.mean(0))
        scale = (vectors - self.centre).square().mean().sqrt()
        self.scale.copy_(scale if scale > 0 else torch.ones(()))

    def standardized(self, vectors: Tensor) -> Tensor:
        """What the encoder reads and the decoder makes."""
        return (vectors - self.centre) / self.scale

    def encode(self, vectors: Floats) -> Floats:
        """`[n, d]` → `[n, dz]`."""
        return in_chunks(lambda x: self.encoder(self.standardized(x)), vectors)

    def decode(self, latent: Floats) -> Floats:
        """`[n, dz]` → `[n, d]`."""
        return in_chunks(lambda z: self.decoder(z) * self.scale + self.centre, latent)


def in_chunks(function: Callable[[Tensor], Tensor], rows: Floats) -> Floats:
    """`function` of all rows, without gradients and without all rows' hidden layers in memory at once."""
    with torch.no_grad():
        parts = [function(part) for part in torch.tensor(rows, dtype=torch.float32).split(_CHUNK)]
    return torch.cat(parts).numpy()
