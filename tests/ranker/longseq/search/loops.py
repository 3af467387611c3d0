"""What the literal forms of the search methods share: one head of attention, ages, and what a search finds."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from ranker.longseq import History
from ranker.longseq.heads import Heads
from tests.ranker.histories import EDGES, Shape, normalised, shapes

DIM, HEADS, HEAD_DIM, BUCKETS = 6, 2, 3, 8
SIZES = {"heads": HEADS, "head_dim": HEAD_DIM, "age_buckets": BUCKETS}
small_shape = st.one_of(shapes(longest=15, most_candidates=2), st.sampled_from(list(EDGES.values())[:7]))
"""Batches that loops over events get through."""
caps = st.sampled_from([0, 1, 7, 25])
tops = st.sampled_from([1, 3, 20])


def window_of(batch: Shape, r: int, length: int) -> range:
    """The request's latest events."""
    window = range(batch.start[r], batch.end[r])
    return window[-length:] if length else window


def bucket(history: History, r: int, i: int) -> int:
    """Of the event's age at the request: ⌊log2 seconds⌋ + 1."""
    age_s = max(0, (int(history.now[r]) - int(history.time[i])) // 1000)
    return min(age_s.bit_length(), BUCKETS - 1)


def query(project: Heads, h: int, x: Tensor) -> Tensor:
    """Of one head, normalised."""
    d = project.shape[1]
    return normalised(project.query_norm, project.query.weight[h * d : h * d + d] @ x)


def key(project: Heads, h: int, x: Tensor) -> Tensor:
    """Of one head, normalised."""
    d = project.shape[1]
    return normalised(project.key_norm, project.key.weight[h * d : h * d + d] @ x)


def value(project: Heads, h: int, x: Tensor) -> Tensor:
    """Of one head."""
    d = project.shape[1]
    return project.value.weight[h * d : h * d + d] @ x


def best(scores: list[Tensor], top: int) -> list[int]:
    """Places of the greatest scores, equal ones (to 2^-14) the latest first."""
    steps = [round(float(score.detach().float()) * 2**14) for score in scores]
    return sorted(range(len(scores)), key=lambda i: (steps[i], i), reverse=True)[:top]


def head_attends(project: Heads, h: int, candidate: Tensor, events: list[Tensor], bias: list[Tensor]) -> Tensor:
    """softmax(q · k_i / √d + b_i) v_i; zero without events."""
    q = query(project, h, candidate)
    if not events:
        return torch.zeros_like(q)
    logits = [q @ key(project, h, e) / len(q) ** 0.5 + b for e, b in zip(events, bias, strict=True)]
    weight = torch.softmax(torch.stack(logits), 0)
    return torch.stack([w * value(project, h, e) for w, e in zip(weight, events, strict=True)]).sum(0)


def attends(
    project: Heads, age_bias: Tensor | None, candidate: Tensor, history: History, r: int, found: list[int]
) -> Tensor:
    """All heads to the events `found`, with the bias by age."""
    heads: list[Tensor] = []
    for h in range(HEADS):
        zero = torch.zeros([], dtype=torch.float64)
        bias = [zero if age_bias is None else age_bias[bucket(history, r, i), h] for i in found]
        heads.append(head_attends(project, h, candidate, [history.x[i] for i in found], bias))
    return torch.cat(heads)


def signs(planes: Tensor, x: Tensor) -> list[bool]:
    """On which side of each plane `[d, bits]` a vector is."""
    return [float(planes[:, b] @ x.detach()) >= 0 for b in range(planes.size(1))]


def nearest(planes: Tensor, asked: Tensor, events: list[Tensor], top: int) -> list[int]:
    """Places of the vectors whose hash has the fewest other bits, equal ones the latest first."""
    hashed = signs(planes, asked)
    other = [sum(a != b for a, b in zip(signs(planes, e), hashed, strict=True)) for e in events]
    return sorted(range(len(events)), key=lambda i: (-other[i], i), reverse=True)[:top]
