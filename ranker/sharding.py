"""Place the tables on ranks with TorchRec's planner, and put the optimisers where they belong.

Table optimisers run in the backward pass, fused with the gradient; dense gradients are averaged over ranks and stepped
by Adam.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from features.errors import UserError
from ranker.config import OptimizerConfig, TablesConfig
from ranker.model import Ranker
from ranker.ranks import Ranks

_SPARSE: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


class ShardingError(UserError):
    """The planner could not place a table."""


def table_names(model: nn.Module) -> dict[str, str]:
    """Every table of a model and the kind of its module: ``pooled`` or ``sequence``."""
    names: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, EmbeddingBagCollection):
            names.update({c.name: "pooled" for c in module.embedding_bag_configs()})
        elif isinstance(module, EmbeddingCollection):
            names.update({c.name: "sequence" for c in module.embedding_configs()})
    return names


def shard(model: Ranker, config: TablesConfig, ranks: Ranks) -> tuple[DistributedModelParallel, ShardingPlan]:
    """Shard the tables and replicate the dense part.

    Raises:
        ShardingError: a table has no place; on every rank alike.
    """
    arguments: dict[str, float] = {"lr": config.lr}
    if config.optimizer != "sgd":
        arguments["eps"] = config.eps
    content = list(model.tables.content.parameters())
    trained = [p for p in model.tables.parameters() if all(p is not frozen for frozen in content)]
    apply_optimizer_in_backward(_SPARSE[config.optimizer], trained, arguments)
    # frozen: nothing steps them, but a fused kernel wants an optimizer, and a checkpoint a state: one number a row
    apply_optimizer_in_backward(RowWiseAdagrad, content, {"lr": 0.0})
    tables = table_names(model)
    allowed = {"pooled": config.pooled_sharding, "sequence": config.sequence_sharding}
    constraints = {
        name: ParameterConstraints(sharding_types=list(allowed[kind]), compute_kernels=["fused"])
        for name, kind in tables.items()
    }
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=ranks.world, local_world_size=ranks.local_world, compute_device=ranks.device.type),
        constraints=constraints,
    )
    sharders: list[ModuleSharder[nn.Module]] = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]  # type: ignore[list-item]
    # rank 0 plans for all: the planner's ties break differently from rank to rank
    plan = ranks.agree(lambda: _checked_plan(planner, model, sharders, tables, config))
    group = dist.group.WORLD
    assert group is not None
    sharded = DistributedModelParallel(
        model, env=ShardingEnv.from_process_group(group), device=ranks.device, plan=plan, sharders=sharders
    )
    return sharded, plan


def _checked_plan(
    planner: EmbeddingShardingPlanner,
    model: nn.Module,
    sharders: list[ModuleSharder[nn.Module]],
    tables: dict[str, str],
    config: TablesConfig,
) -> ShardingPlan:
    allowed = f"tables.pooled_sharding={config.pooled_sharding}, tables.sequence_sharding={config.sequence_sharding}"
    try:
        plan = planner.plan(model, sharders)
    except Exception as error:
        raise ShardingError(f"no place for the tables under {allowed}: {error}") from error
    planned = {name for module in plan.plan.values() for name in module}  # type: ignore[attr-defined]
    if missing := sorted(set(tables) - planned):
        raise ShardingError(f"the plan leaves out {', '.join(missing)} under {allowed}; allow more")
    return plan


def describe_plan(plan: ShardingPlan) -> list[tuple[str, str, str, str]]:
    """Rows of the plan: table, sharding, kernel, ranks."""
    rows: list[tuple[str, str, str, str]] = []
    for module in plan.plan.values():
        for name, sharding in module.items():  # type: ignore[attr-defined]
            where = ",".join(str(r) for r in sharding.ranks or [])
            rows.append((name, sharding.sharding_type, sharding.compute_kernel, where))
    return sorted(rows)


def optimizer_of(
    model: DistributedModelParallel, config: OptimizerConfig
) -> tuple[CombinedOptimizer, torch.optim.Adam]:
    """All optimisers together (for checkpoints and steps), and the dense one among them (for its learning rate)."""
    parameters = dict(in_backward_optimizer_filter(model.named_parameters()))
    adam = torch.optim.Adam(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    return CombinedOptimizer([model.fused_optimizer, KeyedOptimizerWrapper(parameters, lambda _: adam)]), adam
