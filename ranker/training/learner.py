"""One step of training: batches in, parameters changed.

A step learns from one batch of each rank, or from several one after the other (`training.accumulate`). Its loss is the
mean over the candidates of all ranks, so that the numbers do not depend on how many ranks share a global batch; that of
several batches is the mean of theirs. Dense parameters are stepped once by the whole gradient. Tables are stepped by
each batch, as their optimizers are fused with the backward pass.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel

from features.batch import RequestBatch
from ranker.config import TrainConfig
from ranker.ranks import Ranks
from ranker.tables.sharding import average_replicas, optimizer_of
from ranker.towers import click_losses, esmm_loss
from ranker.training.checkpoint import Position
from ranker.training.clock import StepClock
from ranker.training.collectives import wait_in_the_open
from ranker.training.divergence import Divergence
from ranker.training.interruption import Interruption
from ranker.training.learning_rates import LearningRates
from ranker.training.out_of_memory import naming_the_batch
from ranker.training.source import BatchSource
from ranker.training.window import Window


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class Learner:
    """A sharded model and its optimizers.

    Attributes:
        told: whether a rank was told to end, as of the last batch; the same on every rank.
    """

    def __init__(
        self, config: TrainConfig, model: DistributedModelParallel, ranks: Ranks, interruption: Interruption
    ) -> None:
        self.config, self.model, self.ranks, self.interruption = config, model, ranks, interruption
        self.optimizer, self.adam = optimizer_of(model, config.optimizer)
        self.rates = LearningRates(
            (self.adam.param_groups, config.optimizer.schedule),
            (model.fused_optimizer.param_groups, config.tables.schedule),
        )
        self.dense_parameters: list[nn.Parameter] = [p for group in self.adam.param_groups for p in group["params"]]
        self.clock = StepClock(ranks.device)
        self.clock.watch(cast(nn.Module, model.module.tables), "sparse", "dense")
        self.told = False
        self._replicated = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        if ranks.world > 1:
            for replica in self._replicated:
                wait_in_the_open(replica)
        self._averaged_before = False
        self._replicas_differ = False

    def step(
        self, source: BatchSource, batches: int, position: Position, total: int, divergence: Divergence, window: Window
    ) -> None:
        """Train on the next `batches` of `source`, as the next step of `total`; `position` is after it then.

        Raises:
            UserError: training diverged; on every rank.
            OutOfMemory: the batch was too much for this rank.
        """
        self.model.train()
        self.rates.set(position.step, total)
        self.optimizer.zero_grad()  # before the forward pass, which hands the tables' rate on to the backward's kernels
        # one process waits for nobody
        with self.clock.hearing_waits() if self.ranks.world > 1 else nullcontext():
            learned, averaged = self._learn_each(source, batches, position, divergence, window)
            with self.clock.part("optimizer"):
                if not averaged:
                    self._average()
                if learned is not None:
                    self._change_dense(learned, position, divergence, window)
        position.step += 1
        window.steps += 1
        self._replicas_differ = self.config.tables.replicas > 1
        if position.step % self.config.tables.replicas_every == 0:
            self.average_replicas()

    def average_replicas(self) -> None:
        """Let all replicas of the tables have the same rows; before a checkpoint or a validation, too."""
        if self._replicas_differ:
            with self.clock.part("communication"):
                average_replicas(self.model)
            self._replicas_differ = False

    def _learn_each(
        self, source: BatchSource, batches: int, position: Position, divergence: Divergence, window: Window
    ) -> tuple[RequestBatch | None, bool]:
        """Learn from the step's batches: the last that was not skipped, and whether dense gradients are averaged."""
        averaged = True
        learned: RequestBatch | None = None
        for number in range(batches):
            with self.clock.part("data"), naming_the_batch(None, self.ranks, position.step + 1):
                batch = source.take()
            position.batch_in_epoch += 1
            last = number == batches - 1
            with naming_the_batch(batch, self.ranks, position.step + 1), self._averaging(last):
                seed = (position.step, number) if number else (position.step,)
                if self._learn(source, batch, seed, 1 / batches, position, divergence, window):
                    learned, averaged = batch, last or not self._averaged_before
                    self._averaged_before = True
            source.done()
        return learned, averaged

    def _learn(
        self, source: BatchSource, batch: RequestBatch, seed: tuple[int, ...], share: float, position: Position,
        divergence: Divergence, window: Window,
    ) -> bool:  # fmt: skip
        """Forward and backward pass of a batch whose loss is `share` of the step's; False: it was skipped."""
        # what dropout masks is a function of seed, step and rank alone, so that a resumed run masks the same
        torch.manual_seed(_mixed(self.config.seed, *seed, self.ranks.rank))
        with self.clock.part("ranks"):
            # one collective for all: a rank that is told to end takes the others along
            read = float((batch.end > batch.start).sum())
            candidates, reads, told = self.ranks.totals(batch.candidates, read, self.interruption.asked)
        self.told = told > 0
        with self.clock.part("dense"):
            with torch.autocast(self.ranks.device.type, torch.bfloat16, self.config.training.precision == "bfloat16"):
                scores = self.model(batch)
            losses = esmm_loss(scores.logits.float(), batch.labels)
            weights = losses.new_tensor([1.0, self.config.tasks.conversion_weight])[: losses.numel()]
            # ranks are averaged in the backward pass; times their number, this is the mean over all candidates
            of_all = self.ranks.world / max(candidates, 1.0)
            # each rank's is the mean over its requests with events, of which ranks have unlike numbers
            auxiliary = scores.auxiliary * (read * self.ranks.world / max(reads, 1.0))
            of_blocks = click_losses(scores.click_logits.float(), batch.labels)
            auxiliary = auxiliary + (of_blocks * of_blocks.new_tensor(self.config.search_weights)).sum() * of_all
            loss = (losses * weights).sum() * of_all + auxiliary
        with self.clock.part("sparse"):
            source.forward_done()
        with self.clock.part("ranks"):
            whole = self.ranks.total(float(loss.detach())) / self.ranks.world
        if divergence.skips(batch, whole, position):
            return False
        with self.clock.part("backward"):
            (loss * share).backward()
        window.add(batch, losses.detach(), auxiliary.detach())
        return True

    def _change_dense(self, batch: RequestBatch, position: Position, divergence: Divergence, window: Window) -> None:
        norm = nn.utils.clip_grad_norm_(self.dense_parameters, self.config.optimizer.clip_norm)
        if not torch.isfinite(norm):
            state = "tables were updated by it, dense parameters not; `--resume` goes on from the last checkpoint"
            divergence.stop(batch, f"the gradient is {float(norm)}", state, position)
        self.optimizer.step()
        window.norm = float(norm)

    @contextmanager
    def _averaging(self, now: bool) -> Generator[None]:
        """Average dense gradients over ranks in the backward pass in here, or leave that to a later one. The first
        cannot be left: in it, DDP learns the graph. That costs an exchange and changes nothing, as the mean of a mean
        is that mean."""
        with ExitStack() as held:
            for replica in self._replicated if self._averaged_before and not now else ():
                held.enter_context(replica.no_sync())
            yield

    def _average(self) -> None:
        """The same after the backward pass, where the step's last batch, which was to do it, had none."""
        for parameter in self.dense_parameters:
            if self.ranks.world > 1 and parameter.grad is not None:
                sent = dist.all_reduce(parameter.grad, async_op=True)
                assert sent is not None
                sent.wait()  # not within the call, where on a GPU nobody hears it
                parameter.grad /= self.ranks.world
