"""SIM with soft search: the K events with the greatest inner products with the candidate, then attention.

Pi et al. 2020, "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
Prediction". Candidate and events are projected for the search, (1) r_i = (W_a c)(W_b e_i)ᵀ / √d; the K greatest go to
multi-head attention with projections of its own. Being found has no gradient, so the search unit learns from a loss of
its own: a small head predicts the click from the candidate and (2) U = Σ r_i W_v e_i over *all* events, no softmax.

(2) grows with the history, and with it the head's logit. Here U is the mean over the events, for a long history must
not drown the head, and a LayerNorm follows, for most of a long history has nothing to do with the candidate and the
mean is small. Σ r_i W_v e_i = (Σ (W_v e_i)(W_b e_i)ᵀ) W_a c / √d: a matrix of the request, so that the loss costs O(T)
and not O(N · L). It is made in training only.

Left open by the paper and chosen here: W_a and W_b start alike and both end in a LayerNorm, as in all our attention;
the head also sees the product of candidate and U, as the tower does.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.search.found import FoundAttention, ages_s
from ranker.ops.jagged import segments_of
from ranker.ops.outer_sums import outer_sums
from ranker.ops.topk_windows import topk_windows


class SimSoftMemory(NamedTuple):
    """search: `[T, 1, d_s]` the events' search keys; kv: `[T, heads, 2 · d_head]`; time: `[T]` and now: `[R]` int64,
    milliseconds; start, end: `[R]` windows into T. mean: in training `[R, d_s, d_s]`, the mean over the window of
    (W_b e)(W_v e)ᵀ, for the search unit's own loss; else empty."""

    search: Tensor
    kv: Tensor
    time: Tensor
    start: Tensor
    end: Tensor
    now: Tensor
    mean: Tensor


class SimSoft(nn.Module):
    """Soft search in the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        top: K, events found at most.
        search_dim: d_s, width of the search unit.
        heads, head_dim, age_buckets: see :class:`ranker.longseq.search.found.FoundAttention`.
    """

    def __init__(
        self,
        dim: int,
        top: int = 50,
        search_dim: int = 16,
        heads: int = 2,
        head_dim: int = 16,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        self.out_dim = heads * head_dim
        self.top, self.length, self.search_dim = top, length, search_dim
        self.search = Heads(dim, 1, search_dim)
        self.gathered_norm = nn.LayerNorm(search_dim)
        self.click = nn.Sequential(nn.Linear(3 * search_dim, search_dim), nn.ReLU(), nn.Linear(search_dim, 1))
        self.attend = FoundAttention(dim, heads, head_dim, age_buckets)

    def encode(self, history: History, probes: Probes) -> SimSoftMemory:
        """Project the events for search and attention once per distinct history."""
        history = latest(history, self.length)
        k, v = self.search.keys_values(history.x)
        mean = torch.zeros([0, self.search_dim, self.search_dim], dtype=k.dtype, device=k.device)
        if self.training:
            count = (history.end - history.start).clamp(min=1).view(-1, 1, 1)
            mean = outer_sums(k.squeeze(1), v.squeeze(1), history.start, history.end) / count
        kv = self.attend.keys_values(history.x)
        return SimSoftMemory(k.detach(), kv, history.time, history.start, history.end, history.now, mean)

    def read(self, memory: SimSoftMemory, target: Target) -> Tensor:
        """Attention to the events with the greatest r_i, of equal ones the latest: `[N, heads · d_head]`. (1)"""
        asked = self.search.queries(target.x)
        event = topk_windows(asked, target.offsets, memory.search, memory.start, memory.end, self.top).squeeze(1)
        now = memory.now.index_select(0, segments_of(target.offsets))
        q = self.attend.project.queries(target.x)
        return self.attend(q, memory.kv, event, ages_s(memory.time, event, now))

    def click_logits(self, memory: SimSoftMemory, target: Target) -> Tensor:
        """The search unit's own logits of a click, in training: `[N, 1]`. (2)"""
        c = self.search.queries(target.x).squeeze(1)
        mean = memory.mean.index_select(0, segments_of(target.offsets))
        u = self.gathered_norm(torch.einsum("nk,nkv->nv", c, mean) / math.sqrt(self.search_dim))
        return self.click(torch.cat([c, u, c * u], 1))

    def auxiliary(self, history: History, memory: SimSoftMemory) -> Tensor:
        """None that knows no labels: see `click_logits`."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
