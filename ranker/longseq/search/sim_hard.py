"""SIM with hard search: a candidate attends to the latest K events of its own category.

Pi et al. 2020, "Search-based User Interest Modeling with Lifelong Sequential Behavior Data for Click-Through Rate
Prediction". The category is a probe, so that the search is part of `encode` and a store keeps, for each user and
category, the K events that were found: `read` does not grow with the history, only the index does.

Left open by the paper and chosen here: a candidate without a category (code 0) finds nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.search.found import FoundAttention, ages_s
from ranker.ops.latest_of_code import latest_of_code


class SimHardMemory(NamedTuple):
    """kv: `[S, heads, 2 · d_head]` keys and values of the S events that some probe found; event: `[Q, K]` int64, the
    rows of `kv` that each probe found, the latest first, −1 for none; age_s: `[Q, K]` int64."""

    kv: Tensor
    event: Tensor
    age_s: Tensor


class SimHard(nn.Module):
    """Hard search in the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        top: K, events found at most.
        heads, head_dim, age_buckets: see :class:`ranker.longseq.search.found.FoundAttention`.
    """

    def __init__(
        self, dim: int, top: int = 50, heads: int = 2, head_dim: int = 16, length: int = 0, age_buckets: int = 32
    ) -> None:
        super().__init__()
        self.out_dim = heads * head_dim
        self.top, self.length = top, length
        self.attend = FoundAttention(dim, heads, head_dim, age_buckets)

    def encode(self, history: History, probes: Probes) -> SimHardMemory:
        """Index each probe's events; `history.code` is `[T, 1]`. Projects the events that were found, each once."""
        history = latest(history, self.length)
        event = latest_of_code(history.code[:, 0], history.start, history.end, probes.code, probes.request, self.top)
        found = torch.zeros([history.x.size(0)], dtype=torch.bool, device=event.device)
        found[event[event >= 0]] = True
        row = torch.cumsum(found, 0) - 1  # of each found event among them
        kv = self.attend.keys_values(history.x[found])
        age_s = ages_s(history.time, event, history.now[probes.request])
        if row.numel() > 0:
            event = torch.where(event >= 0, row[event.clamp(min=0)], event)
        return SimHardMemory(kv, event, age_s)

    def read(self, memory: SimHardMemory, target: Target) -> Tensor:
        """Attention to the events of the candidate's probe: `[N, heads · d_head]`."""
        q = self.attend.project.queries(target.x)
        event = memory.event.index_select(0, target.probe)
        return self.attend(q, memory.kv, event, memory.age_s.index_select(0, target.probe))

    def auxiliary(self, history: History, memory: SimHardMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)
