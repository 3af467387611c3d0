"""What the planner may do with each table, from `tables` of a config: TorchRec's ParameterConstraints, or why not.

A key of `tables.sharding` is a table's name, as training's log, `ranker plan` and TorchRec have it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import ManagedCollisionEmbeddingCollectionSharder
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheAlgorithm, CacheParams

from features.errors import UserError, did_you_mean
from ranker.config import TablesConfig, TableShardingConfig
from ranker.planning.cluster import Cluster, Device
from ranker.planning.reads import Read, Reads
from ranker.planning.tables import Table

_DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}


class ShardingError(UserError):
    """The planner could not place a table."""


def constraints_of(
    tables: Sequence[Table], config: TablesConfig, cluster: Cluster, reads: Reads
) -> dict[str, ParameterConstraints]:
    """What is allowed for each table, and what a step reads of it.

    Raises:
        ShardingError: a table that the model does not have, or one for which nothing of what the config allows can be
            done on the cluster.
    """
    names = [table.name for table in tables]
    for name in config.sharding:
        if name not in names:
            hint = did_you_mean(name, names)
            raise ShardingError(
                f"tables.sharding.{name}: the model has no table {name!r}{hint} Its tables: {', '.join(sorted(names))}"
            )
    return {table.name: _constraints(table, config, cluster, reads) for table in tables}


def allowed_types(table: Table, config: TablesConfig) -> tuple[str, list[str]]:
    """The key that says how a table may be sharded, and what it says."""
    own = config.sharding.get(table.name)
    if own is not None and own.types is not None:
        return f"tables.sharding.{table.name}.types", list(own.types)
    if table.kind == "managed":
        return "tables.managed_collision", ["row_wise"]
    if table.kind == "pooled":
        return "tables.pooled_sharding", list(config.pooled_sharding)
    return "tables.sequence_sharding", list(config.sequence_sharding)


def possible_types(table: Table, device: Device) -> list[str]:
    """What TorchRec can do with a table on a device, but data_parallel (see :class:`TableShardingConfig`)."""
    sharder = {
        "pooled": EmbeddingBagCollectionSharder,
        "sequence": EmbeddingCollectionSharder,
        "managed": ManagedCollisionEmbeddingCollectionSharder,
    }[table.kind]()
    return [name for name in sharder.sharding_types(device) if name != "data_parallel"]


def rows_for_all(table: Table, cluster: Cluster) -> bool:
    """Whether every rank has a row of a table that is sharded by rows. FBGEMM's look-up on CPUs fails on none."""
    of_rank = -(-table.rows // cluster.ranks)
    return (cluster.ranks - 1) * of_rank < table.rows


def _constraints(table: Table, config: TablesConfig, cluster: Cluster, reads: Reads) -> ParameterConstraints:
    device = cluster.device
    if table.kind == "managed":
        _refuse_managed(table, config, cluster)
    key, types = allowed_types(table, config)
    possible = possible_types(table, device)
    if never := [name for name in types if name not in possible_types(table, "cuda")]:
        raise ShardingError(
            f"{key}: {', '.join(never)} is nothing that TorchRec does with {table.kind} tables such as {table.name}; "
            f"it shards them {', '.join(possible)}"
        )
    if not set(types) & set(possible):
        raise ShardingError(
            f"{key}: {types} leaves no place for table {table.name}: on {_DEVICES[device]}, TorchRec shards "
            f"{table.kind} tables {', '.join(possible)}; allow one of these"
        )
    if device == "cpu" and not rows_for_all(table, cluster):
        types = [name for name in types if name != "row_wise"]
        if not types:
            raise ShardingError(
                f"{key}: row_wise alone leaves some of {cluster.ranks} ranks without a row of table {table.name}, "
                f"which has {table.rows}, and on CPUs that cannot be looked up; allow table_wise too"
            )
    own = config.sharding.get(table.name, TableShardingConfig())
    if device == "cpu" and "fused" not in own.kernels:
        raise ShardingError(
            f"tables.sharding.{table.name}.kernels: {own.kernels} need a GPU, and this is for a CPU; allow fused too, "
            "or train with training.device: cuda (`ranker plan --gpus` plans for GPUs without having them)"
        )
    found = [reads.get(feature, Read(1, 1.0)) for feature in table.features]
    factors = own.pooling_factors or [read.ids for read in found]
    if len(factors) != len(found):
        raise ShardingError(
            f"tables.sharding.{table.name}.pooling_factors: {factors} has {len(factors)} numbers, but the table is "
            f"read by {len(found)} features ({', '.join(table.features)}); give one for each"
        )
    return ParameterConstraints(
        sharding_types=types,
        compute_kernels=list(own.kernels),
        min_partition=own.min_partition,
        pooling_factors=factors,
        batch_sizes=[read.lists for read in found] if _known(table, reads) else None,
        cache_params=_cache(own),
    )


def _refuse_managed(table: Table, config: TablesConfig, cluster: Cluster) -> None:
    """Raise ShardingError where managed rows cannot be trained."""
    refuse_managed_on_cpus(table, cluster.device)
    of_rank = -(-table.rows // cluster.ranks)
    if table.rows - of_rank * (cluster.ranks - 1) < 2:
        raise ShardingError(
            f"tables.managed_collision: table {table.name} has {table.rows} rows, {of_rank} a rank, which leaves the "
            f"last of {cluster.ranks} ranks without two, one of them for ids without a row; give it more"
        )
    if (own := config.sharding.get(table.name)) is not None and own.kernels != ["fused"]:
        raise ShardingError(
            f"tables.sharding.{table.name}.kernels: {own.kernels}, but rows that change hands are set anew where they "
            "lie, in the ranks' own memory; leave fused alone"
        )


def refuse_managed_on_cpus(table: Table, device: Device) -> None:
    """Raise ShardingError for a CPU."""
    if device == "cpu":
        raise ShardingError(
            f"tables.managed_collision: table {table.name} is to be managed while it is trained, which is for GPUs, "
            "and this is a CPU; train with training.device: cuda (`ranker plan --gpus` plans for GPUs without having "
            "them), or leave it out: a feature with hash_buckets then has a row for each bucket"
        )


def _known(table: Table, reads: Mapping[str, Read]) -> bool:
    return all(feature in reads for feature in table.features)


def _cache(own: TableShardingConfig) -> CacheParams | None:
    if own.cache_load_factor is None and own.cache_algorithm is None:
        return None
    algorithm = None if own.cache_algorithm is None else CacheAlgorithm[own.cache_algorithm.upper()]
    return CacheParams(algorithm=algorithm, load_factor=own.cache_load_factor)
