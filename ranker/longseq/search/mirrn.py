"""MIRRN: three searches with queries of different range, each refined in the frequency domain to one interest.

Xu et al. 2025, "Multi-granularity Interest Retrieval and Refinement Network for Long-Term User Behavior Modeling in CTR
Prediction". The queries are the candidate, the mean of the latest 16 events and the mean of all; each finds K events by
SimHash as ETA does. What was found, in order of time and with embeddings of position, goes through a filter (below),
a residual and a LayerNorm, and is averaged. The candidate attends to the three means. Two of the three do not depend on
the candidate: they are searched, refined and projected once per request, in `encode`.

The filter: y = F⁻¹(F(x) W), with F the Fourier transform over the K positions and W a complex matrix for each block of
channels, shared by all frequencies. The published code reads only the diagonals of W; here channels of a block mix. As
W = A + i B is the same for all frequencies and x is real, y = x A + H x B, where H, K × K, is what multiplying every
frequency by i does to a sequence: no complex numbers, and at K = 50 a third of the time of the FFT there and back.

Left open by the paper, or chosen here: windows with fewer than K events have zeros before them, so that F is over K
positions whatever the batch, and the mean is over what was found; an event's position is the logarithm of how many
events ago it was, which the paper's table of positions cannot be for long histories, and beside it that of its age,
which all our methods know.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.heads import Heads
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.search.found import ages_s
from ranker.ops.found_attention import attend, take_found
from ranker.ops.jagged import log_bucket, segments_of
from ranker.ops.outer_sums import outer_sums
from ranker.ops.simhash import hash_signs
from ranker.ops.topk_windows import topk_windows


class MirrnMemory(NamedTuple):
    """x: `[T, dim]`; code: `[T, bits]` int8, ±1; time: `[T]` and now: `[R]` int64, milliseconds; start, end: `[R]`
    windows into T. kv: `[R, 2, heads, 2 · d_head]` keys and values of the two interests that know no candidate."""

    x: Tensor
    code: Tensor
    time: Tensor
    start: Tensor
    end: Tensor
    now: Tensor
    kv: Tensor


class FrequencyFilter(nn.Module):
    """LayerNorm(x + F⁻¹(F(x) W)) over sequences of `length` positions and blocks of `dim` / `blocks` channels.

    Raises:
        ValueError: `blocks` does not divide `dim`.
    """

    turn: Tensor

    def __init__(self, dim: int, length: int, blocks: int) -> None:
        super().__init__()
        if dim % blocks:
            raise ValueError(f"blocks: {blocks}; must divide the width of an event ({dim})")
        size = dim // blocks
        self.real = nn.Parameter(0.02 * torch.randn(blocks, size, size))  # A
        self.imaginary = nn.Parameter(0.02 * torch.randn(blocks, size, size))  # B
        self.norm = nn.LayerNorm(dim)
        frequencies = torch.fft.rfft(torch.eye(length, dtype=torch.float64), dim=0)
        self.register_buffer("turn", torch.fft.irfft(1j * frequencies, n=length, dim=0))  # H

    def forward(self, x: Tensor) -> Tensor:
        """`[n, K, dim]` in and out."""
        a, b = _block_diagonal(self.real), _block_diagonal(self.imaginary)
        return self.norm(x + torch.matmul(x, a) + torch.matmul(self.turn.to(x.dtype), torch.matmul(x, b)))


def _block_diagonal(matrices: Tensor) -> Tensor:
    """`[blocks, c, c]` to `[blocks · c, blocks · c]`: one product, instead of many small ones."""
    one = torch.eye(matrices.size(0), dtype=matrices.dtype, device=matrices.device)
    return torch.einsum("ab,bij->aibj", one, matrices).flatten(2).flatten(0, 1)


class MIRRN(nn.Module):
    """Three searches in the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        top: K, events that each search finds at most.
        bits: of a hash.
        recent: events whose mean is the second query.
        blocks: of channels, each mixed by a matrix of its own.
        heads, head_dim: width of the attention to the three interests is their product.
        age_buckets: buckets of log2(age in seconds) for the embedding of an event's age; 0 turns it off.
    """

    planes: Tensor

    def __init__(
        self,
        dim: int,
        top: int = 50,
        bits: int = 32,
        recent: int = 16,
        blocks: int = 4,
        heads: int = 2,
        head_dim: int = 16,
        length: int = 0,
        age_buckets: int = 32,
    ) -> None:
        super().__init__()
        self.out_dim = heads * head_dim
        self.top, self.recent, self.length, self.age_buckets = top, recent, length, age_buckets
        self.register_buffer("planes", torch.randn(dim, bits))
        self.position = nn.Parameter(torch.zeros(32, dim))
        self.age = nn.Parameter(torch.zeros(age_buckets, dim)) if age_buckets > 0 else None
        self.of_target = FrequencyFilter(dim, top, blocks)
        self.of_recent = FrequencyFilter(dim, top, blocks)
        self.of_all = FrequencyFilter(dim, top, blocks)
        self.project = Heads(dim, heads, head_dim)

    def encode(self, history: History, probes: Probes) -> MirrnMemory:
        """Hash the events once per distinct history; search and refine for the two queries that know no candidate."""
        history = latest(history, self.length)
        x, start, end, now = history.x, history.start, history.end, history.now
        code = hash_signs(x, self.planes)
        latest_few = torch.maximum(start, end - self.recent)
        first = torch.stack([latest_few, start], 1).flatten()
        # the sums of events, whose hashes are those of their means
        queries = outer_sums(x.detach(), torch.ones_like(x[:, :1]), first, end.repeat_interleave(2)).squeeze(2)
        offsets = 2 * torch.arange(start.numel() + 1, device=x.device)
        event = self._search(queries, offsets, code, start, end).view(-1, 2, self.top)
        of_recent, of_all = event[:, 0], event[:, 1]
        recent = self.of_recent(self._sequence(x, of_recent, history.time, end, now))
        whole = self.of_all(self._sequence(x, of_all, history.time, end, now))
        interests = torch.stack([_mean(recent, of_recent), _mean(whole, of_all)], 1)
        return MirrnMemory(x, code, history.time, start, end, now, self._keys_values(interests))

    def read(self, memory: MirrnMemory, target: Target) -> Tensor:
        """The candidate's own search, and its attention to all three interests: `[N, heads · d_head]`."""
        request = segments_of(target.offsets)
        end, now = memory.end.index_select(0, request), memory.now.index_select(0, request)
        event = self._search(target.x, target.offsets, memory.code, memory.start, memory.end)
        own = _mean(self.of_target(self._sequence(memory.x, event, memory.time, end, now)), event).unsqueeze(1)
        kv = torch.cat([self._keys_values(own), memory.kv.index_select(0, request)], 1)
        seen = (event[:, -1:] >= 0).unsqueeze(1).expand(-1, -1, 3)  # a window has events for all three or for none
        return attend(self.project.queries(target.x), kv.transpose(1, 2), seen).flatten(1)

    def auxiliary(self, history: History, memory: MirrnMemory) -> Tensor:
        """None of its own."""
        return history.x.new_zeros([])

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    def _search(self, x: Tensor, offsets: Tensor, code: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """The events `[n, K]` nearest in Hamming distance to queries `[n, dim]`, in order of time, −1 before them."""
        asked = hash_signs(x, self.planes).to(x.dtype).unsqueeze(1)
        return torch.sort(topk_windows(asked, offsets, code.unsqueeze(1), start, end, self.top).squeeze(1))[0]

    def _sequence(self, x: Tensor, event: Tensor, time: Tensor, end: Tensor, now: Tensor) -> Tensor:
        """Found events with their positions `[n, K, dim]`, zero where none was found."""
        ago = log_bucket(end.unsqueeze(1) - event, 32)
        found = take_found(x, event) + take_found(self.position, ago)
        age = self.age
        if age is not None:
            found = found + take_found(age, log_bucket(ages_s(time, event, now), self.age_buckets))
        return found.masked_fill((event < 0).unsqueeze(2), 0.0)

    def _keys_values(self, interests: Tensor) -> Tensor:
        """`[n, s, dim]` to `[n, s, heads, 2 · d_head]`."""
        k, v = self.project.keys_values(interests.flatten(0, 1))
        return torch.cat([k, v], 2).view(interests.size(0), interests.size(1), k.size(1), 2 * k.size(2))


def _mean(refined: Tensor, event: Tensor) -> Tensor:
    """Mean of the found ones of refined sequences `[n, K, dim]`: `[n, dim]`, zero where none was found."""
    found = event >= 0
    count = found.sum(1, keepdim=True).clamp(min=1)
    return refined.masked_fill(~found.unsqueeze(2), 0.0).sum(1) / count
