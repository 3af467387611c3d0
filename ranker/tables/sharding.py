"""Place the tables on ranks with TorchRec's planner, and put the optimisers where they belong.

Table optimisers run in the backward pass, fused with the gradient; dense gradients are averaged over ranks and stepped
by Adam.

With replicas (TorchRec's 2-D parallelism) every group of neighbouring ranks has all tables, sharded within it. A
group's rows learn from its own batches, and are averaged over the groups every so many steps. With plain SGD and an
averaging a step that is what one group of all ranks learns.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel, DMPCollection
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from features.errors import UserError
from ranker.config import OptimizerConfig, TablesConfig
from ranker.model import Ranker
from ranker.planning.cluster import cluster_of
from ranker.planning.placement import place, sharders
from ranker.planning.reads import Reads
from ranker.ranks import Ranks

_SPARSE: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}


def declare_optimizers(model: Ranker, config: TablesConfig) -> None:
    """Give each table the optimiser that steps it in the backward pass; the planner counts its memory too."""
    arguments: dict[str, float] = {"lr": config.lr}
    if config.optimizer != "sgd":
        arguments["eps"] = config.eps
    content = list(model.tables.content.parameters())
    trained = [p for p in model.tables.parameters() if all(p is not frozen for frozen in content)]
    apply_optimizer_in_backward(_SPARSE[config.optimizer], trained, arguments)
    # frozen: nothing steps them, but a fused kernel wants an optimizer, and a checkpoint a state: one number a row
    apply_optimizer_in_backward(RowWiseAdagrad, content, {"lr": 0.0})


def shard(
    model: Ranker, config: TablesConfig, ranks: Ranks, reads: Reads, replicas: int = 1
) -> tuple[DistributedModelParallel, ShardingPlan]:
    """Shard the tables and replicate the dense part.

    Args:
        reads: what a step looks up, by which the planner weighs; of features that are not in it, TorchRec's defaults.
        replicas: groups of ranks that hold all tables each; see :func:`average_replicas`.

    Raises:
        UserError: replicas on CPUs, or of unlike sizes.
        ShardingError: a table has no place; a UserError on the other ranks.
        RuntimeError: another rank failed meanwhile.
    """
    declare_optimizers(model, config)
    if replicas > 1:
        _refuse_replicas_on_cpus(ranks)
    plan = ranks.agree(lambda: place(model, config, cluster_of(ranks).group(replicas), reads).plan)
    group = dist.group.WORLD
    assert group is not None
    with ranks.named(lambda: "making the shards of tables"):
        if replicas > 1:
            sharded = DMPCollection(
                model,
                ranks.device,
                plan,
                ranks.world,
                ranks.world // replicas,
                group,
                sharders=sharders(),
                use_inter_host_allreduce=True,  # groups of neighbours: look-ups stay within machines
            )
        else:
            sharded = DistributedModelParallel(
                model, env=ShardingEnv.from_process_group(group), device=ranks.device, plan=plan, sharders=sharders()
            )
        ranks.barrier()  # here, and not in the first step, the others find out that one of them failed
    return sharded, plan


def _refuse_replicas_on_cpus(ranks: Ranks) -> None:
    if ranks.device.type != "cuda":
        raise UserError("tables.replicas: TorchRec replicates sharded tables on GPUs only, and this is a CPU; set 1")


def average_replicas(model: DistributedModelParallel) -> None:
    """Make the rows of all replicas, and their optimizer's states, the mean of theirs; nothing without replicas."""
    if isinstance(model, DMPCollection):
        model.sync()


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
