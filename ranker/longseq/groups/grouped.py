"""What methods that keep a fixed number of groups of a history share: ages as weights, means of groups, and the read.

Were every event replaced by the weighted mean of its group, target attention with a bias by age would be attention to
the group means with the logarithms of the groups' summed weights added to the logits: this is what is kept and read.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.longseq.protocol import History, Target
from ranker.longseq.stored import Stored, restore_rows, store_rows
from ranker.ops.attention import window_attention
from ranker.ops.group_attention import group_attention, log_size
from ranker.ops.groups import group_sums
from ranker.ops.jagged import expand_windows, log_bucket, segment_sum


class GroupMemory(NamedTuple):
    """k, v: `[R, K, heads, d_head]` of the groups; size: `[R, K]`, added to the logits: −∞ for a group without
    events."""

    k: Tensor
    v: Tensor
    size: Tensor


class AgeWeight(nn.Module):
    """The logarithm of an event's weight, learned per logarithm of its age: 0 for all at the start.

    Args:
        buckets: of log2(age in seconds); 0 leaves all weights alike.
    """

    def __init__(self, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.bias = nn.Parameter(torch.zeros(buckets, 1)) if buckets > 0 else None

    def forward(self, history: History) -> Tensor:
        """`[P, 1]` for every pair (request, event), at most 0: only differences count."""
        event, request = expand_windows(history.start, history.end)
        bias = self.bias
        if bias is None:
            return torch.zeros([event.numel(), 1], dtype=history.x.dtype, device=history.x.device)
        age_s = (history.now.index_select(0, request) - history.time.index_select(0, event)) // 1000
        return (bias - bias.detach().max()).index_select(0, log_bucket(age_s, self.buckets))


class GroupAttention(nn.Module):
    """Attention of candidates to K groups, as target attention's to events.

    Args:
        dim: width of events and candidates.
        groups: K.
        heads, head_dim: attention width is their product.
        sizes: groups weigh by their events (the logarithm is added to the logits); False: all alike.
    """

    def __init__(self, dim: int, groups: int, heads: int, head_dim: int, sizes: bool = True) -> None:
        super().__init__()
        self.groups, self.heads, self.head_dim, self.sizes = groups, heads, head_dim, sizes
        self.out_dim = heads * head_dim
        self.project = Heads(dim, heads, head_dim)

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return number_bytes * self.groups * (2 * self.heads * self.head_dim + 1)

    def keep(self, mean: Tensor, size: Tensor) -> GroupMemory:
        """Groups by their means `[R, K, dim]` and the logarithms of their sizes `[R, K]`, −∞ for those without
        events."""
        k, v = self.project.keys_values(mean.flatten(0, 1))
        shape = [mean.size(0), self.groups, self.heads, self.head_dim]
        return GroupMemory(k.view(shape), v.view(shape), size)

    def keep_divided(self, history: History, group: Tensor, weight: Tensor) -> GroupMemory:
        """Every event in one group. group: `[P]` int64 of every pair (request, event); weight: `[P, 1]`, logarithms."""
        weight, requests = weight.exp(), history.start.numel()
        _, request = expand_windows(history.start, history.end)
        size = segment_sum(weight, request * self.groups + group, requests * self.groups).view(requests, self.groups)
        sums = group_sums(history.x, group.unsqueeze(1), weight, history.start, history.end, self.groups)
        mean = sums.view(requests, self.groups, history.x.size(1)) / size.clamp(min=1e-30).unsqueeze(2)
        size = log_size(size)
        if not self.sizes:
            size = torch.where(size.isneginf(), size, torch.zeros_like(size))
        return self.keep(mean, size)

    def keep_gathered(self, history: History, mean: Tensor) -> GroupMemory:
        """Every event in all groups `[R, K, dim]` by its share: all weigh alike, none where there are no events."""
        without = (history.end == history.start).unsqueeze(1).expand(-1, self.groups)
        return self.keep(mean, torch.zeros_like(mean[:, :, 0]).masked_fill(without, float("-inf")))

    def read(self, memory: GroupMemory, target: Target) -> Tensor:
        """softmax(q kᵀ / √d + size) v over the request's groups: `[N, heads · d_head]`; zero without events."""
        q = self.project.queries(target.x)
        return group_attention(q, target.offsets, memory.k, memory.v, memory.size.unsqueeze(2))

    def store(self, memory: GroupMemory) -> Stored:
        """All keys, then all values: 2 · K · heads · d_head of them; exact: the K sizes."""
        return store_rows(torch.stack([memory.k, memory.v], 1), memory.size)

    def restore(self, stored: Stored) -> GroupMemory:
        """A lost record has groups without events."""
        few = stored.lengths[:, 1]
        shape = [2, self.groups, self.heads, self.head_dim]
        k, v = restore_rows(stored.values, stored.lengths[:, 0], shape).unbind(1)
        size = restore_rows(stored.exact, few, [self.groups])
        return GroupMemory(k, v, size.masked_fill((few == 0).unsqueeze(1), float("-inf")))


class Gather(nn.Module):
    """Questions to a history: each is answered by the mean of the events, weighted by a softmax over them.

    Args:
        dim: width of events; width: of questions, and of events where they are compared.
        age_buckets: of the learned bias by age, shared by all questions; 0 turns it off.
    """

    def __init__(self, dim: int, width: int, age_buckets: int) -> None:
        super().__init__()
        event = nn.Linear(dim, width, bias=False)
        nn.init.orthogonal_(event.weight)
        self.event = nn.Sequential(event, nn.LayerNorm(width, bias=False))  # one would shift a question's logits alike
        self.age = AgeWeight(age_buckets)

    def forward(self, history: History, question: Tensor, e: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        """softmax(q e / √width + bias) x over each request's events.

        Args:
            question: `[R, K, width]`; e: `[T, width]` of all events, from `event`; bias: `[P, 1]`, from `age`.
            x: `[T, d]`, what is averaged.

        Returns:
            `[R, K, d]`; zero without events.
        """
        requests, k = question.size(0), question.size(1)
        offsets = k * torch.arange(requests + 1, device=x.device)
        q, e, v = question.flatten(0, 1).unsqueeze(1), e.unsqueeze(1), x.unsqueeze(1)
        return window_attention(q, offsets, e, v, history.start, history.end, bias).view(requests, k, x.size(1))
