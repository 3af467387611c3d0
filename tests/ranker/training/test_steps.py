"""What a step learns does not depend on how its batches come, and what it spends its time on is told."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.types import ShardedModule

from features.batch import RequestBatch
from features.config_file import ConfigError
from features.dataset import Dataset
from features.progress import Progress
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.ranks import join_ranks
from ranker.run import Run
from ranker.towers import esmm_loss
from ranker.training import learner
from ranker.training.checkpoint import position_of
from ranker.training.clock import PARTS, StepClock
from ranker.training.out_of_memory import OutOfMemory, naming_the_tables
from ranker.training.source import ReadAhead, ReadWhenAsked
from ranker.training.trainer import Trainer, build, train

ConfigOf = Callable[..., TrainConfig]
Read = Callable[[Path], dict[str, Tensor]]
Scalars = Callable[[Path], dict[str, dict[int, float]]]


@pytest.fixture
def parted(config_of: ConfigOf, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Tensor]]:
    """Dense gradients of one step over some batches, none clipped, tables all but fixed; batches whose number is in
    `ruined` have no finite loss."""

    def gradients(batches: int, ruined: tuple[int, ...] = ()) -> list[Tensor]:
        options = ("optimizer.clip_norm=1e9", "tables.optimizer=sgd", "tables.lr=1e-12", "loader.drop_item=0")
        config = config_of(*options, "loader.drop_user=0", "training.divergence.policy=skip")
        losses, now = esmm_loss, iter(range(batches))

        def some_ruined(logits: Tensor, labels: Tensor) -> Tensor:
            right = losses(logits, labels)
            return right * float("nan") if next(now) in ruined else right

        monkeypatch.setattr(learner, "esmm_loss", some_ruined)
        with join_ranks("cpu", 1) as ranks:
            trainer = Trainer(config, Dataset(dataset), {}, ranks)
            source = ReadWhenAsked(trainer.loader.batches(), ranks.device)
            trainer.step(source, batches, Progress("train", 1, shown=False))
            assert trainer.position.batch_in_epoch == batches
            assert trainer.position.step == 1
            return [p.grad.clone() for p in trainer.learner.dense_parameters if p.grad is not None]

    return gradients


def test_a_step_of_several_batches_learns_their_mean(parted: Callable[..., list[Tensor]]):
    one, two, three = (parted(n) for n in (1, 2, 3))
    alone = [parted(3, ruined=others) for others in ((1, 2), (0, 2), (0, 1))]  # a third of each: the step is of three
    for whole, *parts in zip(three, *alone, strict=True):
        torch.testing.assert_close(whole, sum(parts), rtol=1e-4, atol=1e-7)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(one, two, strict=True))
    for first, part in zip(one, alone[0], strict=True):
        torch.testing.assert_close(first, 3 * part, rtol=1e-4, atol=1e-7)


def test_steps_of_an_epoch(config_of: ConfigOf, tmp_path: Path):
    """An epoch's last step has the batches that are left; a run is resumed between steps of any size."""
    config = config_of("training.accumulate=4", "training.epochs=3", "training.validation_split=null")
    train(config, tmp_path / "run")
    with join_ranks("cpu", 1) as ranks:
        batches = Trainer(config, config_dataset(config), {}, ranks).loader.steps()
    assert batches % 4
    last = position_of(Run(tmp_path / "run").checkpoints()[-1])
    assert (last.step, last.epoch, last.batch_in_epoch) == (3 * -(-batches // 4), 3, 0)
    train(config_of("training.accumulate=4", "training.max_steps=2"), tmp_path / "cut")
    at = position_of(Run(tmp_path / "cut").checkpoints()[-1])
    assert (at.step, at.batch_in_epoch) == (2, 8)
    train(config_of("training.accumulate=1", "training.epochs=1"), tmp_path / "cut", resume=True)
    at = position_of(Run(tmp_path / "cut").checkpoints()[-1])
    assert (at.step, at.epoch, at.batch_in_epoch) == (2 + batches - 8, 1, 0)


def config_dataset(config: TrainConfig) -> Dataset:
    return Dataset(config.dataset)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "option",
    ["training.read_ahead=true", "training.asynchronous_checkpoints=true", "training.trace_after=3"],
)
def test_options_that_change_no_number(
    option: str, config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read, scalars: Scalars
):
    """With validations and checkpoints in the midst of epochs, and batches that are left unread at the end."""
    options = ("training.validate_every=4", "training.checkpoint_every=3", "training.max_steps=25", "training.epochs=9")
    options = (*options, "training.keep_checkpoints=99", "loader.workers=1")
    train(config_of(*options), tmp_path / "plain")
    train(config_of(*options, option), tmp_path / "other")
    plain, other = Run(tmp_path / "plain").checkpoints(), Run(tmp_path / "other").checkpoints()
    assert [path.name for path in plain] == [path.name for path in other]
    assert len(plain) >= 9
    for one, two in zip(plain, other, strict=True):
        assert equal(read_checkpoint(one), read_checkpoint(two)), one.name
        assert position_of(one) == position_of(two)
    measured = [scalars(tmp_path / run)["valid/ctr/auc"] for run in ("plain", "other")]
    assert measured[0] == measured[1]


def test_training_goes_on_while_a_checkpoint_is_written(
    config_of: ConfigOf, tmp_path: Path, read_checkpoint: Read, monkeypatch: pytest.MonkeyPatch
):
    """A disk that is slow keeps nobody waiting, and what it gets is the state of its step."""
    from torch.distributed.checkpoint import filesystem

    options = ("training.checkpoint_every=2", "training.max_steps=8", "training.keep_checkpoints=99")
    options = (*options, "training.validation_split=null")
    train(config_of(*options), tmp_path / "plain")
    write, step = filesystem.FileSystemWriter.write_data, Trainer.step
    told: list[str] = []

    def slow(*arguments: object, **named: object) -> object:
        told.append("begun")
        time.sleep(1.0)
        told.append("written")
        return write(*arguments, **named)  # type: ignore[arg-type]

    def noted(self: Trainer, *arguments: object) -> None:
        step(self, *arguments)  # type: ignore[arg-type]
        told.append("step")
        whole = len(Run(tmp_path / "behind").checkpoints())
        assert whole <= self.position.step // 2

    monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", slow)
    monkeypatch.setattr(Trainer, "step", noted)
    train(config_of(*options, "training.asynchronous_checkpoints=true"), tmp_path / "behind")
    assert told.count("written") == 4
    assert "step" in told[told.index("begun") : told.index("written")]
    plain, behind = (Run(tmp_path / run).checkpoints() for run in ("plain", "behind"))
    assert [path.name for path in plain] == [path.name for path in behind]
    assert all(equal(read_checkpoint(a), read_checkpoint(b)) for a, b in zip(plain, behind, strict=True))


def test_times_by_part_are_all_of_a_step(config_of: ConfigOf, tmp_path: Path, scalars: Scalars):
    options = ("training.max_steps=6", "training.log_every=2", "training.validate_every=1")
    train(config_of(*options), tmp_path / "run")
    found = scalars(tmp_path / "run")
    for step in (2, 4, 6):
        parts = {part: found[f"time_ms/{part}"][step] for part in PARTS}
        assert all(spent >= 0 for spent in parts.values())
        assert min(parts[part] for part in ("data", "sparse", "dense", "backward", "optimizer")) > 0
        assert parts["communication"] == 0  # with nobody
        whole = 1000 / found["speed/steps_per_s"][step]
        assert 0.2 * whole < sum(parts.values()) < whole  # the rest is the log's own, on a busy machine more
    assert found["memory/rss_bytes"][6] > 2**26
    assert found["speed/events_per_s"][6] > found["speed/requests_per_s"][6]


def test_a_part_within_a_part_counts_once():
    clock, inner = StepClock(torch.device("cpu")), nn.Identity()
    inner.register_forward_hook(lambda *_: time.sleep(0.05))
    clock.watch(inner, "sparse", "dense")
    inner(torch.zeros(1))  # as in validation: no part of a step
    assert sum(abs(spent) for spent in clock.read().values()) == 0
    began = time.perf_counter()
    with clock.part("dense"):
        inner(torch.zeros(1))
        time.sleep(0.02)
    whole, spent = time.perf_counter() - began, clock.read()
    assert spent["sparse"] >= 0.05
    assert spent["dense"] >= 0.02
    assert spent["sparse"] + spent["dense"] <= whole
    assert sum(clock.read().values()) == 0


def test_waiting_for_a_collective_counts_as_communication_alone():
    with join_ranks("cpu", 1) as ranks:
        clock, inner, sent = StepClock(ranks.device), nn.Identity(), torch.zeros(1)

        def exchange(*_: object) -> None:
            time.sleep(0.02)
            work = dist.all_reduce(sent, async_op=True)
            assert work is not None
            work.wait()

        inner.register_forward_hook(exchange)
        clock.watch(inner, "sparse", "dense")
        wait = dist.Work.wait
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist.Work, "wait", lambda work: time.sleep(0.05) or wait(work))
            began = time.perf_counter()
            with clock.hearing_waits():
                with clock.part("dense"):
                    inner(torch.zeros(1))
                with clock.part("ranks"):
                    dist.all_reduce(sent)
                dist.all_reduce(sent)  # in no part of a step
            whole = time.perf_counter() - began
        assert dist.Work.wait is wait
        spent = clock.read()
        assert 0.05 <= spent["communication"] < 0.1
        assert spent["sparse"] >= 0.02
        assert 0 <= spent["dense"] < 0.02
        assert spent["ranks"] >= 0.05
        assert sum(spent.values()) <= whole - 0.05


