"""UxSID: one memory per user and semantic group. A candidate's semantic ID, not the candidate, probes the history.

Zhang et al. 2026, "UxSID: Semantic-Aware User Interests Modeling for Ultra-Long Sequence". K learned anchors compress
the history into interests P; each distinct (request, semantic ID) attends once to the raw history (`e_global`) and,
gated by what it found, once to P (`e_local`). The two rows are the memory. A candidate attends to the two rows of its
group, at a cost free of the history's length. Numbers in comments are the paper's equations.

A probe must find the events of its own group, and from maps drawn apart and small embeddings it learns that late or
never (generated data: Int.R@10 below chance after three epochs). So W^Q and W^K start as the identity, a group's
embedding is mapped to width d as the same embedding within an event is, and both end in a LayerNorm: from the start
every logit is the likeness of two groups, and large enough to single out a few events of thousands.

All that attends to the history does so in one pass. With a single head, (q W^Q)(E W^K)ᵀ = (q W^Q W^Kᵀ) Eᵀ and
softmax(·)(E W^V) = (softmax(·) E) W^V: queries are moved into the events' space and what they find out of it, so that
anchors and probes share E as keys and values, and an event is projected once, to width d.

Left open by the paper and chosen here: events and groups are normalised; time enters as a bias on the logits of (3) and
(6), learned per logarithm of an event's age and shared by all queries, not as a part of E; GatedNet's activation is
ReLU; anchors share the LayerNorm's weights; without `e_global` there is no gate; a request without events has zero
rows, as a key missing from a store would; keys, values and query of the read are projected.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ranker.longseq.protocol import History, Probes, Target, latest
from ranker.longseq.stored import Stored, restore_rows, store_rows
from ranker.ops.attention import window_attention
from ranker.ops.jagged import expand_windows, log_bucket


class UxSIDMemory(NamedTuple):
    """rows: `[Q, 2, d]`, e_global and e_local of each probe (`[Q, 1, d]` where one is ablated): what a store keeps.
    interests: P `[R, K, d]` in training, for the block's own loss; else empty."""

    rows: Tensor
    interests: Tensor


class HistoryAttention(NamedTuple):
    """What attends to one request's L latest events. anchors: `[K, L]`; probes: `[q, L]`; each row sums to 1."""

    anchors: Tensor
    probes: Tensor


