"""Full-length target attention: every candidate attends to every event. Exact, and its `read` costs O(L) per candidate.

The reference that every approximation is measured against: multi-head softmax attention (Vaswani et al. 2017) with the
candidate as the only query, and a learned bias per head on the logarithm of an event's age, which an id alone cannot
tell.
Keys and values are projected once per distinct history.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.longseq.protocol import History, Probes, Target, covered, latest
from ranker.ops.attention import window_attention
from ranker.ops.jagged import expand_windows, log_bucket
from ranker.ops.padded import exporting


class AttentionMemory(NamedTuple):
    """k, v: `[T, heads, d_head]`; start, end: `[R]` windows into T; bias: `[P, heads]` of every (request, event)
    pair, or empty."""

    k: Tensor
    v: Tensor
    start: Tensor
    end: Tensor
    bias: Tensor


class TargetAttention(nn.Module):
    """Multi-head target attention over the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        heads, head_dim: attention width is their product.
        age_buckets: buckets of log2(age in seconds) for the learned bias; 0 turns it off.
    """

    def __init__(self, dim: int, heads: int = 2, head_dim: int = 16, length: int = 0, age_buckets: int = 32) -> None:
        super().__init__()
        self.out_dim = heads * head_dim
        self.heads, self.length, self.age_buckets = heads, length, age_buckets
        self.project = Heads(dim, heads, head_dim)
        self.age_bias = nn.Parameter(torch.zeros(age_buckets, heads)) if age_buckets > 0 else None

    def encode(self, history: History, probes: Probes) -> AttentionMemory:
        """Project the events once per distinct history, and none that no window has."""
        history = latest(history, self.length)
        if self.length > 0 and (torch.jit.is_scripting() or not exporting()):
            history = covered(history)
        k, v = self.project.keys_values(history.x)
        bias = torch.zeros([0, self.heads], dtype=k.dtype, device=k.device)
        age_bias = self.age_bias
        if age_bias is not None:
            event, request = expand_windows(history.start, history.end)
            age_s = (history.now[request] - history.time[event]) // 1000
            bias = age_bias[log_bucket(age_s, self.age_buckets)]
        return AttentionMemory(k, v, history.start, history.end, bias)

    def read(self, memory: AttentionMemory, target: Target) -> Tensor:
        """softmax(q kᵀ / √d + bias) v over the request's window: `[N, heads · d_head]`."""
        q = self.project.queries(target.x)
        bias = memory.bias if self.age_buckets > 0 else None
        out = window_attention(q, target.offsets, memory.k, memory.v, memory.start, memory.end, bias)
        return out.flatten(1)

    def auxiliary(self, history: History, memory: AttentionMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
