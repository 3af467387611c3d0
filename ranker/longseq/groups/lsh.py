"""LSH: events whose SimHash is the same are a group, and candidates attend to the groups' means.

The planes are random and fixed; which group an event is in takes no gradient, and is found once per distinct event. An
event weighs by its age in the means and sizes of groups.
"""

import torch
from torch import Tensor, nn

from ranker.longseq.groups.grouped import AgeWeight, GroupAttention, GroupMemory
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored
from ranker.ops.jagged import expand_windows
from ranker.ops.simhash import hash_buckets, random_planes


class LSH(nn.Module):
    """Attention to the means of 2^bits SimHash groups of the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        bits: of the hash.
        heads, head_dim, sizes: of the attention, see :class:`~ranker.longseq.groups.grouped.GroupAttention`.
        age_buckets: buckets of log2(age in seconds) for the events' learned weights; 0 turns them off.
    """

    planes: Tensor

    def __init__(
        self,
        dim: int,
        bits: int = 5,
        heads: int = 2,
        head_dim: int = 16,
        sizes: bool = True,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 10:
            raise ValueError(f"bits: {bits}; must be from 1 to 10: there are 2^bits groups")
        self.attention = GroupAttention(dim, 1 << bits, heads, head_dim, sizes)
        self.age = AgeWeight(age_buckets)
        self.register_buffer("planes", random_planes(dim, 1, bits))
        self.out_dim = self.attention.out_dim
        self.length = length

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return self.attention.memory_bytes(number_bytes)

    def encode(self, history: History, probes: Probes) -> GroupMemory:
        """O(Σ L)."""
        history = latest(history, self.length)
        event, _ = expand_windows(history.start, history.end)
        group = hash_buckets(history.x, self.planes).squeeze(1).index_select(0, event)
        return self.attention.keep_divided(history, group, self.age(history))

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
