"""Aggregator: learned queries attend to the history once, and candidates attend to what each of them has gathered.

The soft counterpart of dividing events into groups: a query's group is all events, by its attention to them. Events are
normalised where they are compared with queries, and a learned bias by age is added to the logits; what is gathered are
the events themselves.
"""

import torch
from torch import Tensor, nn

from ranker.longseq.groups.grouped import Gather, GroupAttention, GroupMemory
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored


class Aggregator(nn.Module):
    """Attention to what `queries` learned queries gather of the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        queries: K; width: in which they are compared with events.
        heads, head_dim: of the candidate's attention, see :class:`~ranker.longseq.groups.grouped.GroupAttention`.
        age_buckets: buckets of log2(age in seconds) for the learned bias; 0 turns it off.
    """

    def __init__(
        self,
        dim: int,
        queries: int = 32,
        width: int = 32,
        heads: int = 2,
        head_dim: int = 16,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        for name, value, least in (("queries", queries, 1), ("width", width, 2)):
            if value < least:
                raise ValueError(f"{name}: {value}; must be at least {least}")
        self.attention = GroupAttention(dim, queries, heads, head_dim)
        self.gather = Gather(dim, width, age_buckets)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.out_dim = self.attention.out_dim
        self.length = length

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return self.attention.memory_bytes(number_bytes)

    def encode(self, history: History, probes: Probes) -> GroupMemory:
        """O(Σ L · queries)."""
        history = latest(history, self.length)
        question = self.queries.repeat(history.start.numel(), 1, 1)
        mean = self.gather(history, question, self.gather.event(history.x), self.gather.age(history), history.x)
        return self.attention.keep_gathered(history, mean)

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
