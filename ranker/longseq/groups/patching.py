"""Patching: a history is cut into equal pieces in the order of time, and candidates attend to the pieces' means.

Of a history of fewer events than pieces every event is a piece. An event weighs by its age in the means and sizes.
"""

import torch
from torch import Tensor, nn

from ranker.longseq.groups.grouped import AgeWeight, GroupAttention, GroupMemory
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored
from ranker.ops.jagged import expand_windows


class Patching(nn.Module):
    """Attention to the means of `patches` equal pieces of the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        patches: K.
        heads, head_dim, sizes: of the attention, see :class:`~ranker.longseq.groups.grouped.GroupAttention`.
        age_buckets: buckets of log2(age in seconds) for the events' learned weights; 0 turns them off.
    """

    def __init__(
        self,
        dim: int,
        patches: int = 32,
        heads: int = 2,
        head_dim: int = 16,
        sizes: bool = True,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        if patches < 1:
            raise ValueError(f"patches: {patches}; must be at least 1")
        self.attention = GroupAttention(dim, patches, heads, head_dim, sizes)
        self.age = AgeWeight(age_buckets)
        self.out_dim = self.attention.out_dim
        self.patches, self.length = patches, length

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return self.attention.memory_bytes(number_bytes)

    def encode(self, history: History, probes: Probes) -> GroupMemory:
        """O(Σ L). Event j of n is in the piece ⌊j K / n⌋."""
        history = latest(history, self.length)
        event, request = expand_windows(history.start, history.end)
        within = event - history.start.index_select(0, request)
        length = (history.end - history.start).index_select(0, request)
        patch = torch.div(within * self.patches, length, rounding_mode="floor")
        return self.attention.keep_divided(history, patch, self.age(history))

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
