"""SDIM: a candidate finds the events that SimHash puts into its own bucket, under several hashes (Cao et al. 2022,
"Sampling Is All You Need on Modeling Long-Term User Behaviors for CTR Prediction", arXiv:2205.10249).

ℓ_j(q) = Σ_i [hash_j(s_i) = hash_j(q)] s_i, normalised to length 1 (L2); the output is the mean over the hashes j. In
expectation an event at an angle θ to the candidate weighs (1 − θ/π)^bits: attention without a softmax. The sums of all
buckets are the memory, and a candidate looks one up for each hash.

The defaults, 16 hashes of 3 bits, are 48 planes three at a time, near the paper's setting; public implementations use 2
hashes of 4 bits. Not in the paper: an event may weigh by its age in the sums. The hash takes no gradient, and is found
once per distinct event.

Where training has few candidates a request, less than half as many as buckets, the candidates' own buckets alone are
summed: :mod:`ranker.ops.bucket_sums`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from ranker.longseq.groups.grouped import AgeWeight
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored, restore_rows, store_rows
from ranker.ops.bucket_sums import bucket_sums
from ranker.ops.groups import group_sums
from ranker.ops.jagged import expand_windows, segments_of
from ranker.ops.simhash import hash_buckets, random_planes


class SDIMMemory(NamedTuple):
    """bucket: `[R, hashes, 2^bits, d]`, of length 1, or zero for a bucket without events."""

    bucket: Tensor


class SDIM(nn.Module):
    """Buckets of the latest `length` events (0: all).

    Args:
        dim: width of events and candidates, and of the output.
        hashes, bits: how many hash functions, and bits of each.
        age_buckets: buckets of log2(age in seconds) for the events' learned weights; 0 turns them off.
    """

    planes: Tensor

    def __init__(self, dim: int, hashes: int = 16, bits: int = 3, length: int = 0, age_buckets: int = 32) -> None:
        super().__init__()
        if hashes < 1:
            raise ValueError(f"hashes: {hashes}; must be at least 1")
        if not 1 <= bits <= 10:
            raise ValueError(f"bits: {bits}; must be from 1 to 10: there are 2^bits buckets")
        self.register_buffer("planes", random_planes(dim, hashes, bits))
        self.age = AgeWeight(age_buckets)
        self.out_dim = dim
        self.hashes, self.buckets, self.length = hashes, 1 << bits, length

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return number_bytes * self.hashes * self.buckets * self.out_dim

    def encode(self, history: History, probes: Probes) -> SDIMMemory:
        """O(Σ L · hashes · 2^bits)."""
        history = latest(history, self.length)
        event, _ = expand_windows(history.start, history.end)
        group = hash_buckets(history.x, self.planes).to(torch.int16).index_select(0, event)
        weight = self.age(history).exp()
        total = group_sums(history.x, group, weight, history.start, history.end, self.buckets).squeeze(3)
        return SDIMMemory(_unit(total))

    def read(self, memory: SDIMMemory, target: Target) -> Tensor:
        """The mean of the candidate's buckets: `[N, d]`."""
        table = segments_of(target.offsets).unsqueeze(1) * self.hashes + torch.arange(
            self.hashes, device=target.x.device
        )
        row = table * self.buckets + hash_buckets(target.x, self.planes)
        return embedding_bag(row, memory.bucket.flatten(0, 2), mode="mean")

    @torch.jit.export
    def store(self, memory: SDIMMemory) -> Stored:
        """The buckets: hashes · 2^bits · d values."""
        return store_rows(memory.bucket)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> SDIMMemory:
        """A lost record has buckets without events."""
        shape = [self.hashes, self.buckets, self.out_dim]
        return SDIMMemory(restore_rows(stored.values, stored.lengths[:, 0], shape))

    def auxiliary(self, history: History, memory: SDIMMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    def few(self, history: History, target: Target) -> bool:
        """Whether candidates ask for less than half as many buckets as there are."""
        return 2 * target.x.size(0) < self.buckets * history.start.numel()

    @torch.jit.unused
    def read_few(self, history: History, target: Target) -> Tensor:
        """`encode` and `read` in one, of the sums of the candidates' own buckets: `[N, out_dim]`."""
        history = latest(history, self.length)
        of_event, asked = hash_buckets(history.x, self.planes), hash_buckets(target.x, self.planes)
        weight = self.age(history).exp().squeeze(1)
        total = bucket_sums(history.x, of_event, weight, history.start, history.end, asked, target.offsets)
        return _unit(total).mean(1)


def _unit(total: Tensor) -> Tensor:
    """Of length 1 along the last axis, with finite gradients where nothing was summed."""
    return total / (total.square().sum(-1, keepdim=True) + 1e-12).sqrt()
