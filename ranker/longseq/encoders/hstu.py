"""HSTU: hierarchical sequential transduction units over the latest events (Zhai et al. 2024), a quadratic reference.

A layer, for tokens X:
    U, V, Q, K = split(silu(LayerNorm(X) W))                                      (1)
    A_ts = silu(q_t · k_s + b(t − s) + b'(time_t − time_s)) / n, s ≤ t              (2)
    Y = X + W_o(LayerNorm(A V) ⊙ U)                                               (3)
No softmax: weights need not sum to one, and there is no other feed-forward net. The biases are learned, of how many
tokens and of how much time lie between two events (:mod:`ranker.ops.pointwise_attention`).

Positions and times are relative, and nothing depends on the request: requests whose windows begin at the same event,
those of a row unless `length` cuts it, share one pass, and each reads the outputs up to its own end. The cost is L² a
pass: `length` bounds it; memory is O(L · chunk).

[open] Chosen where paper and public code differ or leave it open: n is the number of tokens seen, not the length of the
longest sequence (the LayerNorm in (3) takes the scale out again); the time between two events is that between
themselves, not to the one after; times fall into powers of two seconds; biases are a layer's own, shared by its heads,
and start at zero; no absolute positions and no dropout. Inputs are events alone: actions are in their embeddings.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ranker.longseq.encoders.encoder import Encoder
from ranker.longseq.encoders.outputs import Outputs, at_least_one, start_as_identity
from ranker.longseq.encoders.tokens import Tokens
from ranker.longseq.protocol import History, latest, shared_passes
from ranker.ops.pointwise_attention import pointwise_attention


class HSTU(Encoder):
    """Transduction units over the latest `length` events (0: all, at a cost of Σ L²).

    Args:
        dim: width of events and candidates.
        width, heads: of tokens and of the output.
        layers: of transduction units.
        read: "attention" of the candidate to all outputs, or its product with the "last".
        positions: distances in tokens that have a bias of their own; all that are farther share the last.
        time_buckets: buckets of log2(seconds between two events) for the bias.
        chunk: queries that attend at once; the result does not depend on it.
    """

    def __init__(
        self,
        dim: int,
        width: int = 32,
        heads: int = 2,
        layers: int = 2,
        read: Literal["attention", "last"] = "attention",
        positions: int = 1000,
        time_buckets: int = 32,
        length: int = 1000,
        chunk: int = 128,
    ) -> None:
        at_least_one(layers=layers, positions=positions, time_buckets=time_buckets, chunk=chunk)
        if read not in ("attention", "last"):
            raise ValueError(f"read: {read!r}; must be 'attention' or 'last'")
        super().__init__(Tokens(dim, width), Outputs(width, heads, last=read == "last"), length)
        self.layers = nn.ModuleList(
            TransductionUnit(width, heads, positions, time_buckets, chunk) for _ in range(layers)
        )

    def memory_bytes(self, events: int, number_bytes: int = 4) -> int:
        """What a store keeps of a request with so many events."""
        return self.outputs.memory_bytes(min(events, self.length) if self.length > 0 else events, number_bytes)

    def encoded(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's tokens `[T', width]`, and each request's `[R]` start and end in them."""
        history = latest(history, self.length)
        passes, row = shared_passes(history)
        events = self.tokens.of_windows(passes)
        offsets = torch.nn.functional.pad(events.end, [1, 0])
        second = torch.div(events.time, 1000, rounding_mode="floor")
        x = events.x
        for layer in self.layers:
            x = layer(x, offsets, second)
        start = events.start[row]
        return x, start, start + history.end - history.start


class TransductionUnit(nn.Module):
    """(1) to (3)."""

    def __init__(self, width: int, heads: int, positions: int, time_buckets: int, chunk: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: {heads}; must divide width ({width})")
        self.heads, self.chunk = heads, chunk
        self.norm = nn.LayerNorm(width)
        self.uvqk = nn.Linear(width, 4 * width, bias=False)
        self.between = nn.Parameter(torch.zeros(positions))
        self.elapsed = nn.Parameter(torch.zeros(time_buckets))
        self.found_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, width)
        start_as_identity(self.out)

    def forward(self, x: Tensor, offsets: Tensor, second: Tensor) -> Tensor:
        """Tokens `[T, width]` of the times `second` `[T]` to new ones."""
        u, v, q, k = nn.functional.silu(self.uvqk(self.norm(x))).unflatten(1, [4, self.heads, -1]).unbind(1)  # (1)
        found = pointwise_attention(q, k, v, offsets, second, self.between, self.elapsed, self.chunk)  # (2)
        return x + self.out(self.found_norm(found.flatten(1)) * u.flatten(1))  # (3)
