"""LONGER: merged tokens, and a few that look at all of them (Chai et al. 2025, arXiv:2505.04421).

1. Adjacent events are merged, `merge` to a token, by a linear map of their concatenation; the paper's small transformer
   within each group before it is an option.
2. Global tokens are added: they stand after all events and see everything.
3. Cross-causal layer: the global tokens and the latest `recent` merged tokens ask, all merged tokens answer. An event
   sees no later event and no global token.
4. `layers` more layers, in which what asked answers too, under the same mask.
A candidate attends to the outputs: at most `recent` + `global_tokens`, whatever L is, so that `read` is free of L.
`encode` costs O(L (d² + (recent + global_tokens) d / merge)) a request.

[open] Chosen here, where the paper differs or leaves it open: the candidate, one of the paper's global tokens, is not
known in `encode`, and neither is the user's id: all global tokens are learned, and the candidate reads the outputs;
groups are counted from the latest event backwards, so that the newest is always full and the oldest is filled up with
zeros; the time between an event and the request is added as a learned vector by its logarithm, not concatenated, and so
is a merged token's position, by the logarithm of its rank; queries and keys are normalised by head; feed-forward nets
are SiLU; merging starts as a mean, layers as the identity. Ages and groups depend on the request, so that each has a
pass of its own; an event is mapped to a token once.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.encoders.encoder import Encoder
from ranker.longseq.encoders.outputs import Outputs, at_least_one, heads_of, start_as_identity
from ranker.longseq.encoders.tokens import Tokens
from ranker.longseq.hytrec_layers import FeedForward, ShortSoftmax
from ranker.longseq.protocol import History, latest
from ranker.ops.attention import window_attention
from ranker.ops.jagged import expand_windows, log_bucket, offsets_of
from ranker.ops.padded import exporting, held_open


class Sight(NamedTuple):
    """Which tokens of jagged sequences ask, and what they see.

    row: `[Q]` int64 the tokens that ask; offsets: `[R + 1]` of the sequences in them.
    start, end: `[R]` the sequences; seen: `[Q]` how many of a sequence's tokens, the first ones, each sees.
    """

    row: Tensor
    offsets: Tensor
    start: Tensor
    end: Tensor
    seen: Tensor


class LONGER(Encoder):
    """Cross-causal attention over the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        width, heads: of tokens and of the output.
        merge: events of a merged token.
        inner: a self-attention layer within each group before it is merged.
        recent: merged tokens that ask, the latest.
        global_tokens: learned tokens that ask beside them, and are answered from everything.
        layers: after the cross-causal one.
        feed_forward: hidden width of the feed-forward nets, in widths.
        age_buckets: buckets of log2(age in seconds), added to events; 0 turns it off.
    """

    def __init__(
        self,
        dim: int,
        width: int = 32,
        heads: int = 2,
        merge: int = 4,
        inner: bool = False,
        recent: int = 32,
        global_tokens: int = 4,
        layers: int = 2,
        feed_forward: int = 2,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        at_least_one(merge=merge, recent=recent, global_tokens=global_tokens, layers=layers, feed_forward=feed_forward)
        super().__init__(Tokens(dim, width, age_buckets), Outputs(width, heads, short=True), length)
        self.recent, self.global_count = recent, global_tokens
        self.merge = TokenMerge(width, merge, ShortSoftmax(width, heads, feed_forward) if inner else None)
        self.position = nn.Parameter(torch.zeros(32, width))
        self.globals = nn.Parameter(torch.randn(global_tokens, width))
        self.layers = nn.ModuleList(SightedAttention(width, heads, feed_forward) for _ in range(1 + layers))

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request at most: no L in it."""
        return self.outputs.memory_bytes(self.recent + self.global_count, number_bytes)

    def encoded(self, history: History) -> tuple[Tensor, Tensor, Tensor]:
        """The last layer's tokens `[Q, width]`, recent ones and then global ones, and each request's `[R]` start and
        end in them."""
        events = self.tokens.of_windows(latest(history, self.length))
        merged, offsets = self.merge(events.x, events.start, events.end)
        token, request = expand_windows(offsets[:-1], offsets[1:])
        back = offsets[1:][request] - 1 - token
        merged = merged + self.position[log_bucket(back, self.position.size(0))]
        x, sight = self._with_globals(merged, offsets, request)
        asks = _among_themselves(sight)
        for layer in self.layers:
            x = layer(x, sight)
            sight = asks
        return x, sight.start, sight.end

    def _with_globals(self, merged: Tensor, offsets: Tensor, request: Tensor) -> tuple[Tensor, Sight]:
        """Merged tokens with the global tokens after them, but where there are none, and who sees what."""
        count = offsets[1:] - offsets[:-1]
        added = self.global_count * (count > 0).long()
        bounds = offsets_of(count + added)
        start, end = bounds[:-1], bounds[1:]
        place = torch.arange(merged.size(0), device=merged.device) + (start - offsets[:-1])[request]
        of_globals, _ = expand_windows(end - added, end)
        x = torch.zeros([place.numel() + of_globals.numel(), merged.size(1)], dtype=merged.dtype, device=merged.device)
        learned = self.globals.repeat(of_globals.numel() // self.global_count, 1)
        x = x.index_copy(0, place, merged).index_copy(0, of_globals, learned)
        asking = count.clamp(max=self.recent) + added
        row, asker = expand_windows(end - asking, end)
        within, is_event = row - start[asker], row < (end - added)[asker]
        seen = torch.where(is_event, within + 1, (end - start)[asker])
        return x, Sight(row, offsets_of(asking), start, end, seen)


class TokenMerge(nn.Module):
    """Adjacent events as one token: LayerNorm(W [x_1; …; x_n]), groups counted from the latest event backwards.

    Args:
        width: of events and tokens.
        merge: n.
        inner: attention within each group before, or None.
    """

    def __init__(self, width: int, merge: int, inner: ShortSoftmax | None) -> None:
        super().__init__()
        self.merge, self.inner = merge, inner
        self.linear = nn.Linear(merge * width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(width).repeat(1, merge) / merge)
        if inner is not None:
            start_as_identity(inner.out, inner.feed_forward.down)

    def forward(self, x: Tensor, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Events `[P, width]` of the windows ``[start, end)``, which have all of them in order: merged tokens
        `[M, width]`, and the windows' offsets `[R + 1]` in them."""
        offsets = offsets_of(torch.div(end - start + (self.merge - 1), self.merge, rounding_mode="floor"))
        event, request = expand_windows(start, end)
        back = end[request] - 1 - event
        group = offsets[1:][request] - 1 - torch.div(back, self.merge, rounding_mode="floor")
        place = group * self.merge + (self.merge - 1 - back % self.merge)
        tokens = _last(offsets)
        inner = self.inner
        if inner is not None:
            x = inner(x, offsets_of(torch.bincount(group, minlength=tokens)))
        slots = torch.zeros([tokens * self.merge, x.size(1)], dtype=x.dtype, device=x.device)
        grouped = slots.index_copy(0, place, x).view(tokens, self.merge * x.size(1))
        return self.norm(self.linear(grouped)), offsets


def _last(offsets: Tensor) -> int:
    """The number of merged tokens."""
    if not torch.jit.is_scripting() and exporting():
        return held_open(offsets[-1])
    return int(offsets[-1])


class SightedAttention(nn.Module):
    """Multi-head attention of some tokens to those that they see, and a feed-forward net."""

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = heads_of(width, heads)
        self.out = nn.Linear(width, width)
        self.feed_forward = FeedForward(width, feed_forward)
        start_as_identity(self.out, self.feed_forward.down)

    def forward(self, x: Tensor, sight: Sight) -> Tensor:
        """Tokens `[N, width]` to new ones of those that ask `[Q, width]`."""
        y = self.norm(x)
        k, v = self.heads.keys_values(y)
        q = self.heads.queries(y.index_select(0, sight.row))
        o = window_attention(q, sight.offsets, k, v, sight.start, sight.end, None, 0, sight.seen)
        return self.feed_forward(x.index_select(0, sight.row) + self.out(o.flatten(1)))


def _among_themselves(sight: Sight) -> Sight:
    """The same for a layer in which only those that asked are left."""
    left = sight.offsets[1:] - sight.offsets[:-1]
    gone = (sight.end - sight.start - left).repeat_interleave(left)
    row = torch.arange(sight.row.numel(), device=sight.row.device)
    return Sight(row, sight.offsets, sight.offsets[:-1], sight.offsets[1:], sight.seen - gone)
