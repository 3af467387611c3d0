"""ETA: the K events whose hashes differ least from the candidate's, then attention.

Chen et al. 2021, "End-to-End User Behavior Retrieval in Click-Through Rate Prediction Model". SimHash (Charikar 2002):
a bit is the side of a random plane that a vector is on; the share of bits that differ is the angle over π. What is
hashed are the keys and queries of the attention itself, all heads' side by side, so that the search follows what the
attention learns and has no weights to train.

Codes are kept as ±1, 32 bytes of int8 an event. Their product is (bits − 2 · Hamming distance), so that the search by
inner product serves. On a CPU it is four times as fast as XOR of packed int32 and counting the bits, for which PyTorch
has no operator (:mod:`tests.benchmarks.search`: 1.1 and 4.6 ns a pair of candidate and event).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.search.found import FoundAttention, ages_s
from ranker.ops.jagged import segments_of
from ranker.ops.simhash import hash_signs
from ranker.ops.topk_windows import topk_windows


class EtaMemory(NamedTuple):
    """code: `[T, bits]` int8, ±1; kv: `[T, heads, 2 · d_head]`; time: `[T]` and now: `[R]` int64, milliseconds; start,
    end: `[R]` windows into T."""

    code: Tensor
    kv: Tensor
    time: Tensor
    start: Tensor
    end: Tensor
    now: Tensor


class ETA(nn.Module):
    """Search by SimHash in the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        top: K, events found at most.
        bits: of a hash.
        heads, head_dim, age_buckets: see :class:`ranker.longseq.search.found.FoundAttention`.
    """

    planes: Tensor

    def __init__(
        self,
        dim: int,
        top: int = 50,
        bits: int = 32,
        heads: int = 2,
        head_dim: int = 16,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        self.out_dim = heads * head_dim
        self.top, self.length = top, length
        self.attend = FoundAttention(dim, heads, head_dim, age_buckets)
        self.register_buffer("planes", torch.randn(heads * head_dim, bits))

    def encode(self, history: History, probes: Probes) -> EtaMemory:
        """Project and hash the events once per distinct history."""
        history = latest(history, self.length)
        k, v = self.attend.project.keys_values(history.x)
        code = hash_signs(k.flatten(1), self.planes)
        return EtaMemory(code, torch.cat([k, v], 2), history.time, history.start, history.end, history.now)

    def read(self, memory: EtaMemory, target: Target) -> Tensor:
        """Attention to the events nearest in Hamming distance, of equal ones the latest: `[N, heads · d_head]`."""
        q = self.attend.project.queries(target.x)
        code = hash_signs(q.flatten(1), self.planes).to(q.dtype)
        event = topk_windows(
            code.unsqueeze(1), target.offsets, memory.code.unsqueeze(1), memory.start, memory.end, self.top
        ).squeeze(1)
        now = memory.now.index_select(0, segments_of(target.offsets))
        return self.attend(q, memory.kv, event, ages_s(memory.time, event, now))

    def auxiliary(self, history: History, memory: EtaMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
