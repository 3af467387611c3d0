"""Every table has a place, or the error names the keys; table optimisers do their equations in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from features.dataset import Dataset
from features.progress import Progress
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.export import unsharded
from ranker.model import Ranker
from ranker.planning import placement
from ranker.planning.constraints import ShardingError
from ranker.planning.reads import reads_of
from ranker.planning.tables import Table, tables_of
from ranker.ranks import join_ranks
from ranker.tables.embeddings import Tables
from ranker.tables.sharding import describe_plan, shard
from ranker.towers import esmm_loss
from ranker.training.source import ReadWhenAsked
from ranker.training.trainer import Trainer, build

ConfigOf = Callable[..., TrainConfig]


def test_the_plan_holds_every_table(config_of: ConfigOf, dataset: Path):
    config = config_of()
    spec = resolve(config.features, Dataset(dataset).manifest)
    model = build(spec, config, {}, {})
    tables = {table.name: table.kind for table in tables_of(model)}
    assert tables == {
        "request_user": "pooled", "request_user_device": "pooled",
        "candidate_item": "pooled", "candidate_item_category": "pooled", "candidate_candidate_position": "pooled",
        "sequence_item": "sequence", "sequence_item_category": "sequence", "sequence_event_action": "sequence",
    }  # fmt: skip
    with join_ranks("cpu", 1) as ranks:
        _, plan = shard(model, config.tables, ranks, reads_of(config, Dataset(dataset), spec, 1))
        rows = describe_plan(plan)
    assert [row[0] for row in rows] == sorted(tables)
    for name, sharding, kernel, where in rows:
        allowed = config.tables.pooled_sharding if tables[name] == "pooled" else config.tables.sequence_sharding
        assert sharding in allowed
        assert (kernel, where) == ("fused", "0")


def test_an_impossible_sharding_names_the_key_and_what_is_possible(config_of: ConfigOf, dataset: Path):
    config = config_of("tables.pooled_sharding=[row_wise]")
    model = build(resolve(config.features, Dataset(dataset).manifest), config, {}, {})
    message = (
        r"tables.pooled_sharding: \['row_wise'\] leaves no place for table request_user: on a CPU, TorchRec shards "
        "pooled tables table_wise, column_wise, table_column_wise; allow one of these"
    )
    with join_ranks("cpu", 1) as ranks, pytest.raises(ShardingError, match=message):
        shard(model, config.tables, ranks, {})


def test_a_table_left_out_of_the_plan_is_named(config_of: ConfigOf, dataset: Path, monkeypatch: pytest.MonkeyPatch):
    config = config_of()
    model = build(resolve(config.features, Dataset(dataset).manifest), config, {}, {})
    lost = [*tables_of(model), Table("lost", "pooled", ("user",), 8, 8)]
    monkeypatch.setattr(placement, "tables_of", lambda model: lost)
    message = "the plan leaves out lost under tables.pooled_sharding; allow more"
    with join_ranks("cpu", 1) as ranks, pytest.raises(ShardingError, match=message):
        shard(model, config.tables, ranks, {})


def sgd(weight: Tensor, gradient: Tensor, lr: float, eps: float) -> Tensor:
    return weight - lr * gradient


def adagrad(weight: Tensor, gradient: Tensor, lr: float, eps: float) -> Tensor:
    return weight - lr * gradient / (gradient.square().sqrt() + eps)


def rowwise_adagrad(weight: Tensor, gradient: Tensor, lr: float, eps: float) -> Tensor:
    return weight - lr * gradient / (gradient.square().mean(1, keepdim=True).sqrt() + eps)


@pytest.mark.parametrize("rule", [sgd, adagrad, rowwise_adagrad])
def test_the_first_step_is_that_of_the_equations(
    config_of: ConfigOf, dataset: Path, rule: Callable[[Tensor, Tensor, float, float], Tensor]
):
    """One step of the sharded model, with its optimisers in the backward pass, against autograd on whole tables."""
    options = (f"tables.optimizer={rule.__name__}", "tables.eps=1e-3", "tasks.conversion_weight=0.5")
    config = config_of(*options, "model.long=[{type: mean}, {type: target_attention}]")
    spec = resolve(config.features, Dataset(dataset).manifest)
    run = SimpleNamespace(config=config, moments=dict, dataset=lambda: Dataset(dataset))
    with join_ranks("cpu", 1) as ranks:
        trainer = Trainer(config, Dataset(dataset), {}, ranks)
        literal: Ranker = unsharded(trainer.model, spec, run).train()  # type: ignore[arg-type]
        batch = next(trainer.loader.batches())
        trainer.step(ReadWhenAsked(iter([batch]), ranks.device), 1, Progress("train", 1, shown=False))
        after = unsharded(trainer.model, spec, run).state_dict()  # type: ignore[arg-type]

    losses = esmm_loss(literal(batch).logits, batch.labels) / batch.candidates
    (losses[0] + 0.5 * losses[1]).backward()
    tables = dict(literal.tables.named_parameters(prefix="tables"))
    for name, table in tables.items():
        assert table.grad is not None
        assert table.grad.any(), name
        expected = rule(table.detach(), table.grad, config.tables.lr, config.tables.eps)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6, msg=name)
        unread = ~table.grad.any(1)
        assert torch.equal(after[name][unread], table.detach()[unread])

    adam = torch.optim.Adam(literal.dense.parameters(), lr=config.optimizer.lr)
    torch.nn.utils.clip_grad_norm_(literal.dense.parameters(), config.optimizer.clip_norm)
    adam.step()
    for name, parameter in literal.dense.named_parameters(prefix="dense"):
        torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name)


def test_tables_start_within_their_scale(config_of: ConfigOf, dataset: Path):
    config = config_of("tables.init_scale=0.02", "tables.dims={item: 12}")
    tables = Tables(resolve(config.features, Dataset(dataset).manifest), config.tables)
    assert tables.candidate_width == 12 + 8 + 8
    for parameter in tables.parameters():
        assert 0.01 < parameter.abs().max() <= 0.02