class SingleHead(nn.Module):
    """W^Q, W^K and W^V of one head, for attention to unprojected tokens: `forward` comes before it, `value` after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)
        nn.init.orthogonal_(self.value.weight)

    def forward(self, q: Tensor) -> Tensor:
        """q W^Q W^Kᵀ `[..., d]`: its products with unprojected tokens are the logits."""
        return self.query(q) @ self.key.weight


class UxSID(nn.Module):
    """Semantic-specific probing of the latest `length` events (0: all).

    Args:
        dim, probe_dim: widths of events and candidates, and of the probes' embeddings.
        probe_start: where the embedding of an event's own group begins in the event; −1: it is no part of it.
        width: d, of everything inside and of the output.
        anchors: K, at most d, or no P could be orthogonal.
        anchor_hidden, gate_hidden: hidden widths of the anchors' feed-forward nets and of GatedNet.
        heads: of the candidate's attention to the two rows.
        age_buckets: buckets of log2(age in seconds) for the learned bias; 0 turns it off.
        ortho_weight: λ, of the orthogonality loss; 0 turns it off.
        ortho: how P is normalised in it, see :func:`orthogonality`.
        global_probe, local_probe, gate: False ablates e_global, e_local, or the gate.
    """

    def __init__(
        self,
        dim: int,
        probe_dim: int,
        width: int = 32,
        anchors: int = 16,
        anchor_hidden: int = 32,
        gate_hidden: int = 32,
        heads: int = 2,
        length: int = 0,
        age_buckets: int = 32,
        ortho_weight: float = 0.1,
        ortho: Literal["frobenius", "row"] = "frobenius",
        global_probe: bool = True,
        local_probe: bool = True,
        gate: bool = True,
        probe_start: int = -1,
    ) -> None:
        super().__init__()
        if not (global_probe or local_probe):
            raise ValueError("global_probe and local_probe are both off: nothing would be left to read; turn one on")
        if local_probe and not 1 <= anchors <= width:
            raise ValueError(f"anchors: {anchors}; must be at least 1 and at most width ({width}): raise width")
        if width % heads:
            raise ValueError(f"heads: {heads}; must divide width ({width})")
        if ortho not in ("frobenius", "row"):
            raise ValueError(f"ortho: {ortho!r}; must be 'frobenius' or 'row'")
        self.out_dim = width
        self.width, self.heads, self.length, self.age_buckets = width, heads, length, age_buckets
        self.ortho_weight, self.by_row = ortho_weight, ortho == "row"
        self.anchors = anchors if local_probe else 0
        self.rows = int(global_probe) + int(local_probe)
        event, group = nn.Linear(dim, width, bias=False), nn.Linear(probe_dim, width, bias=False)
        _start_alike(event.weight, group.weight, probe_start)
        self.event = nn.Sequential(event, nn.LayerNorm(width))
        self.group = nn.Sequential(group, nn.LayerNorm(width))
        self.age_bias = nn.Parameter(torch.zeros(age_buckets, 1)) if age_buckets > 0 else None
        self.compress = Compress(width, anchors, anchor_hidden) if local_probe else None
        self.global_head = SingleHead(width) if global_probe else None
        self.local_head = SingleHead(width) if local_probe else None
        gated = gate and global_probe and local_probe
        self.gate = (
            nn.Sequential(nn.Linear(width, gate_hidden), nn.ReLU(), nn.Linear(gate_hidden, width), nn.Sigmoid())
            if gated
            else None
        )
        self.read_query = nn.Linear(dim, width, bias=False)
        self.read_key = nn.Linear(width, width, bias=False)
        self.read_value = nn.Linear(width, width, bias=False)
        for read in (self.read_query, self.read_key, self.read_value):
            nn.init.orthogonal_(read.weight)

    def encode(self, history: History, probes: Probes) -> UxSIDMemory:
        """One pass over the history for all anchors and probes of a request."""
        history = latest(history, self.length)
        c, of_request = self.group(probes.x), offsets_in(probes.request, history.start.numel())
        q, offsets, of_anchor, of_probe = self._questions(c, of_request, probes.request)
        e = self.event(history.x).unsqueeze(1)
        bias = self._bias(history)
        pooled = window_attention(q.unsqueeze(1), offsets, e, e, history.start, history.end, bias).squeeze(1)

        kept = torch.zeros([0, self.anchors, self.width], dtype=c.dtype, device=c.device)
        rows: list[Tensor] = []
        q_ref = c
        if self.global_head is not None:
            e_global = self.global_head.value(pooled.index_select(0, of_probe))  # (6)
            rows.append(e_global)
            if self.gate is not None:
                q_ref = c * self.gate(e_global)  # (7), (8)
        if self.compress is not None and self.local_head is not None:
            interests = self.compress(pooled.index_select(0, of_anchor).view(-1, self.anchors, self.width))
            p = interests.view(-1, 1, self.width)
            start = self.anchors * torch.arange(history.start.numel(), device=c.device)
            end = torch.where(history.end > history.start, start + self.anchors, start)  # no events: no interests
            q = self.local_head(q_ref).unsqueeze(1)
            rows.append(self.local_head.value(window_attention(q, of_request, p, p, start, end).squeeze(1)))  # (9)
            if self.training and self.ortho_weight > 0:
                kept = interests
        return UxSIDMemory(torch.stack(rows, 1), kept)

    def read(self, memory: UxSIDMemory, target: Target) -> Tensor:
        """Each candidate attends to the rows of its probe, projected once per probe: `[N, d]`."""
        q = self.read_query(target.x).unflatten(1, [self.heads, -1])
        k = self.read_key(memory.rows).index_select(0, target.probe).unflatten(2, [self.heads, -1])
        v = self.read_value(memory.rows).index_select(0, target.probe).unflatten(2, [self.heads, -1])
        # two rows: products and sums cost less than batched matrix products
        weight = torch.softmax((q.unsqueeze(1) * k).sum(3) / math.sqrt(q.size(2)), 1)  # [N, 2, h]
        return (weight.unsqueeze(3) * v).sum(1).flatten(1)

    @torch.jit.export
    def store(self, memory: UxSIDMemory) -> Stored:
        """The rows of each probe: 2 · d values."""
        return store_rows(memory.rows)

    @torch.jit.export
    def restore(self, stored: Stored, now: Tensor) -> UxSIDMemory:
        """A lost probe has zero rows, as one of a request without events."""
        rows = restore_rows(stored.values, stored.lengths[:, 0], [self.rows, self.width])
        return UxSIDMemory(rows, rows[:0])

    def auxiliary(self, history: History, memory: UxSIDMemory) -> Tensor:
        """λ times the mean of :func:`orthogonality` over requests with events; zero where `encode` kept no P."""
        if memory.interests.size(0) == 0:
            return history.x.new_zeros([])
        seen = history.end > history.start
        loss = orthogonality(memory.interests[seen], self.by_row)
        return self.ortho_weight * loss.sum() / max(loss.numel(), 1)

    def forward(self, history: History, probes: Probes, target: Target) -> Tensor:
        """`encode` and `read` in one: `[N, out_dim]`."""
        return self.read(self.encode(history, probes), target)

    def attention(self, history: History, probes: Probes) -> list[HistoryAttention]:
        """The weights of (3) and (6) of each request over its latest events: for pictures and `interest_recall`."""
        history = latest(history, self.length)
        of_request = offsets_in(probes.request, history.start.numel())
        q, offsets, _, _ = self._questions(self.group(probes.x), of_request, probes.request)
        e, bias = self.event(history.x), self._bias(history)
        weights: list[HistoryAttention] = []
        first_pair = 0
        for r, (start, end) in enumerate(zip(history.start.tolist(), history.end.tolist(), strict=True)):
            logits = q[offsets[r] : offsets[r + 1]] @ e[start:end].t() / math.sqrt(self.width)
            if bias is not None:
                logits = logits + bias[first_pair : first_pair + end - start, 0]
            weight = torch.softmax(logits, 1)
            weights.append(HistoryAttention(weight[: self.anchors], weight[self.anchors :]))
            first_pair += end - start
        return weights

    def _questions(self, c: Tensor, of_request: Tensor, request: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What attends to the histories: K anchors of each request, followed by its probes.

        Args:
            c: `[Q, d]`; of_request: `[R + 1]` offsets of the requests in them; request: `[Q]`.

        Returns:
            queries `[R · K + Q, d]` in the events' space; offsets `[R + 1]` of the requests in them; the rows of the
            anchors `[R · K]` and of the probes `[Q]`. Without e_local K is 0, without e_global Q.
        """
        requests = of_request.numel() - 1
        asked, of_probe = c[:0], request[:0]
        offsets = self.anchors * torch.arange(requests + 1, device=c.device)
        if self.global_head is not None:
            asked = self.global_head(c)
            of_probe = torch.arange(c.size(0), device=c.device) + self.anchors * (request + 1)
            offsets = offsets + of_request
        of_anchor = (offsets[:-1].unsqueeze(1) + torch.arange(self.anchors, device=c.device)).flatten()
        if self.compress is not None:
            asked = torch.cat([self.compress.head(self.compress.anchors).repeat(requests, 1), asked])
        place = torch.cat([of_anchor, of_probe])
        return torch.zeros_like(asked).index_copy(0, place, asked), offsets, of_anchor, of_probe

    def _bias(self, history: History) -> Tensor | None:
        """The bias of every pair (request, event): `[P, 1]`."""
        age_bias = self.age_bias
        if age_bias is None:
            return None
        event, request = expand_windows(history.start, history.end)
        age_s = (history.now[request] - history.time[event]) // 1000
        return age_bias[log_bucket(age_s, self.age_buckets)]


