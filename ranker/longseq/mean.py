"""Mean pooling: the memory is the mean of the events, the same for every candidate. The cheapest compressor."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored, restore_rows, store_rows
from ranker.ops.jagged import segments_of, window_mean


class MeanMemory(NamedTuple):
    """mean: `[R, d]`, zero for an empty history."""

    mean: Tensor


class MeanPooling(nn.Module):
    """Mean of the latest `length` events (0: all)."""

    def __init__(self, dim: int, length: int = 0) -> None:
        super().__init__()
        self.out_dim = dim
        self.length = length

    def encode(self, history: History, probes: Probes) -> MeanMemory:
        """O(T + R): requests that share a row share its running sum."""
        history = latest(history, self.length)
        return MeanMemory(window_mean(history.x, history.start, history.end))

    def read(self, memory: MeanMemory, target: Target) -> Tensor:
        """`[N, d]`: the request's mean."""
        return memory.mean[segments_of(target.offsets, target.x.size(0))]

    @torch.jit.export
    def store(self, memory: MeanMemory) -> Stored:
        """The mean: d values."""
        return store_rows(memory.mean)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> MeanMemory:
        """A lost mean is zero."""
        return MeanMemory(restore_rows(stored.values, stored.lengths[:, 0], [self.out_dim]))

    def auxiliary(self, history: History, memory: MeanMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