def marks(trace: Path) -> list[str]:
    return [
        event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"] if "name" in event
    ]


def test_traces_by_config_and_by_signal(config_of: ConfigOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    step = Trainer.step

    def asking(self: Trainer, *arguments: object) -> None:
        if self.position.step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        step(self, *arguments)  # type: ignore[arg-type]

    options = ("training.max_steps=9", "training.trace_after=1", "training.trace_steps=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", asking)
        train(config_of(*options, "training.validation_split=null"), tmp_path / "run")
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    traces = sorted((tmp_path / "run" / "traces").iterdir())
    assert [path.name for path in traces] == [f"step-{n:08d}-rank-0.json.gz" for n in (2, 7)]
    for trace in traces:
        found = marks(trace)
        assert found.count("ranker:backward") == 2
        assert "ranker:data" in found
    said = capsys.readouterr().err
    assert re.search(r"rank 0: .*step-00000007-rank-0.json.gz has a trace of 2 steps; [1-9]\d* collectives were", said)


def test_products_in_bfloat16(config_of: ConfigOf, tmp_path: Path, scalars: Scalars, read_checkpoint: Read):
    options = ("training.log_every=1", "training.max_steps=12", "training.validation_split=null")
    for precision in ("float32", "bfloat16"):
        train(config_of(*options, f"training.precision={precision}"), tmp_path / precision)
    exact, coarse = (scalars(tmp_path / precision)["loss/ctr"] for precision in ("float32", "bfloat16"))
    assert exact != coarse
    for step, loss in exact.items():
        assert coarse[step] == pytest.approx(loss, rel=0.03)
    state = read_checkpoint(Run(tmp_path / "bfloat16").checkpoints()[-1])
    assert all(x.dtype == torch.float32 for name, x in state.items() if name.startswith(".model"))


def test_the_batch_that_is_too_much_is_named(config_of: ConfigOf, dataset: Path, monkeypatch: pytest.MonkeyPatch):
    """The allocation itself is real: no machine has it."""
    losses = esmm_loss

    def greedy(logits: Tensor, labels: Tensor) -> Tensor:
        return losses(logits, labels) + torch.empty(2**60, dtype=torch.uint8).sum()

    monkeypatch.setattr(learner, "esmm_loss", greedy)
    with join_ranks("cpu", 1) as ranks:
        trainer = Trainer(config_of(), Dataset(dataset), {}, ranks)
        batch: RequestBatch = next(trainer.loader.batches())
        with pytest.raises(OutOfMemory) as error:
            trainer.step(ReadWhenAsked(iter([batch]), ranks.device), 1, Progress("train", 1, shown=False))  # type: ignore[arg-type]
    said, longest = str(error.value), int((batch.end - batch.start).max())
    assert said.startswith(
        f"rank 0 of 1 ran out of memory in step 1, with a batch of {batch.requests} requests, {batch.candidates} "
        f"candidates and {batch.event_time.numel():,} events (the longest history: {longest:,}); lower loader.requests"
    )
    assert "DefaultCPUAllocator" in said


def test_the_tables_that_are_too_much_are_named(config_of: ConfigOf, dataset: Path):
    """The planner refuses what it knows to be too much; memory may be scarcer than it knows."""
    with join_ranks("cpu", 1) as ranks:
        config = config_of("tables.dims={user: 1024}")
        tables = build(resolve(config.features, Dataset(dataset).manifest), config, {}, {}).tables
        with pytest.raises(OutOfMemory) as error, naming_the_tables(tables, ranks):
            torch.empty(2**60, dtype=torch.uint8)
    said = str(error.value)
    assert said.startswith("rank 0 of 1 ran out of memory when its part of the tables was made, which have 0.00115 GiB")
    assert re.search(r"over all ranks: request_user 0.0011\d GiB, (\w+ \S+ GiB(, )?){4} and 3 more; take", said)
    assert " and 3 more; take more ranks, a smaller tables.dim" in said


@pytest.mark.parametrize("more", [(), ("features.event=[]",)])
def test_all_look_ups_are_sent_ahead(more: tuple[str, ...], config_of: ConfigOf, dataset: Path):
    with join_ranks("cpu", 1) as ranks:
        trainer = Trainer(config_of(*more), Dataset(dataset), {}, ranks)
        source = ReadAhead(trainer.loader.batches(), ranks.device, trainer.model, trainer.learner.optimizer)
        source.take()
        sharded = [module for module in trainer.model.modules() if isinstance(module, ShardedModule)]
        assert len(source._pipelined_modules) == len(sharded) >= 3
        source.close()


def test_ids_that_the_model_changes_cannot_be_sent_ahead(config_of: ConfigOf):
    with pytest.raises(ConfigError, match=r"tables.buckets makes rows of ids within the model"):
        config_of("training.read_ahead=true", "tables.buckets={item: 7}")
