"""VQL: target attention whose keys are quantised and whose values are exact (Li et al. 2025, "VQL: An End-to-End
Context-Aware Vector Quantization Attention for Ultra-Long User Behavior Modeling", arXiv:2508.17125).

Each head has its own codebook c_1 … c_M, and key k_i is replaced by its nearest code z_i. All events of one code then
have one logit, and softmax attention over L events needs no more of them than two sums a code (*caches*):

    N_m = Σ_{z_i = m} w_i,  U_m = Σ_{z_i = m} w_i v_i,  o = Σ_m e^{q·c_m/√d} U_m / Σ_m e^{q·c_m/√d} N_m.

Time enters by a separable kernel w_i = κ(t_now − t_i) = Σ_r f_r(t_now) g_r(t_i), with a cache for each r: here
exponentials of fixed periods and one that does not decay, mixed by learned shares that are not negative and sum to 1.
g_r counts from the history's last event and f_r from there to the request, so that none exceeds 1: nothing overflows,
and a memory made earlier is brought to a later time by :meth:`VQL.at_time`, without its history. With ε the greatest
error of a logit, ‖a − â‖₁ ≤ 2 tanh(ε/2) of the attention weights, for every L.

Loss: λ(‖sg(k) − c‖² + μ‖k − sg(c)‖²), the mean over a history's events and the heads, then over requests with events.

Chosen here: codes take the gradient of the equations, from the task and from the first term. Keys take that of the
second term and, with `straight_through`, their code's gradient in their own request, each the share w_i / N_m of it:
what a quantiser that passes gradients straight through gives in the dense form, but for the values, which count as
equal within a code. Without it no task reaches the keys. Queries and keys are normalised
(:mod:`ranker.longseq.heads`), and codes start at random on the sphere where the keys are. μ is 0 unless set: on
generated logs (300 items, λ = 0.1) μ = 0.25 drew all keys to 5 of 32 codes; with 0 the heads used 18 and 23 of them. A
code that is nearest to no event has no part and no gradient, and nothing revives it; :meth:`VQL.used` tells how many
are used.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from ranker.longseq.heads import Heads
from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored, restore_rows, store_rows
from ranker.ops.group_attention import group_attention, log_size
from ranker.ops.groups import group_sums
from ranker.ops.jagged import expand_windows, segment_sum, window_mean

PERIODS_S = (86400.0, 7 * 86400.0, 30 * 86400.0)


class VQLMemory(NamedTuple):
    """Caches as of the history's last event, and the time at which they are read.

    n: `[R, heads, M, C]`; u: `[R, heads, M, C, d_head]`; last, now: `[R]` int64, milliseconds.
    In training, else empty: error `[R]`, the requests' quantisation losses; through `[R, heads, M, d_head]`, zeros that
    pass gradients to the keys.
    """

    n: Tensor
    u: Tensor
    last: Tensor
    now: Tensor
    error: Tensor
    through: Tensor


class VQL(nn.Module):
    """Attention with quantised keys to the latest `length` events (0: all).

    Args:
        dim: width of events and candidates.
        codes: M, of each head's codebook.
        heads, head_dim: attention width is their product.
        periods_s: in which each kernel falls to 1/e, seconds; one that does not decay is added: C = their number + 1.
        codebook_weight: λ; 0 turns the loss off, and the keys stay as they start.
        commitment: μ; above 0, watch :meth:`used`: keys may collapse.
        straight_through: keys learn from the task.
    """

    rate: Tensor

    def __init__(
        self,
        dim: int,
        codes: int = 32,
        heads: int = 2,
        head_dim: int = 16,
        periods_s: tuple[float, ...] | list[float] = PERIODS_S,
        codebook_weight: float = 0.1,
        commitment: float = 0.0,
        straight_through: bool = True,
        length: int = 0,
    ) -> None:
        super().__init__()
        if codes < 1:
            raise ValueError(f"codes: {codes}; must be at least 1")
        if any(period <= 0 for period in periods_s):
            raise ValueError(f"periods_s: {list(periods_s)}; must be positive, in seconds")
        self.out_dim = heads * head_dim
        self.codes, self.heads, self.head_dim, self.length = codes, heads, head_dim, length
        self.codebook_weight, self.commitment = codebook_weight, commitment
        self.straight_through = straight_through
        self.project = Heads(dim, heads, head_dim)
        self.codebook = nn.Parameter(layer_norm(torch.randn(heads, codes, head_dim), [head_dim]))
        self.register_buffer("rate", torch.tensor([1 / (1000 * period) for period in periods_s] + [0.0]))  # per ms
        self.caches = len(periods_s) + 1
        self.mix = nn.Parameter(torch.zeros(heads, self.caches))

    def memory_bytes(self, number_bytes: int = 4) -> int:
        """What a store keeps of a request: no L in it."""
        return number_bytes * self.heads * self.codes * self.caches * (1 + self.head_dim) + 2 * 8

    def encode(self, history: History, probes: Probes) -> VQLMemory:
        """O(Σ L · M); keys, values and codes once per distinct event."""
        history = latest(history, self.length)
        start, end, requests = history.start, history.end, history.start.numel()
        k, v = self.project.keys_values(history.x)
        code = self.nearest(k)
        event, request = expand_windows(start, end)
        last = torch.where(end > start, pad(history.time, [1, 0]).index_select(0, end), history.now)
        gap_ms = (last.index_select(0, request) - history.time.index_select(0, event)).clamp(min=0)
        g = torch.exp(-gap_ms.to(v.dtype).unsqueeze(1) * self.rate.to(v.dtype))  # [P, C]
        error, through = v[:0, 0, 0], v[:0].unsqueeze(2)
        if self.training and self.codebook_weight > 0:
            error = window_mean(self._error(k, code), start, end).squeeze(1)
        if self.training and self.straight_through:
            mean = self._mean_keys(k, code, g, last, history)
            through = mean - mean.detach()
        n: list[Tensor] = []
        u: list[Tensor] = []
        for head in range(self.heads):
            group = code[:, head].index_select(0, event)
            count = segment_sum(g, request * self.codes + group, requests * self.codes)
            n.append(count.view(requests, self.codes, self.caches))
            u.append(group_sums(v[:, head], group.unsqueeze(1), g, start, end, self.codes).squeeze(1))
        return VQLMemory(torch.stack(n, 1), torch.stack(u, 1), last, history.now, error, through)

    def read(self, memory: VQLMemory, target: Target) -> Tensor:
        """Attention to M codes, whatever L was: `[N, heads · d_head]`; zero without events."""
        q = self.project.queries(target.x)
        f = self._shares(memory.last, memory.now)
        n = torch.einsum("rhmc,rhc->rmh", memory.n, f)
        u = torch.einsum("rhmcd,rhc->rmhd", memory.u, f)
        codes = self.codebook.expand(n.size(0), -1, -1, -1)
        if self.training and self.straight_through:
            codes = codes + memory.through
        return group_attention(
            q, target.offsets, codes.transpose(1, 2), u / n.clamp(min=1e-30).unsqueeze(3), log_size(n)
        )

    @torch.jit.export
    def store(self, memory: VQLMemory) -> Stored:
        """U, code by code, is heads · M · C · d_head values; N, which U is divided by, is exact; `last` is the time."""
        return store_rows(memory.u, memory.n, memory.last)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> VQLMemory:
        """Caches as of `now` `[R]`, as :meth:`at_time`'s. Those of a lost record have no events."""
        few, shape = stored.lengths[:, 1], [self.heads, self.codes, self.caches]
        n = restore_rows(stored.exact, few, shape)
        u = restore_rows(stored.values, stored.lengths[:, 0], [shape[0], shape[1], shape[2], self.head_dim])
        last = torch.where(few > 0, stored.time, now)
        return VQLMemory(n, u, last, now, n[:0, 0, 0, 0], u[:0, :, :, 0])

    def auxiliary(self, history: History, memory: VQLMemory) -> Tensor:
        """λ times the mean quantisation loss of requests with events, in training."""
        if not self.training or self.codebook_weight == 0:
            return history.x.new_zeros([])
        error = memory.error[history.end > history.start]
        return self.codebook_weight * error.sum() / max(error.numel(), 1)

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    @torch.jit.export
    def at_time(self, memory: VQLMemory, now: Tensor) -> VQLMemory:
        """The same events as they weigh at a later time `[R]`, milliseconds: nothing is encoded again."""
        return VQLMemory(memory.n, memory.u, memory.last, now, memory.error, memory.through)

    @torch.jit.export
    def used(self, history: History) -> Tensor:
        """The share of each head's codes that are nearest to some event of some request: `[heads]`."""
        history = latest(history, self.length)
        event, _ = expand_windows(history.start, history.end)
        code = self.nearest(self.project.keys_values(history.x)[0]).index_select(0, event)
        seen = torch.zeros([self.heads, self.codes], device=history.x.device)
        return seen.scatter(1, code.t(), 1.0).mean(1)

    def nearest(self, k: Tensor) -> Tensor:
        """The nearest code `[T, heads]` of keys `[T, heads, d_head]`. No gradients."""
        k, c = k.detach(), self.codebook.detach()
        alike: list[Tensor] = []  # head by head: of a batched product, compilers would ask whether T is 1
        for head in range(self.heads):
            alike.append(k[:, head] @ c[head].t())
        return (c.square().sum(2) - 2 * torch.stack(alike, 1)).argmin(2)

    def _shares(self, last: Tensor, now: Tensor) -> Tensor:
        """f_r, times the kernels' shares in the mixture: `[R, heads, C]`."""
        since_ms = (now - last).clamp(min=0).to(self.mix.dtype)
        return torch.exp(-since_ms.unsqueeze(1) * self.rate).unsqueeze(1) * torch.softmax(self.mix, 1)

    def _mean_keys(self, k: Tensor, code: Tensor, g: Tensor, last: Tensor, history: History) -> Tensor:
        """Σ w_i k_i / Σ w_i of each request's events of each code: `[R, heads, M, d_head]`; no gradient in the w_i."""
        event, request = expand_windows(history.start, history.end)
        f = self._shares(last, history.now).detach()
        mean: list[Tensor] = []
        for head in range(self.heads):
            group = code[:, head].index_select(0, event)
            w = (g * f[:, head].index_select(0, request)).sum(1, keepdim=True)
            total = segment_sum(w, request * self.codes + group, last.numel() * self.codes)
            summed = group_sums(k[:, head], group.unsqueeze(1), w, history.start, history.end, self.codes)
            mean.append(summed.view(-1, self.head_dim) / total.clamp(min=1e-30))
        return torch.stack(mean, 1).view(last.numel(), self.codes, self.heads, self.head_dim).transpose(1, 2)

    def _error(self, k: Tensor, code: Tensor) -> Tensor:
        """‖sg(k) − c‖² + μ‖k − sg(c)‖², the mean over heads: `[T, 1]`."""
        row = code + self.codes * torch.arange(self.heads, device=k.device)
        c = self.codebook.flatten(0, 1).index_select(0, row.flatten()).view_as(k)
        of_codes, of_keys = (k.detach() - c).square().sum(2), (k - c.detach()).square().sum(2)
        return (of_codes + self.commitment * of_keys).mean(1, keepdim=True)
