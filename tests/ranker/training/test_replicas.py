"""2-D parallelism: groups of ranks that hold all tables each learn what one group of all ranks learns.

TorchRec refuses it on CPUs, by an assertion alone. The ranks of this test take that away and average by sums, which is
all that gloo has; what is tested is ours: who shards what, whose rows start alike, when they are averaged, what is
saved. This file is the program of its ranks.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.model_parallel import DMPCollection
from torchrec.distributed.types import ShardingPlan

from features.config_file import load_config
from features.errors import UserError
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.tables import sharding
from ranker.training.learner import Learner
from ranker.training.trainer import train
from tests.ranker.started_ranks import keep_one_process_group, run_ranks_to_the_end

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]

RANKS = 4
# the mean of rows that plain SGD has changed is changed by the mean gradient; that is not so of Adagrad
SGD = (
    "tables.optimizer=sgd", "tables.lr=0.3", "tables.sharding.sequence_item.types=[row_wise]", "loader.shards=4",
    "loader.requests=32", "loader.drop_item=0.2", "training.epochs=1", "training.validation_split=null",
    "model.long=[{type: mean}, {type: target_attention}]", "training.log_every=1",
)  # fmt: skip
SELDOM = (
    "tables.replicas=2", "tables.replicas_every=4", "tables.lr=0.3", "loader.requests=32", "training.epochs=1",
    "training.max_steps=7", "training.checkpoint_every=6", "training.validation_split=null",
)  # fmt: skip


def on_cpus() -> None:
    """Let TorchRec's class be used on this rank's CPU."""
    built = DMPCollection.__init__
    source = textwrap.dedent(inspect.getsource(built))
    begin, end = source.index("assert ("), source.index("self._device = device")
    source = source[:begin] + source[end:]
    # within a function that has a `__class__`, as `super()` wants one
    outer = compile("def outer(__class__):\n" + textwrap.indent(source, "    "), "dmp", "exec").co_consts[0]
    code = next(part for part in outer.co_consts if isinstance(part, CodeType))
    code = code.replace(co_flags=built.__code__.co_flags)
    lifted = FunctionType(code, built.__globals__, "__init__", built.__defaults__, built.__closure__)
    DMPCollection.__init__ = lifted  # type: ignore[method-assign]

    def mean(self: DMPCollection, context: Any, tensors: dict[torch.dtype, list[Tensor]], *_: object) -> None:
        for tensor in (tensor for of_type in tensors.values() for tensor in of_type):
            dist.all_reduce(tensor, group=context.replica_pg)
            tensor /= context.replica_pg.size()

    placed = DMPCollection._remap_sharding_plan

    def placed_on_cpus(self: DMPCollection, plan: ShardingPlan, **named: Any) -> None:
        placed(self, plan=plan, **named)
        for parameter in (parameter for of_module in plan.plan.values() for parameter in of_module.values()):
            for shard in parameter.sharding_spec.shards:
                shard.placement = _remote_device(
                    f"rank:{shard.placement.rank()}/cpu"
                )  # it has given CPUs a number, as GPUs have

    DMPCollection._remap_sharding_plan = placed_on_cpus  # type: ignore[method-assign,assignment]
    DMPCollection._allreduce_tensors = mean  # type: ignore[method-assign,assignment]
    sharding._refuse_replicas_on_cpus = lambda ranks: None


def scenarios(config: Path, out: Path) -> None:
    """What each of four ranks runs, in one process group."""
    keep_one_process_group()
    on_cpus()
    for name, replicas in {"one": 1, "two": 2}.items():
        train(load_config(config, TrainConfig, (*SGD, f"tables.replicas={replicas}")), out / name, resume=True)
    spread = watched_spread(load_config(config, TrainConfig, SELDOM), out / "seldom")
    (out / f"spread.{os.environ['RANK']}").write_text(json.dumps(spread))


def watched_spread(config: TrainConfig, root: Path) -> list[tuple[float, float]]:
    """Train; before and after each step, how far a row is from the mean of its replicas at most."""
    found: list[tuple[float, float]] = []
    step = Learner.step

    def watched(self: Learner, *rest: Any) -> None:
        before = spread_of(self.model)
        step(self, *rest)
        found.append((before, spread_of(self.model)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", watched)
        train(config, root)
    return found


def spread_of(model: Any) -> float:
    """How far a row of this rank is from the mean of its replicas at most."""
    assert isinstance(model, DMPCollection)
    context, greatest = model._ctxs[0], 0.0
    for tensor in (tensor for of_type in context.weights_by_dtype.values() for tensor in of_type):
        mean = tensor.clone()
        dist.all_reduce(mean, group=context.replica_pg)
        greatest = max(greatest, float((tensor - mean / context.replica_pg.size()).abs().max()))
    return greatest


@pytest.fixture(scope="module")
def runs(once: Callable[..., Path], config_of: ConfigOf, config_file: Path) -> Path:
    """Runs of four ranks that go on from the same checkpoint, in one group and in two; and one that averages seldom."""

    def make(out: Path) -> None:
        out.mkdir()
        train(config_of(*SGD, "training.max_steps=1"), out / "one")
        shutil.copytree(out / "one", out / "two")
        run_ranks_to_the_end(RANKS, "tests.ranker.training.test_replicas", str(config_file), str(out))

    return once("replicas", make)


def last(root: Path) -> Path:
    return sorted((root / "checkpoints").iterdir())[-1]


def test_two_groups_learn_by_sgd_what_one_does(runs: Path, read_checkpoint: Read):
    begun, one, two = (
        read_checkpoint(root)
        for root in (sorted((runs / "one" / "checkpoints").iterdir())[0], last(runs / "one"), last(runs / "two"))
    )
    rows = [name for name in one if ".tables." in name and name.endswith(".weight")]
    assert rows
    assert any(float((one[name] - begun[name]).abs().max()) > 1e-2 for name in rows)
    floats = [name for name in one if one[name].is_floating_point()]
    found, expected = ({name: state[name] for name in floats} for state in (two, one))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_are_averaged_every_so_many_steps_and_before_a_checkpoint(runs: Path):
    for rank in range(RANKS):
        spread = json.loads((runs / f"spread.{rank}").read_text())
        # replicas start alike; the checkpoint is written after 6 steps
        assert [before < 1e-6 for before, _ in spread] == [True, False, False, False, True, False, True]
        assert [after < 1e-6 for _, after in spread] == [False, False, False, True, False, False, False]


def test_a_run_of_replicas_is_evaluated_by_one_rank(runs: Path):
    one, two = evaluate(runs / "one"), evaluate(runs / "two")
    assert one is not None
    assert two is not None
    assert two.model["ctr"].auc == pytest.approx(one.model["ctr"].auc, abs=1e-4)


def test_replicas_are_refused_on_cpus(config_of: ConfigOf, tmp_path: Path):
    with pytest.raises(UserError, match=r"tables\.replicas: TorchRec replicates sharded tables on GPUs only"):
        train(config_of("tables.replicas=2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    scenarios(Path(sys.argv[1]), Path(sys.argv[2]))
