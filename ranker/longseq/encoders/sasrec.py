"""SASRec: a causal softmax Transformer over the latest events (Kang & McAuley 2018), a quadratic reference.

Events are tokens with a learned vector of their position, counted from the latest event backwards, so that the same
place in a user's recent past has the same vector whatever L is. Layers are pre-norm residual:
x + attention(LayerNorm(x)), then x + feed-forward(LayerNorm(x)). A candidate attends to all outputs, or meets the last
one (`read="last"`), which is the paper's score; then what is kept of a user has one size, but making it still costs L².

Positions depend on where a request's window ends, so every request has a pass of its own, at a cost of L² each:
`length` bounds it. Attention is exact and in memory O(L), by :func:`~ranker.ops.local_attention.local_attention`.

[open] Chosen here, where the paper differs or has no candidate: tokens are mapped and normalised (:mod:`.tokens`) where
the paper scales embeddings by √d; queries and keys are normalised by head (:mod:`ranker.longseq.heads`); the
feed-forward net is SiLU; no dropout; training is the ranker's, not next-item prediction.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ranker.longseq.encoders.encoder import Encoder
from ranker.longseq.encoders.outputs import Outputs, at_least_one, heads_of, start_as_identity
from ranker.longseq.encoders.tokens import Tokens
from ranker.longseq.hytrec_layers import FeedForward
from ranker.longseq.protocol import History, latest
from ranker.ops.jagged import segments_of
from ranker.ops.local_attention import local_attention


class SASRec(Encoder):
    """Causal softmax self-attention over the latest `length` events.

    Args:
        dim: width of events and candidates.
        width, heads: of tokens and of the output.
        layers: of self-attention.
        positions: "learned", a vector for each of the `length` positions; "sinusoidal", for any length.
        read: "attention" of the candidate to all outputs, or its product with the "last".
        feed_forward: hidden width of the feed-forward nets, in widths.
        length: the latest events, 0: all, at a cost of Σ L².
    """

    def __init__(
        self,
        dim: int,
        width: int = 32,
        heads: int = 2,
        layers: int = 2,
        positions: Literal["learned", "sinusoidal"] = "learned",
        read: Literal["attention", "last"] = "attention",
        feed_forward: int = 1,
        length: int = 1000,
    ) -> None:
        at_least_one(layers=layers, feed_forward=feed_forward)
        if positions not in ("learned", "sinusoidal"):
            raise ValueError(f"positions: {positions!r}; must be 'learned' or 'sinusoidal'")
        if read not in ("attention", "last"):
            raise ValueError(f"read: {read!r}; must be 'attention' or 'last'")
        if positions == "learned" and length < 1:
            raise ValueError(f"length: {length}; learned positions need a limit: set it, or positions to 'sinusoidal'")
        super().__init__(Tokens(dim, width), Outputs(width, heads, last=read == "last"), length)
        self.width = width
        self.position = nn.Parameter(torch.zeros(length, width)) if positions == "learned" else None
        self.layers = nn.ModuleList(CausalSoftmax(width, heads, feed_forward) for _ in range(layers))

    def memory_bytes(self, events: int, number_bytes: int = 4) -> int:
        """What a store keeps of a request with so many events."""
        return self.outputs.memory_bytes(min(events, self.length) if self.length > 0 else events, number_bytes)

    def encoded(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's tokens `[P, width]`, and each request's `[R]` start and end in them."""
        events = self.tokens.of_windows(latest(history, self.length))
        offsets = torch.nn.functional.pad(events.end, [1, 0])
        back = (
            events.end[segments_of(offsets, events.x.size(0))]
            - 1
            - torch.arange(events.x.size(0), device=events.x.device)
        )
        position = self.position
        vector = position[back] if position is not None else sinusoids(back, self.width).to(events.x.dtype)
        x = events.x + vector
        for layer in self.layers:
            x = layer(x, offsets)
        return x, events.start, events.end


class CausalSoftmax(nn.Module):
    """Multi-head self-attention of jagged sequences to the past, and a feed-forward net."""

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = heads_of(width, heads)
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, feed_forward)
        start_as_identity(self.out, self.feed_forward.down)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Tokens `[T, width]` to new ones."""
        y = self.norm(x)
        k, v = self.heads.keys_values(y)
        o = local_attention(self.heads.queries(y), k, v, offsets, 0)
        return self.feed_forward(x + self.out(o.flatten(1)))


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of positions `[n]` at geometric frequencies from 1 to 1/10,000: `[n, width]`, float64."""
    half = (width + 1) // 2
    order = torch.arange(half, dtype=torch.float64, device=position.device)
    angle = position.double().unsqueeze(1) * torch.exp(order * (-math.log(10_000.0) / max(half - 1, 1)))
    return torch.cat([torch.sin(angle), torch.cos(angle)], 1)[:, :width]
