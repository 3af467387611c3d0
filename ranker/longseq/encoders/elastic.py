"""ELASTIC: a few interest experts between all events, and a pool of interests to draw on (Deng et al. 2024,
arXiv:2408.09380).

1. Linear dispatcher attention, `layers` times: learned experts attend to the events, then the events attend back to
   the experts; every event reaches every other through the experts, at a cost of O(L · experts).
2. Interest memory retrieval: each expert's state, made of one user's events, finds the interests of a learned pool
   whose keys are most like it, and adds the `retrieve` best, weighed by a softmax of their scores.
3. A candidate attends to the experts: as many as there are, whatever L is.

[open] Chosen here, where the paper is open or more elaborate: experts carry their state from layer to layer, and the
last layer leaves out the way back, which nobody would read; every key of the pool is scored, no product keys, so that
pools are of thousands at most; order enters by a learned vector of an event's age alone; queries and keys are
normalised by head; feed-forward nets are SiLU; what experts gather starts as the mean of the tokens that they attend
to, all other branches as nothing. Events see later ones through the experts, and ages depend on the request: each
request has a pass of its own; an event is mapped to a token once.
"""

import math

import torch
from torch import Tensor, nn

from ranker.longseq.encoders.encoder import Encoder
from ranker.longseq.encoders.outputs import Outputs, at_least_one, heads_of, start_as_identity
from ranker.longseq.encoders.tokens import Tokens
from ranker.longseq.hytrec_layers import FeedForward
from ranker.longseq.protocol import History, latest
from ranker.ops.attention import window_attention
from ranker.ops.query_tiles import in_tiles, out_of_tiles, tiles_of
from ranker.ops.short_attention import short_attention


class ELASTIC(Encoder):
    """Linear dispatcher attention over the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        width, heads: of tokens, experts and the output.
        experts: of each request.
        layers: of dispatcher attention.
        pool: interests to retrieve from; 0 turns retrieval off.
        retrieve: interests that an expert finds, at most the pool.
        feed_forward: hidden width of the feed-forward nets, in widths.
        age_buckets: buckets of log2(age in seconds), added to events; 0 turns it off.
    """

    def __init__(
        self,
        dim: int,
        width: int = 32,
        heads: int = 2,
        experts: int = 16,
        layers: int = 2,
        pool: int = 256,
        retrieve: int = 8,
        feed_forward: int = 2,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        at_least_one(experts=experts, layers=layers, feed_forward=feed_forward)
        if pool > 0 and not 1 <= retrieve <= pool:
            raise ValueError(f"retrieve: {retrieve}; must be at least 1 and at most pool ({pool})")
        super().__init__(Tokens(dim, width, age_buckets), Outputs(width, heads, short=True), length)
        self.expert_count = experts
        self.experts = nn.Parameter(0.1 * torch.randn(experts, width))  # beside what they gather, small
        self.layers = nn.ModuleList(Dispatcher(width, heads, feed_forward, first=i == 0) for i in range(layers))
        self.retrieve = Retrieve(width, pool, retrieve) if pool > 0 else None

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return self.outputs.memory_bytes(self.expert_count, number_bytes)

    def encoded(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """The experts `[R · experts, width]`, and each request's `[R]` start and end in them; none without events."""
        events = self.tokens.of_windows(latest(history, self.length))
        requests = events.start.numel()
        bounds = self.expert_count * torch.arange(requests + 1, device=events.start.device)
        x, experts = events.x, self.experts.repeat(requests, 1)
        for layer in self.layers:
            x, experts = layer(x, events, experts, bounds)
        if self.retrieve is not None:
            experts = experts + self.retrieve(experts)
        return experts, bounds[:-1], torch.where(events.end > events.start, bounds[1:], bounds[:-1])


class Dispatcher(nn.Module):
    """A layer: events hear from the experts what these gathered in the layer before, and experts gather anew."""

    def __init__(self, width: int, heads: int, feed_forward: int, first: bool) -> None:
        super().__init__()
        self.dispatch = None if first else Dispatch(width, heads, feed_forward)
        self.gather = Gather(width, heads, feed_forward)

    def forward(self, x: Tensor, events: History, experts: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Events `[P, width]`, windows of which are those of `events`, and experts `[R · experts, width]`, those of
        request r in ``bounds[r] : bounds[r + 1]``, to new ones."""
        if self.dispatch is not None:
            x = self.dispatch(x, events, experts, bounds)
        return x, self.gather(x, events, experts, bounds)


class Gather(nn.Module):
    """Experts attend to their request's events: E + W_o A(LayerNorm(E), LayerNorm(X)), and a feed-forward net."""

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.expert_norm, self.event_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads_of(width, heads)
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, feed_forward)
        start_as_identity(self.out, self.feed_forward.down)
        nn.init.orthogonal_(self.heads.value.weight)
        with torch.no_grad():
            self.out.weight.copy_(self.heads.value.weight.t())

    def forward(self, x: Tensor, events: History, experts: Tensor, bounds: Tensor) -> Tensor:
        """Experts `[R · experts, width]` to new ones."""
        k, v = self.heads.keys_values(self.event_norm(x))
        q = self.heads.queries(self.expert_norm(experts))
        found = window_attention(q, bounds, k, v, events.start, events.end)
        return self.feed_forward(experts + self.out(found.flatten(1)))


class Dispatch(nn.Module):
    """Events attend to their request's experts: X + W_o A(LayerNorm(X), LayerNorm(E)), and a feed-forward net."""

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.expert_norm, self.event_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.heads = heads_of(width, heads)
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, feed_forward)
        start_as_identity(self.out, self.feed_forward.down)

    def forward(self, x: Tensor, events: History, experts: Tensor, bounds: Tensor) -> Tensor:
        """Events `[P, width]` to new ones."""
        k, v = self.heads.keys_values(self.expert_norm(experts))
        tiles = tiles_of(torch.nn.functional.pad(events.end, [1, 0]), elements=x.size(0))
        q = in_tiles(self.heads.queries(self.event_norm(x)), tiles)
        found = short_attention(q, tiles, k, v, bounds[:-1], bounds[1:])
        return self.feed_forward(x + self.out(out_of_tiles(found.flatten(2), tiles)))


class Retrieve(nn.Module):
    """Σ_j softmax_j(e · key_j / √d) value_j over the `best` keys of a learned pool with the greatest product."""

    def __init__(self, width: int, pool: int, best: int) -> None:
        super().__init__()
        self.best = best
        self.norm = nn.LayerNorm(width)
        self.key = nn.Parameter(torch.randn(pool, width))
        self.value = nn.Parameter(torch.zeros(pool, width))

    def forward(self, experts: Tensor) -> Tensor:
        """`[n, width]` to the same."""
        score = self.norm(experts) @ self.key.t() / math.sqrt(experts.size(1))
        score, row = torch.topk(score, self.best, dim=1)
        value = self.value.index_select(0, row.flatten()).view(row.size(0), self.best, experts.size(1))
        return torch.einsum("nb,nbd->nd", torch.softmax(score, 1), value)
