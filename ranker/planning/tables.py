"""A ranker's tables as the planner sees them, found in its TorchRec modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ranker.tables.managed_collision import managed_of

Kind = Literal["pooled", "sequence", "managed"]


@dataclass(frozen=True)
class Table:
    """One table; features: the batch's keys that are looked up in it."""

    name: str
    kind: Kind
    features: tuple[str, ...]
    rows: int
    width: int


def tables_of(model: nn.Module) -> list[Table]:
    """Every table of a model, in the order of its modules."""
    tables: list[Table] = []
    managed = {id(part) for rows in managed_of(model) for part in rows.modules()}
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            kind, configs = "pooled", module.embedding_bag_configs()
        elif isinstance(module, EmbeddingCollection):
            kind, configs = "managed" if id(module) in managed else "sequence", module.embedding_configs()
        else:
            continue
        tables += [Table(c.name, kind, tuple(c.feature_names), c.num_embeddings, c.embedding_dim) for c in configs]
    return tables
