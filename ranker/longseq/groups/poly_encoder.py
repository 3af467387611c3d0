"""Poly-encoder: m learned codes attend to the history, and a candidate attends to the m vectors found, by dot product.

Humeau et al. 2020 (ICLR; arXiv:1905.01969), for histories instead of texts: y_i = Σ_j softmax_j(c_i · h_j) h_j and
y = Σ_i softmax_i(t · y_i) y_i. One space serves for all: there are no keys, values or heads, which is what sets it
apart from the aggregator, and the memory is half as large.

Chosen here: h and t are an event and a candidate projected and normalised, at first by the same map, in place of the
paper's encoders; products are divided by √width; a learned bias by age is added to the codes' logits. The paper
scores t · y; here y goes to the tower, which may take the product.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.groups.grouped import Gather
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored, restore_rows, store_rows
from ranker.ops.group_attention import group_attention


class PolyMemory(NamedTuple):
    """y: `[R, m, width]`, zero for an empty history."""

    y: Tensor


class PolyEncoder(nn.Module):
    """Attention to what `codes` learned codes find in the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        codes: m; width: of everything inside and of the output.
        age_buckets: buckets of log2(age in seconds) for the learned bias; 0 turns it off.
    """

    def __init__(self, dim: int, codes: int = 32, width: int = 32, length: int = 0, age_buckets: int = 32) -> None:
        super().__init__()
        for name, value, least in (("codes", codes, 1), ("width", width, 2)):
            if value < least:
                raise ValueError(f"{name}: {value}; must be at least {least}")
        self.gather = Gather(dim, width, age_buckets)
        self.candidate = nn.Sequential(nn.Linear(dim, width, bias=False), nn.LayerNorm(width))
        self.candidate[0].load_state_dict(self.gather.event[0].state_dict())
        self.codes = nn.Parameter(torch.randn(codes, width))
        self.out_dim = width
        self.length = length

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return number_bytes * self.codes.numel()

    def encode(self, history: History, probes: Probes) -> PolyMemory:
        """O(Σ L · codes)."""
        history = latest(history, self.length)
        h, question = self.gather.event(history.x), self.codes.repeat(history.start.numel(), 1, 1)
        return PolyMemory(self.gather(history, question, h, self.gather.age(history), h))

    def read(self, memory: PolyMemory, target: Target) -> Tensor:
        """Σ_i softmax_i(t · y_i / √width) y_i: `[N, width]`; zero without events."""
        t, y = self.candidate(target.x).unsqueeze(1), memory.y.unsqueeze(2)
        return group_attention(t, target.offsets, y, y, torch.zeros_like(y[:, :, :, 0]))

    @torch.jit.export
    def store(self, memory: PolyMemory) -> Stored:
        """What the codes found: m · width values."""
        return store_rows(memory.y)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> PolyMemory:
        """Of a lost record the codes found nothing."""
        return PolyMemory(restore_rows(stored.values, stored.lengths[:, 0], [self.codes.size(0), self.out_dim]))

    def auxiliary(self, history: History, memory: PolyMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
