"""HyTRec: a softmax branch over the latest events, and a branch of mostly linear attention over all the others.

The latest `short_length` events attend to one another by softmax. The events before them pass through layers of which
`ratio` in every ratio + 1 are temporal-aware delta networks (:mod:`ranker.longseq.hytrec_layers`), at a cost per event
that does not grow with L, and whose final states S_L are of constant size. Memory: those states, the mean of the long
branch's outputs, and keys and values of the short branch's. A candidate reads S_Lᵀ q(candidate) of every linear layer
and attends to the short branch; its `read` is free of L.

Chosen where the published text is open: layers are pre-norm residual, with a feed-forward net; the softmax layers of
the long branch see a window of the latest events, not all, so that work stays proportional to Σ L (`window = 0`: all);
no positions are added, order and time enter by the delta rule and by τ. S_L is brought to a root mean square of 1, so
that what is read does not grow with L. What a candidate reads of a state is taken apart into its direction, the mean
value of the events like the candidate, and the logarithm of its size, which tells how many those were: of an interest
that one event in a hundred is about, a read is a hundred times smaller than of one that all are. Beside them stands the
product with the value that an event like the candidate has, without the bias: whether key and value both agree.

Heads that learn their slots confuse interests until they have learned to tell them apart, and a candidate's semantic ID
tells at once which events are like it. So `code_heads` of every linear layer have a slot for each code (codes that are
alike mod d_k share one): what such a head writes, forgets and is asked for is of the code alone, the values, gates and
decays are the layer's, and what is read is how much the history has of the candidate's code, and what of it.

With `decay="state"` nothing in the long branch depends on the request's time, and all of it is causal: requests whose
windows begin at one event, those of a row, share one pass over the events up to the last one's split, and each takes
the states after its own split and the mean up to it. With `decay="now"` a token's gates depend on the request's time,
and each request has a pass over its own copy of its events.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.hytrec_layers import LocalSoftmax, ShortSoftmax, Tadn, Tokens, in_slots, levelled, slots_by_code
from ranker.longseq.hytrec_passes import Passes, between, pass_a_row, pass_each
from ranker.longseq.protocol import History, Probes, Target, compact, latest
from ranker.longseq.stored import Stored, restore_parts, store_parts
from ranker.ops.delta_rule import read_state
from ranker.ops.jagged import offsets_of, segments_of
from ranker.ops.next_item import in_batch_softmax
from ranker.ops.padded import exporting
from ranker.ops.query_tiles import in_tiles, of_tiles, out_of_tiles, tiles_of
from ranker.ops.running_mean import RunningMeanPlan, mean_up_to, running_mean_plan
from ranker.ops.short_attention import short_attention


class HybridMemory(NamedTuple):
    """What a candidate reads, at most :meth:`HyTRec.memory_bytes` a request.

    state: `[R, n · h, dk, d_head]`, S_L of the n linear layers, levelled; pooled: `[R, width]`.
    k, v: `[S, h, d_head]` of the short branch, those of request r in ``start[r] : end[r]``.
    predicted: `[P, width]`, following: `[E, width]`, event, times: `[P]`: for the block's own loss, as
    :func:`~ranker.ops.next_item.in_batch_softmax` takes them; empty outside training; not stored.
    """

    state: Tensor
    pooled: Tensor
    k: Tensor
    v: Tensor
    start: Tensor
    end: Tensor
    predicted: Tensor
    following: Tensor
    event: Tensor
    times: Tensor


class LongOutputs(NamedTuple):
    """x: `[T', width]` of all tokens; state: `[R, n · h, dk, dv]` S_L at each request's split, levelled; first, end:
    `[R]`, the tokens that it has seen."""

    x: Tensor
    state: Tensor
    first: Tensor
    end: Tensor


class LayerGates(NamedTuple):
    """One linear layer over the T' tokens of the long branch. gate: `[T', width]` g; erase: `[T', h]` ĝ β; dynamic: a,
    the share of the gate that follows deviation and time."""

    gate: Tensor
    erase: Tensor
    dynamic: float


class HistoryGates(NamedTuple):
    """decay: `[T']`, τ of each token, or with decay="state" what its state keeps of the state before; layers: each
    linear layer, in order."""

    decay: Tensor
    layers: list[LayerGates]


class HyTRec(nn.Module):
    """Hybrid branches over the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        width, heads: width of token states and of the output; each head has d_head = width / heads of it.
        key_dim: dk, slots of each head's state; 0: d_head.
        sharpness: of the softmax that spreads queries and keys over the slots; 0: none.
        key_start, key_width: where in an event and in a candidate stands what keys are made of at first, such as the
            embedding of a semantic ID, at most `width` wide; −1: they are made of all.
        code_heads: M, heads of each linear layer whose slots are codes': events and candidates of code c fall into slot
            c mod dk of head m, c being the m-th of their `code`. The other heads learn their slots.
        layers: N, of the long branch; ratio: r, linear layers before each softmax layer.
        short_length: events of the short branch.
        period_s: in which τ, or the state, falls to 1/e.
        decay: "now", gates shrink with an event's age at the request; "state", the state decays between events, what is
            kept of a user does not depend on the request's time, and requests that share a row share its pass.
        deviation: of a token, from the "mean" of the tokens up to it or from the "previous" one.
        feed_forward: hidden width of the feed-forward nets, in widths.
        window: tokens that the long branch's softmax layers see; 0: all, at a cost of Σ L².
        gate_bias: of the gates, at first. An event erases about σ(gate_bias) / 2 of what the state has for its key, at
            least 1e-3 of its write strength, and less for others: 0 begins with a memory of some tens
            of events, −4 with one of thousands, as far as `period_s` lets it.
        agreement: False leaves out the products of what is read with the candidate's own value.
        chunk: tokens that the delta rule works on at once; the result does not depend on it.
        next_item_weight: of the loss of predicting a next event; 0 turns it off.
        next_items: positions of each history that it is computed for, the long branch's latest.
    """

    def __init__(
        self,
        dim: int,
        width: int = 32,
        heads: int = 2,
        layers: int = 4,
        ratio: int = 3,
        short_length: int = 50,
        period_s: float = 7 * 86400.0,
        decay: Literal["now", "state"] = "now",
        deviation: Literal["mean", "previous"] = "mean",
        length: int = 0,
        feed_forward: int = 2,
        window: int = 256,
        gate_bias: float = -4.0,
        agreement: bool = True,
        chunk: int = 32,
        next_item_weight: float = 0.0,
        next_items: int = 8,
        key_dim: int = 32,
        sharpness: float = 4.0,
        key_start: int = -1,
        key_width: int = 0,
        code_heads: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("layers", layers), ("ratio", ratio), ("short_length", short_length), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name}: {value}; must be at least 1")
        if heads < 1 or width % heads:
            raise ValueError(f"heads: {heads}; must divide width ({width})")
        if key_dim < 0 or sharpness < 0:
            raise ValueError(f"key_dim: {key_dim}, sharpness: {sharpness}; must not be negative")
        if key_start >= 0 and key_width > width - (dim > key_width):  # the other features need a number too
            raise ValueError(f"width: {width}; must be above that of what keys start from ({key_width}): raise width")
        if sharpness > 0 and (key_dim or width // heads) == 1:
            raise ValueError("key_dim: 1; a softmax over one slot is always 1: raise key_dim, or set sharpness to 0")
        if not 0 <= code_heads <= heads:
            raise ValueError(f"code_heads: {code_heads}; must be of 0 to {heads}, the heads: raise heads")
        if period_s <= 0:
            raise ValueError(f"period_s: {period_s}; must be positive, in seconds")
        if decay not in ("now", "state"):
            raise ValueError(f"decay: {decay!r}; must be 'now' or 'state'")
        if deviation not in ("mean", "previous"):
            raise ValueError(f"deviation: {deviation!r}; must be 'mean' or 'previous'")
        self.out_dim, self.code_heads = width, code_heads
        self.key_dim, self.sharpness = key_dim if key_dim > 0 else width // heads, sharpness
        self.width, self.heads, self.length, self.short_length = width, heads, length, short_length
        self.period_ms, self.decay_by_age, self.from_mean = 1000.0 * period_s, decay == "now", deviation == "mean"
        self.small_read = 0.01  # a root mean square: a read below it found next to nothing
        self.next_item_weight, self.next_items = next_item_weight, next_items

        self.event = nn.Linear(dim, width)
        kinds = [(i + 1) % (ratio + 1) > 0 for i in range(layers)]
        self.layers = nn.ModuleList(
            Tadn(width, heads, self.key_dim, feed_forward, chunk, gate_bias, sharpness, code_heads)
            if linear
            else LocalSoftmax(width, heads, self.key_dim, feed_forward, window)
            for linear in kinds
        )
        self.linear_layers = sum(kinds)
        self.long_norm = nn.LayerNorm(width)
        self.short = ShortSoftmax(width, heads, feed_forward)
        self.short_norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        # of the candidate: a query for each linear layer's state, and one for the short branch
        self.query = nn.Linear(dim, self.linear_layers * (heads - code_heads) * self.key_dim + width, bias=False)
        # and its own value, beside what it reads of each of these states
        self.value = nn.Linear(dim, self.linear_layers * width, bias=False) if agreement else None
        self._start_alike(key_start, key_width)
        # direction and size of each read, the short branch's answer and the products
        self.out = nn.Linear(
            ((2 if agreement else 1) * self.linear_layers + 1) * width + self.linear_layers * heads, width
        )
        self.pooled_out = nn.Linear(width, width, bias=False)  # W_out [reads; pooled], the latter once per request
        predicts = next_item_weight > 0
        self.predict = nn.Linear(width, width) if predicts else None
        self.follow = nn.Linear(dim, width) if predicts else None

    def _start_alike(self, key_start: int, key_width: int) -> None:
        """Queries ask for the keys that an event like the candidate would have, and its own values are those of such an
        event but for their bias, were there no layer between; events have no bias, which beside small embeddings would
        make all of them alike to the first LayerNorm. What keys are made of at first has token states' first numbers to
        itself, and keys of all layers begin with these alone."""
        nn.init.orthogonal_(self.event.weight)
        nn.init.zeros_(self.event.bias)
        linear = [layer for layer in self.layers if isinstance(layer, Tadn)]
        with torch.no_grad():
            if key_start >= 0:
                _apart(self.event.weight, key_start, key_width)
                for layer in linear:
                    rows = layer.projection.weight[: 2 * layer.keys]
                    rows[:, key_width:] = 0.0
                    # LayerNorm takes the mean of all numbers from these: rows that sum to 0 do not see it
                    rows[:, :key_width] -= rows[:, :key_width].mean(1, keepdim=True)
            of_events = [
                layer.projection.weight.split([layer.keys, layer.keys, self.width, self.heads]) for layer in linear
            ]
            keys = [rows[1] for rows in of_events]
            self.query.weight.copy_(torch.cat([*keys, self.key_value.weight[: self.width]]) @ self.event.weight)
            if self.value is not None:
                self.value.weight.copy_(torch.cat([rows[2] for rows in of_events]) @ self.event.weight)

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request at most: no L in it."""
        d = self.width // self.heads
        return number_bytes * (
            self.linear_layers * self.heads * self.key_dim * d + self.width + 2 * self.short_length * self.width
        )

    def encode(self, history: History, probes: Probes) -> HybridMemory:
        """O(Σ L) of the passes: one a row, or with decay="now" one a request."""
        history = latest(history, self.length)
        split = torch.maximum(history.start, history.end - self.short_length)
        long = self._long(history, split)
        pooled = mean_up_to(long.x, long.first, long.end)
        short = compact(between(history, split, history.end))
        outputs = self.short_norm(self.short(self.event(short.x), offsets_of(short.end - short.start)))
        k, v = self.key_value(outputs).unflatten(1, [2, self.heads, -1]).unbind(1)
        predicted, following, event, times = long.x[:0], long.x[:0], split[:0], split[:0]
        if self.predict is not None and self.follow is not None and self.training:
            token, event, times = self._next_items(split, long)
            follows, event = torch.unique(event, return_inverse=True)
            predicted, following = self.predict(long.x[token]), self.follow(history.x[follows])
        return HybridMemory(long.state, pooled, k, v, short.start, short.end, predicted, following, event, times)

    def read(self, memory: HybridMemory, target: Target) -> Tensor:
        """Direction and size of S_Lᵀ q of every linear layer, its direction times the candidate's value, the long
        branch's mean and what the short branch answers: `[N, width]`."""
        tiles = tiles_of(target.offsets, elements=target.x.size(0))
        of_states, of_short = self.query(target.x).split([self.query.out_features - self.width, self.width], 1)
        learned = [self.linear_layers, self.heads - self.code_heads, self.key_dim]
        of_states = in_slots(of_states.unflatten(1, learned), self.sharpness)
        if self.code_heads > 0:
            by_code = slots_by_code(self._own_codes(target.code), self.key_dim).to(of_states.dtype).unsqueeze(1)
            of_states = torch.cat([by_code.expand(-1, self.linear_layers, -1, -1), of_states], 2)
        of_states = of_states.flatten(1, 2)
        of_short = in_tiles(of_short.unflatten(1, [self.heads, -1]), tiles)
        of_state = read_state(in_tiles(of_states, tiles), tiles, memory.state)
        size = of_state.square().mean(3, keepdim=True) + self.small_read**2
        of_state = of_state * size.rsqrt()
        found = [
            of_state.flatten(2),
            short_attention(of_short, tiles, memory.k, memory.v, memory.start, memory.end).flatten(2),
            size.log().flatten(2),
        ]
        if self.value is not None:
            own = in_tiles(self.value(target.x).unflatten(1, [self.linear_layers * self.heads, -1]), tiles)
            found.append((of_state * levelled(own)).flatten(2))
        out = self.out(torch.cat(found, 2)) + of_tiles(self.pooled_out(memory.pooled), tiles).unsqueeze(1)
        return out_of_tiles(out, tiles)

    @torch.jit.export
    def store(self, memory: HybridMemory) -> Stored:
        """The states, the mean, then all keys and all values of the short branch."""
        count, one = memory.end - memory.start, torch.ones_like(memory.start)
        return store_parts([memory.state, memory.pooled, memory.k, memory.v], [one, one, count, count])

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> HybridMemory:
        """A lost record has zero states and no keys."""
        values, d = stored.lengths[:, 0], self.width // self.heads
        states, head = [self.linear_layers * self.heads, self.key_dim, d], [self.heads, d]
        one = (values > 0).long()
        count = torch.div(
            values - one * (states[0] * self.key_dim * d + self.width), 2 * self.width, rounding_mode="floor"
        )
        parts = restore_parts(stored.values, values, [one, one, count, count], [states, [self.width], head, head])
        kept = one.nonzero().squeeze(1)
        state = torch.zeros([one.numel(), states[0], self.key_dim, d], dtype=parts[0].dtype, device=parts[0].device)
        pooled = torch.zeros([one.numel(), self.width], dtype=parts[1].dtype, device=parts[1].device)
        state, pooled = state.index_copy(0, kept, parts[0]), pooled.index_copy(0, kept, parts[1])
        offsets, none = offsets_of(count), pooled[:0]
        start, end, no_index = offsets[:-1], offsets[1:], offsets[:0]
        return HybridMemory(state, pooled, parts[2], parts[3], start, end, none, none, no_index, no_index)

    def auxiliary(self, history: History, memory: HybridMemory) -> Tensor:
        """The weighted loss of predicting next events among those of the batch; 0 outside training."""
        if self.next_item_weight == 0.0 or not self.training:
            return history.x.new_zeros([])
        loss = in_batch_softmax(memory.predicted, memory.following, memory.event, memory.times)
        return self.next_item_weight * loss

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    @torch.jit.unused
    def score_next(self, history: History, items: Tensor) -> Tensor:
        """Scores of `items` `[I, dim]` as the event after each history's last but `short_length`, known to be there:
        `[R', I]` for the R' requests with more events than that. For :mod:`ranker.ops.next_item`'s metrics."""
        predict, follow = self.predict, self.follow
        if predict is None or follow is None:
            raise ValueError("next_item_weight: 0; there is no next-item head to score with: set it above 0")
        history = latest(history, self.length)
        split = torch.maximum(history.start, history.end - self.short_length)
        long = self._long(history, split)
        last = long.end[long.end > long.first] - 1
        return predict(long.x[last]) @ follow(items).t() / self.width**0.5

    @torch.jit.unused
    def gates(self, history: History) -> HistoryGates:
        """What the linear layers do along time, request after request: for pictures."""
        history = latest(history, self.length)
        split = torch.maximum(history.start, history.end - self.short_length)
        x, tokens = self._first_tokens(pass_each(history, split))
        layers: list[LayerGates] = []
        for layer in self.layers:
            if isinstance(layer, Tadn):
                writes, gate = layer.writes(x, tokens)
                layers.append(LayerGates(gate, writes.erase, float(torch.sigmoid(layer.balance.detach()))))
            x, _ = layer(x, tokens)
        decay = tokens.tau if self.decay_by_age else tokens.log_decay.exp()
        return HistoryGates(decay[:, 0], layers)

    def _first_tokens(self, passes: Passes) -> tuple[Tensor, Tokens]:
        """The long branch before its first layer."""
        offsets = offsets_of(passes.long.end - passes.long.start)
        x = self.event(passes.long.x)
        return x, self._tokens(passes.long, offsets, x, passes.at)

    def _long(self, history: History, split: Tensor) -> LongOutputs:
        """The long branch, and what each request takes from it."""
        each = self.decay_by_age
        if not torch.jit.is_scripting():
            each = each or exporting()
        passes = pass_each(history, split) if each else pass_a_row(history, split)
        x, tokens = self._first_tokens(passes)
        states: list[Tensor] = []
        for layer in self.layers:
            x, state = layer(x, tokens)
            states.append(state)
        state = torch.cat(states, 1)
        if passes.at is not None:  # requests that have seen no token have no state
            some = (passes.end > passes.first).nonzero().squeeze(1)
            size = [split.numel(), state.size(1), state.size(2), state.size(3)]
            state = torch.zeros(size, dtype=state.dtype, device=state.device).index_copy(0, some, state)
        return LongOutputs(self.long_norm(x), levelled(state.flatten(2)).view_as(state), passes.first, passes.end)

    def _tokens(self, long: History, offsets: Tensor, x: Tensor, at: Tensor | None) -> Tokens:
        """Decays and deviations of the long branch's tokens."""
        tau, log_decay = x[:, :0], x[:, :0]
        if self.decay_by_age:
            age_ms = (long.now[segments_of(offsets, x.size(0))] - long.time).double()
            tau = torch.exp(-age_ms / self.period_ms).to(x.dtype).unsqueeze(1)
        else:
            since_ms = torch.nn.functional.pad((long.time[1:] - long.time[:-1]).double(), [1, 0])[: long.time.numel()]
            since_ms = since_ms.index_fill(0, offsets[:-1][offsets[1:] > offsets[:-1]], 0.0)
            log_decay = (-since_ms / self.period_ms).to(x.dtype).unsqueeze(1).repeat(1, self.heads)
        mean: RunningMeanPlan | None = None
        if self.from_mean:
            mean = running_mean_plan(offsets, x)
        return Tokens(offsets, tau, log_decay, mean, at, self._own_codes(long.code))

    def _own_codes(self, code: Tensor) -> Tensor:
        if self.code_heads > 0 and code.size(1) != self.code_heads:
            raise ValueError(f"events or candidates have {code.size(1)} codes, code_heads is {self.code_heads}")
        return code[:, : self.code_heads]

    def _next_items(self, split: Tensor, long: LongOutputs) -> tuple[Tensor, Tensor, Tensor]:
        """The latest tokens that each request has seen, each token once, the event that follows it, and of how many
        requests it is: `[P]` each."""
        back = torch.arange(self.next_items, device=split.device)
        token = long.end.unsqueeze(1) - 1 - back  # [R, next_items]
        real = token >= long.first.unsqueeze(1)
        tokens, which, times = torch.unique(token[real], return_inverse=True, return_counts=True)
        event = torch.empty_like(tokens).index_copy(0, which, (split.unsqueeze(1) - back)[real])  # all the same
        return tokens, event, times


def _apart(weight: Tensor, start: int, width: int) -> None:
    """Map `[d, dim]` columns ``start : start + width`` to the first `width` rows and all others to the other rows, each
    by a (semi-)orthogonal matrix."""
    weight.zero_()
    nn.init.orthogonal_(weight[:width, start : start + width])
    others = torch.tensor([i for i in range(weight.size(1)) if not start <= i < start + width], dtype=torch.int64)
    if others.numel() > 0 and width < weight.size(0):
        weight[width:, others] = nn.init.orthogonal_(torch.empty(weight.size(0) - width, others.numel()))
