"""C-Former: learned queries become a user's interests over layers of cross-attention to the history.

Each layer: K slots, at first the learned queries, attend to the events (multi-head softmax), then pass through a
feed-forward net; both are residual and normalised before. What a slot asks for at last is answered by its *centroid*,
the mean of the events weighted by that attention, and candidates attend to the K centroids.

Two losses of its own: events should be found again in the centroids, and slots should differ. Left open by what is
published, and chosen here:
- a centroid is in the events' own space; events and slots are normalised where they are compared; one learned bias by
  age is added to all logits;
- reconstruction: x̂_i = Σ_k softmax_k(x_i · c_k) c_k of `reconstructed` events at even quantiles of the window, by the
  same normalised projection; the loss is Σ‖x_i − x̂_i‖² / Σ‖x_i‖², of which 1 is to have found nothing. The events
  found again are targets without gradient, or they would shrink to be easy;
- orthogonality: ‖S Sᵀ − I‖ / K of the slots S with rows of length 1, about their root mean square cosine.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.groups.grouped import Gather, GroupAttention, GroupMemory
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored
from ranker.longseq.uxsid import orthogonality
from ranker.ops.attention import window_attention


class CFormerMemory(NamedTuple):
    """group: the centroids, which a store keeps. In training, for the block's own loss, else empty: centroid
    `[R, K, dim]`, slot `[R, K, width]`."""

    group: GroupMemory
    centroid: Tensor
    slot: Tensor


class CrossLayer(nn.Module):
    """Slots attend to events, and pass through a feed-forward net of `feed_forward` times their width."""

    def __init__(self, width: int, heads: int, feed_forward: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        hidden = feed_forward * width
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, slot: Tensor, e: Tensor, bias: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """`[R, K, width]` of slots, e: `[T, width]`, bias: `[P, 1]`."""
        requests, k = slot.size(0), slot.size(1)
        q = self.query(self.norm(slot)).flatten(0, 1).unflatten(1, [self.heads, -1])
        keys, values = self.key_value(e).unflatten(1, [2, self.heads, -1]).unbind(1)
        offsets = k * torch.arange(requests + 1, device=e.device)
        found = window_attention(q, offsets, keys, values, start, end, bias.expand(-1, self.heads))
        slot = slot + self.out(found.flatten(1)).view_as(slot)
        return slot + self.feed_forward(slot)


class CFormer(nn.Module):
    """Attention to the centroids of `queries` slots of the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        queries: K, at most width, or no slots could be orthogonal.
        width: of slots; layers: of cross-attention; feed_forward: hidden width of their nets, in widths.
        heads, head_dim: of the candidate's attention, see :class:`~ranker.longseq.groups.grouped.GroupAttention`; the
            layers have as many heads.
        age_buckets: buckets of log2(age in seconds) for the learned bias; 0 turns it off.
        reconstruction_weight, orthogonality_weight: of the losses; 0 turns one off.
        reconstructed: events of a history that the reconstruction loss looks at.
    """

    def __init__(
        self,
        dim: int,
        queries: int = 32,
        width: int = 32,
        layers: int = 2,
        feed_forward: int = 2,
        heads: int = 2,
        head_dim: int = 16,
        length: int = 0,
        age_buckets: int = 32,
        reconstruction_weight: float = 0.1,
        orthogonality_weight: float = 0.1,
        reconstructed: int = 64,
    ) -> None:
        super().__init__()
        for name, value in (("queries", queries), ("layers", layers), ("reconstructed", reconstructed)):
            if value < 1:
                raise ValueError(f"{name}: {value}; must be at least 1")
        if queries > width:
            raise ValueError(f"queries: {queries}; must be at most width ({width}): raise width")
        if heads < 1 or width % heads:
            raise ValueError(f"heads: {heads}; must divide width ({width})")
        self.attention = GroupAttention(dim, queries, heads, head_dim)
        self.gather = Gather(dim, width, age_buckets)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.layers = nn.ModuleList(CrossLayer(width, heads, feed_forward) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out_dim = self.attention.out_dim
        self.width, self.length, self.reconstructed = width, length, reconstructed
        self.reconstruction_weight, self.orthogonality_weight = reconstruction_weight, orthogonality_weight
        self.has_loss = reconstruction_weight > 0 or orthogonality_weight > 0

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return self.attention.memory_bytes(number_bytes)

    def encode(self, history: History, probes: Probes) -> CFormerMemory:
        """O(Σ L · queries · layers); events are projected once, and for each layer."""
        history = latest(history, self.length)
        e, bias = self.gather.event(history.x), self.gather.age(history)
        slot = self.queries.expand(history.start.numel(), -1, -1)
        for layer in self.layers:
            slot = layer(slot, e, bias, history.start, history.end)
        slot = self.norm(slot)
        centroid = self.gather(history, slot, e, bias, history.x)
        group = self.attention.keep_gathered(history, centroid)
        if self.training and self.has_loss:
            return CFormerMemory(group, centroid, slot)
        return CFormerMemory(group, centroid[:0], slot[:0])

    def read(self, memory: CFormerMemory, target: Target) -> Tensor:
        """`[N, heads · d_head]`."""
        return self.attention.read(memory.group, target)

    @torch.jit.export
    def store(self, memory: CFormerMemory) -> Stored:
        """Keys, values and sizes of the centroids."""
        return self.attention.store(memory.group)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> CFormerMemory:
        """A lost record has centroids without events."""
        group = self.attention.restore(stored)
        return CFormerMemory(group, group.k[:0], group.k[:0])

    def auxiliary(self, history: History, memory: CFormerMemory) -> Tensor:
        """Both losses, weighted: means over requests with events; zero where `encode` kept nothing for it."""
        if memory.slot.size(0) == 0:
            return history.x.new_zeros([])
        history = latest(history, self.length)
        seen = history.end > history.start
        of_slots = orthogonality(memory.slot[seen], True) / self.queries.size(0)
        lost = self._lost(history.x, history.start[seen], history.end[seen], memory.centroid[seen])
        loss = self.reconstruction_weight * lost + self.orthogonality_weight * of_slots
        return loss.sum() / max(loss.numel(), 1)

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    def _lost(self, x: Tensor, start: Tensor, end: Tensor, centroid: Tensor) -> Tensor:
        """The share of its events that a request's centroids have lost: `[R]`, of windows that have events."""
        rank = 2 * torch.arange(self.reconstructed, device=x.device) + 1
        within = torch.div(rank * (end - start).unsqueeze(1), 2 * self.reconstructed, rounding_mode="floor")
        event = (start.unsqueeze(1) + within).flatten()
        events = x.detach().index_select(0, event).view(start.numel(), self.reconstructed, x.size(1))
        logits = torch.einsum("rnd,rkd->rnk", self.gather.event(events), self.gather.event(centroid))
        found = torch.bmm(torch.softmax(logits / math.sqrt(self.width), 2), centroid)
        return (events - found).square().sum([1, 2]) / (events.square().sum([1, 2]) + 1e-12)
