"""What TorchRec's planner expects of a placement, by table and by rank: memory, and the parts of a step's time.

Times are of tables alone, from the cluster's bandwidths: a model to compare placements by, not a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil

import torch
from torchrec.distributed.planner.constants import UVM_CACHING_RATIO
from torchrec.distributed.planner.types import Perf, Shard, ShardingOption
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from ranker.planning.placement import Placement


@dataclass(frozen=True)
class TableEstimate:
    """A table's shards together, in bytes; ranks: of each shard, in their order."""

    name: str
    rows: int
    width: int
    weights_bytes: int
    optimizer_bytes: int
    sharding: str
    kernel: str
    ranks: list[int]


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step. `ids_ms`, in which ids go to their shards, overlaps with the batch before in a pipelined
    step, and TorchRec leaves it out of what it judges by; so does `total_ms`."""

    forward_compute_ms: float
    forward_communication_ms: float
    backward_compute_ms: float
    backward_communication_ms: float
    prefetch_ms: float
    ids_ms: float

    @property
    def total_ms(self) -> float:
        """All but `ids_ms`."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "ids_ms")


@dataclass(frozen=True)
class RankEstimate:
    """A rank's memory in bytes: its own, and of its host's what offloaded tables take. step_bytes: ids and vectors of a
    step on their way, and the bookkeeping of caches."""

    rank: int
    tables_bytes: int
    optimizer_bytes: int
    step_bytes: int
    dense_bytes: int
    ids_bytes: int
    reserve_bytes: int
    host_bytes: int
    time: StepTime

    @property
    def memory_bytes(self) -> int:
        """All of its own memory that is spoken for."""
        tables = self.tables_bytes + self.optimizer_bytes + self.step_bytes
        return tables + self.dense_bytes + self.ids_bytes + self.reserve_bytes


@dataclass(frozen=True)
class Estimate:
    """All tables by name, all ranks in their order, and the rank that the others wait for."""

    tables: list[TableEstimate]
    ranks: list[RankEstimate]

    @property
    def slowest(self) -> RankEstimate:
        """The rank whose tables take longest."""
        return max(self.ranks, key=lambda rank: rank.time.total_ms)

    @property
    def fullest(self) -> RankEstimate:
        """The rank that has least memory left."""
        return max(self.ranks, key=lambda rank: rank.memory_bytes)


def estimate(placement: Placement, ranks: int) -> Estimate:
    """Sum the shards of a placement on so many ranks, by table and by rank."""
    tables = [_of_table(option) for option in sorted(placement.options, key=lambda option: option.name)]
    shards = [(option, shard) for option in placement.options for shard in option.shards]
    return Estimate(tables, [_of_rank(rank, placement, shards) for rank in range(ranks)])


def _of_table(option: ShardingOption) -> TableEstimate:
    rows, width = option.tensor.shape
    weights = [_weights_bytes(option, shard) for shard in option.shards]
    return TableEstimate(
        name=option.name,
        rows=rows,
        width=width,
        weights_bytes=sum(weights),
        optimizer_bytes=sum(
            _optimizer_bytes(option, shard, count) for shard, count in zip(option.shards, weights, strict=True)
        ),
        sharding=option.sharding_type,
        kernel=option.compute_kernel,
        ranks=[shard.rank for shard in option.shards if shard.rank is not None],
    )


def _of_rank(rank: int, placement: Placement, shards: list[tuple[ShardingOption, Shard]]) -> RankEstimate:
    here = [(option, shard) for option, shard in shards if shard.rank == rank]
    tables = [_resident_bytes(option, shard) for option, shard in here]
    optimizer = [_optimizer_bytes(*placed, count) for placed, count in zip(here, tables, strict=True)]
    on_gpu = placement.room.memory == "HBM"
    own, host, time = 0, 0, Perf(0, 0, 0, 0)
    for _, shard in here:
        assert shard.storage is not None
        assert shard.perf is not None
        own += shard.storage.hbm if on_gpu else shard.storage.ddr
        host += shard.storage.ddr if on_gpu else 0
        time += shard.perf
    return RankEstimate(
        rank=rank,
        tables_bytes=sum(tables),
        optimizer_bytes=sum(optimizer),
        step_bytes=own - sum(tables) - sum(optimizer),
        dense_bytes=placement.room.dense_bytes,
        ids_bytes=placement.room.ids_bytes,
        reserve_bytes=placement.room.reserve_bytes,
        host_bytes=host,
        time=StepTime(
            time.fwd_compute,
            time.fwd_comms,
            time.bwd_compute,
            time.bwd_comms,
            time.prefetch_compute,
            time.input_dist_comms,
        ),
    )


def _weights_bytes(option: ShardingOption, shard: Shard) -> int:
    rows, width = shard.size
    return rows * width * option.tensor.element_size()


def _resident_bytes(option: ShardingOption, shard: Shard) -> int:
    """Weights in the rank's own memory: of an offloaded table what its cache holds."""
    weights = _weights_bytes(option, shard)
    if option.compute_kernel == "fused_uvm_caching":
        return ceil(weights * (option.cache_load_factor or UVM_CACHING_RATIO))
    return 0 if option.compute_kernel == "fused_uvm" else weights


def _optimizer_bytes(option: ShardingOption, shard: Shard, weights_bytes: int) -> int:
    """The optimiser's state for so many bytes of a shard's weights: row-wise, a number for each of its rows, whatever
    their width. (TorchRec's planner counts one for all shards of a row, and so too few where columns are divided.)"""
    optimizer = option.tensor._optimizer_classes[0]  # type: ignore[attr-defined]
    if optimizer is torch.optim.SGD:
        return 0
    return ceil(weights_bytes / shard.size[1]) if optimizer is RowWiseAdagrad else weights_bytes
