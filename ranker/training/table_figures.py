"""What is looked up in the tables, and how large their numbers are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch
from ranker.ranks import Ranks
from ranker.tables.managed_collision import managed_of


def lookups(batch: RequestBatch, ranks: Ranks) -> dict[str, float]:
    """Of one batch of each rank, by place and feature: ``lookups/PLACE/FEATURE/known``, the share of ids that are not
    missing or unknown, and ``…/distinct``, the share that is left when each rank counts an id once: the less, the more
    a cache finds."""
    names: list[str] = []
    counts: list[float] = []
    for place in ("request", "candidate", "sequence"):
        keyed: KeyedJaggedTensor = getattr(batch, place)
        ends = keyed.offset_per_key()
        for key, first, end in zip(keyed.keys(), ends, ends[1:], strict=False):
            ids = keyed.values()[first:end]
            names.append(f"{place}/{key.replace(':', '_')}")
            counts += [float(ids.numel()), float((ids != 0).sum()), float(ids.unique().numel())]
    totals = ranks.totals(*counts)
    found: dict[str, float] = {}
    for i, name in enumerate(names):
        read, known, distinct = totals[3 * i : 3 * i + 3]
        if read:
            found |= {f"lookups/{name}/known": known / read, f"lookups/{name}/distinct": distinct / read}
    return found


def managed_rows(model: nn.Module, ranks: Ranks) -> dict[str, float]:
    """Of managed tables, since the last time: ``managed/TABLE/known``, the share of the ids looked up that had a row of
    their own, ``…/unknown``, the number of the others, and ``…/occupied``, the share of rows that ids have by now."""
    tables = managed_of(model)
    if not tables:
        return {}
    totals = ranks.totals(*(n for table in tables for n in (*table.slots.counted(), *table.slots.taken())))
    found: dict[str, float] = {}
    for i, table in enumerate(tables):
        read, missed, taken, rows = totals[4 * i : 4 * i + 4]
        name = f"managed/{table.name}"
        found |= {f"{name}/unknown": missed, f"{name}/occupied": taken / rows}
        if read:
            found[f"{name}/known"] = 1 - missed / read
    return found


def _squares(x: Tensor) -> float:
    """The sum of a table's squares; a norm has no copy of it on the way."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float32)) ** 2 if x.numel() else 0.0


@torch.no_grad()
def norms(model: nn.Module, ranks: Ranks) -> dict[str, float]:
    """The mean Euclidean norm of each table's rows, as the root of their mean square: ``tables/TABLE/norm``. Reads all
    that this rank holds of them."""
    names: list[str] = []
    counts: list[float] = []
    sizes: list[int] = []
    for key, value in model.state_dict().items():
        # managed tables have their ids in sharded tensors too
        if isinstance(value, ShardedTensor) and key.endswith(".weight") and not key.startswith("tables.content."):
            names.append(key.split(".")[-2])
            counts.append(sum(_squares(shard.tensor) for shard in value.local_shards()))
            sizes.append(value.size(0))
    squares = ranks.totals(*counts) if counts else []
    return {
        f"tables/{name}/norm": math.sqrt(square / rows)
        for name, square, rows in zip(names, squares, sizes, strict=True)
    }
