"""What the references of the group methods share, in loops over single vectors; and a small block of every method."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ranker.longseq import History
from ranker.longseq.groups import LSH, SDIM, VQL, Aggregator, CFormer, KMeans, Patching, PolyEncoder
from ranker.longseq.heads import Heads
from tests.ranker.histories import Shape, normalised, randomise

DIM = 5
Block = SDIM | VQL | CFormer | KMeans | LSH | Patching | Aggregator | PolyEncoder
SMALL: dict[type[Any], dict[str, Any]] = {
    SDIM: {"hashes": 3, "bits": 2, "age_buckets": 8},
    VQL: {"codes": 4, "head_dim": 3, "periods_s": [3600.0, 86400.0], "commitment": 0.25},
    CFormer: {"queries": 3, "width": 4, "head_dim": 3, "age_buckets": 8, "reconstructed": 5},
    KMeans: {"clusters": 4, "head_dim": 3, "age_buckets": 8},
    LSH: {"bits": 2, "head_dim": 3, "age_buckets": 8},
    Patching: {"patches": 4, "head_dim": 3, "age_buckets": 8},
    Aggregator: {"queries": 3, "width": 4, "head_dim": 3, "age_buckets": 8},
    PolyEncoder: {"codes": 3, "width": 4, "age_buckets": 8},
}
METHODS = {method.__name__: method for method in SMALL}


def block_of(method: type[Any], **options: Any) -> Any:
    """A small block with random float64 weights."""
    block = method(DIM, **{**SMALL[method], **options})
    randomise(block)
    return block


def window_of(batch: Shape, r: int, length: int) -> list[int]:
    """The latest events of request r."""
    window = list(range(batch.start[r], batch.end[r]))
    return window[-length:] if length else window


def age_bias(bias: Tensor | None, history: History, r: int, i: int) -> Tensor:
    """What is learned of the age of event i at request r."""
    if bias is None:
        return torch.zeros((), dtype=torch.float64)
    age_s = max(0, (int(history.now[r]) - int(history.time[i])) // 1000)
    return bias[min(age_s.bit_length(), len(bias) - 1), 0]


def projected(layers: nn.Module, x: Tensor) -> Tensor:
    """An event or a candidate through a linear map and a LayerNorm."""
    assert isinstance(layers, nn.Sequential)
    linear, norm = layers
    assert isinstance(linear, nn.Linear)
    return normalised(norm, linear.weight @ x)


def attended(project: Heads, candidate: Tensor, means: list[Tensor], sizes: list[Tensor]) -> Tensor:
    """Multi-head attention of a candidate to group means, with the logarithm of their sizes; zero where none is."""
    heads, d = project.shape
    out: list[Tensor] = []
    for h in range(heads):
        of = slice(h * d, (h + 1) * d)
        q = normalised(project.query_norm, project.query.weight[of] @ candidate)
        logits = [
            q @ normalised(project.key_norm, project.key.weight[of] @ mean) / d**0.5 + size.log()
            for mean, size in zip(means, sizes, strict=True)
        ]
        values = [project.value.weight[of] @ mean for mean in means]
        out.append(torch.softmax(torch.stack(logits), 0) @ torch.stack(values) if means else candidate.new_zeros(d))
    return torch.cat(out)


def gathered(question: Tensor, e: list[Tensor], bias: list[Tensor], values: list[Tensor]) -> Tensor:
    """softmax(question · e / √d + bias) over the events, of their values."""
    logits = [question @ e_i / len(question) ** 0.5 + b for e_i, b in zip(e, bias, strict=True)]
    return torch.softmax(torch.stack(logits), 0) @ torch.stack(values)
