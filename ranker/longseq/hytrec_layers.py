"""HyTRec's layers over jagged token states: the temporal-aware delta network (TADN) and local softmax attention.

A layer is residual with the norm before it: x + attention(LayerNorm(x)), then x + feed-forward(LayerNorm(x)). "Token
state" of the equations is the normalised one. All are causal.

Chosen where the published text is open: values have a bias, so that a state tells how much it holds of a key whatever
that was. Queries and keys pass a softmax before they are normalised: linear ones of many interests overlap in a state
of few dimensions, and what is read of one interest is drowned by the others; after a softmax tokens that are alike fall
into the same few of d_k slots, and an event erases next to nothing of the other slots. A head may instead have a slot
for each semantic ID, one-hot and not learned. What a head reads of its state is brought to unit root mean square (as in
Gated DeltaNet, Yang et al. 2024), for a state that forgets little grows with the history; a read that found next to
nothing stays small, for its direction is chance, and rounding may turn it. Gates begin almost closed, with a memory of
thousands of events, and layers begin as the identity: until they have learned something to add, the keys of all are
made of the events.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.ops.delta_rule import Writes, delta_rule
from ranker.ops.local_attention import local_attention
from ranker.ops.query_tiles import in_tiles, out_of_tiles, tiles_of
from ranker.ops.running_mean import RunningMeanPlan, running_mean
from ranker.ops.short_attention import short_attention


class Tokens(NamedTuple):
    """What layers know of the sequences beside the states.

    offsets: `[R + 1]` int64, the sequences; together they have all T tokens.
    tau: `[T, 1]` e^(−age / period), in (0, 1], or `[T, 0]` for no decay by age.
    log_decay: `[T, h]` −(time since the token before) / period, or `[T, 0]` for no decay of the state.
    mean: plan of the running means, or None where the deviation is from the token before.
    at: `[P]` int64, tokens after which the linear layers' states are wanted, or None for each sequence's last.
    code: `[T, M]` int64, by which each token falls into a slot of M heads; 0: into none.
    """

    offsets: Tensor
    tau: Tensor
    log_decay: Tensor
    mean: RunningMeanPlan | None
    at: Tensor | None
    code: Tensor


def deviations(x: Tensor, tokens: Tokens) -> Tensor:
    """Δx_t: x_t less the mean of its sequence up to t, or less the token before (0 before the first): `[T, d]`."""
    mean = tokens.mean
    if mean is not None:
        return x - running_mean(x, mean)
    starts = tokens.offsets[:-1][tokens.offsets[1:] > tokens.offsets[:-1]]
    previous = torch.nn.functional.pad(x, [0, 0, 1, 0])[: x.size(0)]
    return x - previous.index_fill(0, starts, 0.0)


def unit(x: Tensor, epsilon: float = 1e-6) -> Tensor:
    """L2-normalised along the last axis. Zero stays zero: `epsilon`, added to the square of the norm, keeps gradients
    of a token that is all zeros within bounds."""
    return x * (x.square().sum(-1, keepdim=True) + epsilon).rsqrt()


def levelled(x: Tensor, epsilon: float = 1e-5) -> Tensor:
    """Brought to a root mean square of 1 along the last axis, unless small beside √epsilon; zero stays zero."""
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()


def in_slots(x: Tensor, sharpness: float) -> Tensor:
    """Queries or keys `[..., dk]`, of unit length: softmax of `sharpness` times the levelled numbers; 0: no softmax."""
    return unit(torch.softmax(sharpness * levelled(x), -1) if sharpness > 0 else x)


def slots_by_code(code: Tensor, slots: int) -> Tensor:
    """One-hot keys `[n, M, slots]` of codes `[n, M]`: slot code mod `slots`, or zeros for 0, no code."""
    slot = torch.arange(slots, device=code.device)
    hot = (code.remainder(slots).unsqueeze(2) == slot) & (code > 0).unsqueeze(2)
    return hot.float()


class FeedForward(nn.Module):
    """x + W2 silu(W1 LayerNorm(x))."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, times * width)
        self.down = nn.Linear(times * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[T, width]` to the same."""
        return x + self.down(nn.functional.silu(self.up(self.norm(x))))


class Tadn(nn.Module):
    """Temporal-aware delta network: what a token writes is blended with its deviation from the
    past, more for recent events, and the state forgets what it knows of a key in proportion to the same gate."""

    def __init__(
        self,
        width: int,
        heads: int,
        key_dim: int,
        feed_forward: int,
        chunk: int,
        gate_bias: float,
        sharpness: float,
        code_heads: int,
    ) -> None:
        super().__init__()
        self.heads, self.key_dim, self.sharpness = heads, key_dim, sharpness
        self.learned = heads - code_heads  # heads that learn their keys
        self.keys = self.learned * key_dim
        self.chunk, self.least_gate, self.small_read = chunk, 1e-3, 0.1
        self.norm = nn.LayerNorm(width)
        self.dynamic = nn.Linear(2 * width, width)
        self.static = nn.Linear(width, width)
        self.balance = nn.Parameter(torch.zeros([]))  # a = σ(balance)
        nn.init.constant_(self.dynamic.bias, gate_bias)
        nn.init.constant_(self.static.bias, gate_bias)
        self.projection = nn.Linear(width, 2 * self.keys + width + heads, bias=False)  # q, k, v, β
        self.value_bias = nn.Parameter(torch.randn(width))
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, feed_forward)
        for last in (self.out, self.feed_forward.down):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def gates(self, x: Tensor, deviation: Tensor, tau: Tensor) -> Tensor:
        """g_t = a σ(W_g [x; Δx] + b_g) ⊙ τ + (1 − a) σ(W_s x + b_s): `[T, width]`, in (0, 1)."""
        dynamic = torch.sigmoid(self.dynamic(torch.cat([x, deviation], 1)))
        if tau.size(1) > 0:
            dynamic = dynamic * tau
        return torch.lerp(torch.sigmoid(self.static(x)), dynamic, torch.sigmoid(self.balance))

    def writes(self, x: Tensor, tokens: Tokens) -> tuple[Writes, Tensor]:
        """All up to the recurrence, of token states `[T, width]`: what they write, and the gates g `[T, width]`."""
        y = self.norm(x)
        deviation = deviations(y, tokens)
        g = self.gates(y, deviation, tokens.tau)
        blended = torch.lerp(y, deviation, g)  # x̃ = g ⊙ Δx + (1 − g) ⊙ x
        qk, v, beta = self.projection(blended).split([2 * self.keys, x.size(1), self.heads], 1)
        q, k = in_slots(qk.unflatten(1, [2, self.learned, self.key_dim]), self.sharpness).unbind(1)
        if tokens.code.size(1) > 0:
            by_code = slots_by_code(tokens.code, self.key_dim).to(q.dtype)
            q, k = torch.cat([by_code, q], 1), torch.cat([by_code, k], 1)
        v, beta = (v + self.value_bias).unflatten(1, [self.heads, -1]), torch.sigmoid(beta)
        erase = beta * g.unflatten(1, [self.heads, -1]).mean(2).clamp(min=self.least_gate)  # ĝ β
        log_decay = tokens.log_decay if tokens.log_decay.size(1) > 0 else None
        return Writes(q, k, v, erase, beta, log_decay), g

    def forward(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """States `[T, width]`; the new ones, and S `[P, h, dk, dv]` after the tokens `at`, or S_L `[R, h, dk, dv]`."""
        writes, _ = self.writes(x, tokens)
        o, state = delta_rule(writes, tokens.offsets, self.chunk, None, tokens.at)
        return self.feed_forward(x + self.out(levelled(o, self.small_read**2).flatten(1))), state


class LocalSoftmax(nn.Module):
    """Causal multi-head softmax attention to the latest `window` tokens (0: to all, at a cost of Σ L²)."""

    def __init__(self, width: int, heads: int, key_dim: int, feed_forward: int, window: int) -> None:
        super().__init__()
        self.heads, self.key_dim, self.window = heads, key_dim, window
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, feed_forward)

    def forward(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """States `[T, width]`; the new ones, and no S: `[P, 0, dk, d_head]`, or R of them."""
        q, k, v = self.projection(self.norm(x)).unflatten(1, [3, self.heads, -1]).unbind(1)
        o = local_attention(q, k, v, tokens.offsets, self.window)
        at = tokens.at
        states = tokens.offsets.numel() - 1 if at is None else at.numel()
        no_state = torch.zeros([states, 0, self.key_dim, q.size(2)], dtype=x.dtype, device=x.device)
        return self.feed_forward(x + self.out(o.flatten(1))), no_state


class ShortSoftmax(nn.Module):
    """Multi-head softmax self-attention of each sequence, every token to every other."""

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, feed_forward)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """States `[S, width]` to new ones."""
        q, k, v = self.projection(self.norm(x)).unflatten(1, [3, self.heads, -1]).unbind(1)
        tiles = tiles_of(offsets, elements=x.size(0))
        o = short_attention(in_tiles(q, tiles), tiles, k, v, offsets[:-1], offsets[1:])
        return self.feed_forward(x + self.out(out_of_tiles(o.flatten(2), tiles)))
