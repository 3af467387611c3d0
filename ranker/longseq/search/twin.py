"""TWIN: the search score is the attention logit, so that what is found is what attention would weigh most.

Chang et al. 2023, "TWIN: TWo-stage Interest Network for Lifelong User Behavior Modeling in CTR Prediction at Kuaishou".
A head's logit of candidate and event is (W_q c)(W_k e)ᵀ / √d plus a bias from *cross features*, those of the event
alone, each of which the paper projects to a scalar a head; each head attends to its own K events of greatest logits.
Softmax over them is exact attention but for the weights of all other events.

What in our data is a cross feature: an event's age, and its own ids and floats (`features.event`,
`features.event_dense`). The latter are added to the event's vector before blocks see it, so that their scalar is a
linear map of that vector to one number a head, once per distinct event: it has the scalar of the sum of the features,
and one of the item beside, which the paper's has not. Age depends on the request: a learned bias per head and bucket of
its logarithm, as in target attention. Keys see the whole vector, where the paper's see the item alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.ops.found_attention import found_attention, take_found
from ranker.ops.jagged import expand_windows, log_bucket, offsets_of, segments_of
from ranker.ops.topk_windows import topk_windows


class TwinMemory(NamedTuple):
    """kv: `[T, heads, 2 · d_head]` keys and values side by side; bias: `[P, heads]` of every (request, event) pair;
    start, end: `[R]` windows into T."""

    kv: Tensor
    bias: Tensor
    start: Tensor
    end: Tensor


class TWIN(nn.Module):
    """Search by attention logits in the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        top: K, events that each head finds at most.
        heads, head_dim: attention width is their product.
        age_buckets: buckets of log2(age in seconds) for the learned bias; 0 turns it off.
    """

    def __init__(
        self, dim: int, top: int = 50, heads: int = 2, head_dim: int = 16, length: int = 0, age_buckets: int = 32
    ) -> None:
        super().__init__()
        self.out_dim = heads * head_dim
        self.top, self.length, self.age_buckets = top, length, age_buckets
        self.head_dim = head_dim
        self.project = Heads(dim, heads, head_dim)
        self.cross = nn.Linear(dim, heads, bias=False)  # one would shift all logits of a query alike
        nn.init.zeros_(self.cross.weight)
        self.age_bias = nn.Parameter(torch.zeros(age_buckets, heads)) if age_buckets > 0 else None

    def encode(self, history: History, probes: Probes) -> TwinMemory:
        """Project the events, and their own features to biases, once per distinct history."""
        history = latest(history, self.length)
        k, v = self.project.keys_values(history.x)
        event, request = expand_windows(history.start, history.end)
        bias = self.cross(history.x).index_select(0, event)
        age_bias = self.age_bias
        if age_bias is not None:
            age_s = (history.now[request] - history.time[event]) // 1000
            bias = bias + age_bias.index_select(0, log_bucket(age_s, self.age_buckets))
        return TwinMemory(torch.cat([k, v], 2), bias, history.start, history.end)

    def read(self, memory: TwinMemory, target: Target) -> Tensor:
        """softmax(q kᵀ / √d + bias) v over each head's K greatest logits: `[N, heads · d_head]`."""
        q = self.project.queries(target.x)
        k = memory.kv[..., : self.head_dim]
        event = topk_windows(q, target.offsets, k, memory.start, memory.end, self.top, memory.bias)
        # pairs stand request after request: an event's is as far from its request's first as the event is
        moved = offsets_of(memory.end - memory.start)[:-1] - memory.start
        pair = event + moved.index_select(0, segments_of(target.offsets)).view(-1, 1, 1)
        by_head = pair * q.size(1) + torch.arange(q.size(1), device=q.device).unsqueeze(1)
        bias = take_found(memory.bias.flatten(), torch.where(event >= 0, by_head, event))
        return found_attention(q, memory.kv, event, bias).flatten(1)

    def auxiliary(self, history: History, memory: TwinMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
