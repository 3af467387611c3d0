"""What all search methods end with: a candidate attends to the few events that were found for it.

The attention is that of :class:`ranker.longseq.target_attention.TargetAttention`, projections, normalisation and bias
by age, so that methods differ in what they find.
"""

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.ops.found_attention import found_attention, take_found
from ranker.ops.jagged import log_bucket


class FoundAttention(nn.Module):
    """Multi-head attention to found events.

    Args:
        dim: width of events and candidates.
        heads, head_dim: attention width is their product.
        age_buckets: buckets of log2(age in seconds) for the learned bias; 0 turns it off.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, age_buckets: int) -> None:
        super().__init__()
        self.age_buckets = age_buckets
        self.project = Heads(dim, heads, head_dim)
        self.age_bias = nn.Parameter(torch.zeros(age_buckets, heads)) if age_buckets > 0 else None

    def keys_values(self, x: Tensor) -> Tensor:
        """Events `[T, dim]` to keys and values side by side, `[T, heads, 2 · head_dim]`."""
        k, v = self.project.keys_values(x)
        return torch.cat([k, v], 2)

    def forward(self, q: Tensor, kv: Tensor, event: Tensor, age_s: Tensor) -> Tensor:
        """Queries `[N, heads, head_dim]`, and for each its events in `kv` and their ages `[N, K]`: `[N, out_dim]`."""
        bias: Tensor | None = None
        age_bias = self.age_bias
        if age_bias is not None:
            bias = take_found(age_bias, log_bucket(age_s, self.age_buckets)).transpose(1, 2)
        return found_attention(q, kv, event.unsqueeze(1), bias).flatten(1)


def ages_s(time: Tensor, event: Tensor, now: Tensor) -> Tensor:
    """Ages in seconds `[N, K]` of found events, by the milliseconds of events `[T]` and of their requests `[N]`."""
    return (now.unsqueeze(1) - take_found(time, event)) // 1000