def _start_alike(event: Tensor, group: Tensor, start: int) -> None:
    """Map groups `[d, dp]` by a semi-orthogonal matrix, as they are mapped within events `[d, dim]` from `start` on."""
    nn.init.orthogonal_(group)
    if start >= 0:
        with torch.no_grad():
            event[:, start : start + group.size(1)] = group


def offsets_in(request: Tensor, requests: int) -> Tensor:
    """Offsets `[R + 1]` of the requests in their probes, given each probe's request `[Q]`, ascending."""
    return torch.searchsorted(request, torch.arange(requests + 1, device=request.device))


class Compress(nn.Module):
    """Item-agnostic interest compression: learned anchors, and a feed-forward net of each one's own."""

    def __init__(self, width: int, anchors: int, hidden: int) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.randn(anchors, width))
        self.head = SingleHead(width)
        self.w1 = nn.Parameter(torch.empty(anchors, width, hidden).uniform_(-1, 1) / math.sqrt(width))
        self.b1 = nn.Parameter(torch.zeros(anchors, hidden))
        self.w2 = nn.Parameter(torch.zeros(anchors, hidden, width))  # else its mean drowns h, and all users look alike
        self.b2 = nn.Parameter(torch.zeros(anchors, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, pooled: Tensor) -> Tensor:
        """P `[R, K, d]` of what the anchors' attention gathered `[R, K, d]`."""
        h = self.head.value(pooled)  # (3)
        hidden = torch.sigmoid(_of_anchors(h, self.w1) + self.b1)
        return self.norm(h + _of_anchors(hidden, self.w2) + self.b2)  # (4)


def _of_anchors(x: Tensor, w: Tensor) -> Tensor:
    """Each anchor's own map: `[R, K, a]` by `[K, a, b]` to `[R, K, b]`; einsum would ask whether R is 1."""
    return torch.bmm(x.transpose(0, 1), w).transpose(0, 1)


def orthogonality(p: Tensor, by_row: bool) -> Tensor:
    """How far the K interests of each request are from orthogonal, at least 0: `[R]` of P `[R, K, d]`. (5)

    ‖P Pᵀ / ‖P‖² − I‖ in Frobenius norms, less √K (1 − 1/K): its least value, which orthogonal rows of equal norm have.
    `by_row` divides each row by its own norm instead, and nothing is subtracted: norms do not count.
    """
    k = p.size(1)
    floor = 0.0 if by_row else math.sqrt(k) * (1 - 1 / k)
    p = p / torch.linalg.vector_norm(p, dim=[2] if by_row else [1, 2], keepdim=True).clamp(min=1e-12)
    gram = torch.einsum("rkd,rld->rkl", p, p)
    return torch.linalg.vector_norm(gram - torch.eye(k, dtype=p.dtype, device=p.device), dim=[1, 2]) - floor


def interest_recall(attention: list[Tensor], event_code: list[Tensor], probe_code: list[Tensor], k: int) -> Tensor:
    """Share of the k events with most attention that have their probe's code; the mean is Int.R@k.

    Args:
        attention: of each request `[q, L]`, the weights of its probes over its events, oldest first.
        event_code: of each request `[L]` int64, 0 for events without a code.
        probe_code: of each request `[q]` int64.
        k: capped at L. Of equal weights the most recent event counts.

    Returns:
        A share for each probe that has a code and a history, in order: float64.
    """
    shares: list[Tensor] = [torch.zeros(0, dtype=torch.float64)]
    for weight, events, probes in zip(attention, event_code, probe_code, strict=True):
        if events.numel() > 0:
            top = weight.flip(1).argsort(dim=1, descending=True, stable=True)[:, :k]
            same = events.flip(0)[top] == probes.unsqueeze(1)
            shares.append(same.double().mean(1)[probes != 0].cpu())
    return torch.cat(shares)
