"""What the encoders' references share: one vector at a time, in float64, from the blocks' weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ranker.longseq import History
from ranker.longseq.encoders.outputs import Outputs
from ranker.longseq.encoders.tokens import Tokens
from ranker.longseq.heads import Heads
from tests.ranker.histories import NO_PROBES, Shape, assert_same, differentiable, inputs_of, normalised

DIM, HEADS, WIDTH = 5, 2, 6


def zeros() -> Tensor:
    """Of the width."""
    return torch.zeros(WIDTH, dtype=torch.float64)


def affine(layer: nn.Linear, x: Tensor) -> Tensor:
    """W x + b of one vector."""
    return layer.weight @ x + (0.0 if layer.bias is None else layer.bias)


def feed(layer: Any, x: Tensor) -> Tensor:
    """x + W2 silu(W1 LayerNorm(x) + b1) + b2 of one vector."""
    hidden = affine(layer.up, normalised(layer.norm, x))
    return x + affine(layer.down, hidden / (1 + torch.exp(-hidden)))


def answer(heads: Heads, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Key and value of one vector, head by head."""
    of = [slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS) for h in range(HEADS)]
    return [normalised(heads.key_norm, heads.key.weight[o] @ x) for o in of], [heads.value.weight[o] @ x for o in of]


def attend(heads: Heads, asking: Tensor, answers: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    """softmax(q · k / √d) v of one vector over the answers of others, head by head; zero over none."""
    if not answers:
        return zeros()
    out: list[Tensor] = []
    d = WIDTH // HEADS
    for h in range(HEADS):
        q = normalised(heads.query_norm, heads.query.weight[h * d : (h + 1) * d] @ asking)
        logits = torch.stack([q @ keys[h] / d**0.5 for keys, _ in answers])
        out.append(torch.softmax(logits, 0) @ torch.stack([values[h] for _, values in answers]))
    return torch.cat(out)


def bucket(gap: int, buckets: int) -> int:
    """0, then a bucket for each power of two."""
    return min(max(0, gap).bit_length(), buckets - 1)


def token(tokens: Tokens, x: Tensor, age_s: int = 0) -> Tensor:
    """LayerNorm(W x), and an event's age."""
    found = normalised(tokens.norm, tokens.project.weight @ x)
    return found if tokens.age is None else found + tokens.age[bucket(age_s, tokens.age.size(0))]


def window_of(block: Any, batch: Shape, r: int) -> range:
    """The request's latest events."""
    window = range(batch.start[r], batch.end[r])
    return window[-block.length :] if block.length else window


def events_of(block: Any, batch: Shape, history: History, r: int) -> list[Tensor]:
    """Their tokens."""
    window = window_of(block, batch, r)
    ages = [(int(history.now[r]) - int(history.time[i])) // 1000 for i in window]
    return [token(block.tokens, history.x[i], age) for i, age in zip(window, ages, strict=True)]


def read(block: Any, kept: list[Tensor], candidate: Tensor) -> Tensor:
    """What a candidate finds in a request's outputs."""
    outputs: Outputs = block.outputs
    asking = normalised(block.tokens.norm, block.tokens.project.weight @ candidate)
    kept = [normalised(outputs.norm, x) for x in kept]
    if outputs.project is None:
        return asking * kept[-1] if kept else zeros()
    return attend(outputs.project, asking, [answer(outputs.project, x) for x in kept])


def check(block: Any, encoded: Any, batch: Shape) -> None:
    """Outputs and gradients, in events, candidates and all weights, beside ``encoded(block, batch, history, r)``, the
    literal outputs of one request."""
    history, target, inputs = differentiable(*inputs_of(batch, DIM))
    rows: list[Tensor] = []
    for r in range(batch.requests):
        kept = encoded(block, batch, history, r) if batch.offsets[r] < batch.offsets[r + 1] else []
        rows += [read(block, kept, target.x[n]) for n in range(batch.offsets[r], batch.offsets[r + 1])]
    expected = torch.stack(rows) if rows else torch.zeros(0, WIDTH, dtype=torch.float64)
    assert_same(block(history, NO_PROBES, target), expected, [*inputs, *block.parameters()])
