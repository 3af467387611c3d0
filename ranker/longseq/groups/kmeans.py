"""K-Means: a few of Lloyd's steps divide a request's events into clusters, and candidates attend to their means.

The steps are taken anew for every request, from events at even quantiles of its window: nothing random, nothing kept.
Which cluster an event is in takes no gradient; the means do. Events alike in value start one cluster only, so that a
history of few distinct events has few clusters, and a cluster that loses all its events stays where it was.

Chosen here: distances are Euclidean between events as they come from the tables; in the means, and in the size of a
cluster, an event weighs by its age (:class:`~ranker.longseq.groups.grouped.AgeWeight`), in the steps it does not.
"""

import torch
from torch import Tensor, nn

from ranker.longseq.groups.grouped import AgeWeight, GroupAttention, GroupMemory
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored
from ranker.ops.groups import group_sums, nearest_group
from ranker.ops.jagged import expand_windows, segment_sum
from ranker.ops.padded import exporting, with_spare


class KMeans(nn.Module):
    """Attention to `clusters` cluster means of the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        clusters: K; steps: of Lloyd's.
        heads, head_dim, sizes: of the attention, see :class:`~ranker.longseq.groups.grouped.GroupAttention`.
        age_buckets: buckets of log2(age in seconds) for the events' learned weights; 0 turns them off.
    """

    def __init__(
        self,
        dim: int,
        clusters: int = 32,
        steps: int = 3,
        heads: int = 2,
        head_dim: int = 16,
        sizes: bool = True,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        for name, value, least in (("clusters", clusters, 1), ("steps", steps, 0)):
            if value < least:
                raise ValueError(f"{name}: {value}; must be at least {least}")
        self.attention = GroupAttention(dim, clusters, heads, head_dim, sizes)
        self.age = AgeWeight(age_buckets)
        self.out_dim = self.attention.out_dim
        self.clusters, self.steps, self.length = clusters, steps, length

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return self.attention.memory_bytes(number_bytes)

    def encode(self, history: History, probes: Probes) -> GroupMemory:
        """O(Σ L · clusters · steps)."""
        history = latest(history, self.length)
        return self.attention.keep_divided(history, self.cluster(history), self.age(history))

    def read(self, memory: GroupMemory, target: Target) -> Tensor:
        """`[N, heads · d_head]`."""
        return self.attention.read(memory, target)

    @torch.jit.export
    def store(self, memory: GroupMemory) -> Stored:
        """Keys, values and sizes of the groups."""
        return self.attention.store(memory)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> GroupMemory:
        """A lost record has groups without events."""
        return self.attention.restore(stored)

    def auxiliary(self, history: History, memory: GroupMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    def cluster(self, history: History) -> Tensor:
        """The cluster `[P]` of every pair (request, event) of windows already cut to length."""
        x, start, end = history.x.detach(), history.start, history.end
        requests, k = start.numel(), self.clusters
        centre, taken = first_centres(x, start, end, k)
        group = nearest_group(x, start, end, centre, taken)
        one = torch.ones([group.numel(), 1], dtype=x.dtype, device=x.device)
        request = expand_windows(start, end)[1]
        for _ in range(self.steps):
            total = group_sums(x, group.unsqueeze(1), one, start, end, k).view(requests, k, x.size(1))
            count = segment_sum(torch.ones_like(group), request * k + group, requests * k).view(requests, k, 1)
            centre = torch.where(count > 0, total / count.clamp(min=1), centre)
            group = nearest_group(x, start, end, centre, taken)
        return group


def first_centres(x: Tensor, start: Tensor, end: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Events at even quantiles of each window `[R, K, d]`, and which of them are centres `[R, K]`: of equal ones the
    first, and no more than there are events."""
    requests, length = start.numel(), (end - start).unsqueeze(1)
    rank, most = torch.arange(k, device=x.device), length.clamp(max=k)
    if not torch.jit.is_scripting() and exporting():
        x = with_spare(x)
    if x.size(0) == 0:
        return x.new_zeros([requests, k, x.size(1)]), torch.zeros([requests, k], dtype=torch.bool, device=x.device)
    within = torch.div((2 * rank + 1) * length, 2 * most.clamp(min=1), rounding_mode="floor")
    event = (start.unsqueeze(1) + within.minimum(length - 1)).clamp(0, x.size(0) - 1)
    centre = x.index_select(0, event.flatten()).view(requests, k, x.size(1))
    taken = rank < most
    same = (centre.unsqueeze(1) == centre.unsqueeze(2)).all(3) & taken.unsqueeze(1)  # [R, a, b]: b equals a
    return centre, taken & ~same.tril(-1).any(2)
