"""TorchRec's planner on a ranker's tables: the one way to a plan, for training and for ``ranker plan``.

No table is allocated: all that is read of them is their shape and their optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.constants import BATCH_SIZE
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError, PlannerErrorType, ShardingOption, Storage
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from ranker.config import TablesConfig
from ranker.planning.cluster import Cluster
from ranker.planning.constraints import ShardingError, allowed_types, constraints_of
from ranker.planning.misfit import Room, impossible, no_way, room_of
from ranker.planning.reads import Reads
from ranker.planning.tables import Table, tables_of
from ranker.tables.managed_collision import managed_of

_PREFERRED = ("table_wise", "row_wise", "table_row_wise", "column_wise", "table_column_wise", "grid_shard")
_PREFERRED_KERNELS = ("fused", "fused_uvm_caching", "fused_uvm")
_MOST_PROPOSALS = 1000
"""of a search of every combination: TorchRec's own limit, 10,000, takes minutes on 64 ranks"""


@dataclass(frozen=True)
class Placement:
    """Where the tables go. options: one a table, with the memory and time that TorchRec expects of each shard."""

    plan: ShardingPlan
    options: list[ShardingOption]
    tables: list[Table]
    room: Room


class _Ordered(EmbeddingEnumerator):
    """Options in one order. TorchRec's is that of sets of strings, another in every process, and decides between
    placements that it expects to be equally fast: the plan shown would not be the plan trained with."""

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        options = super().enumerate(module, sharders)
        return sorted(
            options,
            key=lambda o: (
                o.path,
                o.name,
                _PREFERRED.index(o.sharding_type),
                _PREFERRED_KERNELS.index(o.compute_kernel),
            ),
        )


class _Kept(FixedPercentageStorageReservation):
    """A rank's memory less what is not for tables."""

    def __init__(self, reserve: float, room: Room) -> None:
        super().__init__(reserve)
        self._room = room

    def reserve(self, topology: Topology, *rest: Any, **named: Any) -> Topology:
        left = super().reserve(topology, *rest, **named)
        taken = self._room.dense_bytes + self._room.ids_bytes
        cuda = topology.compute_device == "cuda"
        for device in left.devices:
            device.storage -= Storage(hbm=taken if cuda else 0, ddr=0 if cuda else taken)
        return left


def sharders() -> list[ModuleSharder[nn.Module]]:
    """TorchRec's for our kinds of tables."""
    return [
        EmbeddingBagCollectionSharder(),
        EmbeddingCollectionSharder(),
        ManagedCollisionEmbeddingCollectionSharder(),
    ]  # type: ignore[list-item]


def place(model: nn.Module, config: TablesConfig, cluster: Cluster, reads: Reads, thorough: bool = True) -> Placement:
    """Plan a ranker whose tables know their optimisers.

    Args:
        thorough: search for a fast placement too, among all combinations; without it for one that fits, in a tenth of
            the time.

    Raises:
        ShardingError: a constraint that cannot be met, or a table that is left out.
        DoesNotFit: there is not the memory.
    """
    tables, ours = tables_of(model), sharders()
    constraints = constraints_of(tables, config, cluster, reads)
    topology = cluster.topology()
    room = room_of(model, config, cluster, reads)
    for managed in managed_of(model):
        managed.slots.divide(cluster.ranks)
    kept: list[ShardingOption] = []

    def keep(options: list[ShardingOption]) -> list[ShardingOption]:
        kept[:] = options
        return options

    planner = EmbeddingShardingPlanner(
        topology=topology,
        enumerator=_Ordered(topology, BATCH_SIZE, constraints),
        storage_reservation=_Kept(config.reserve, room),
        proposer=[
            *([GridSearchProposer(max_proposals=_MOST_PROPOSALS)] if thorough else []),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        constraints=constraints,
        stats=[],
        callbacks=[keep],
    )
    # of memory alone, as estimates of times take most of the time that a plan takes
    memory = EmbeddingStorageEstimator(topology, constraints)
    options = _Ordered(topology, BATCH_SIZE, constraints, memory).enumerate(model, ours)
    if (reason := impossible(options, room, cluster.ranks)) is not None:
        raise reason
    try:
        plan = planner.plan(model, ours)
    except PlannerError as error:
        if error.error_type not in (PlannerErrorType.INSUFFICIENT_STORAGE, PlannerErrorType.STRICT_CONSTRAINTS):
            raise
        raise no_way(options, room, cluster.ranks) from error
    planned = {name for module in plan.plan.values() for name in module}  # type: ignore[attr-defined]
    if missing := sorted({table.name for table in tables} - planned):
        keys = ", ".join(dict.fromkeys(allowed_types(table, config)[0] for table in tables if table.name in missing))
        raise ShardingError(f"the plan leaves out {', '.join(missing)} under {keys}; allow more")
    return Placement(plan, kept, tables, room)
