"""Training: the loop, validation, early stopping, checkpoints. Started by `ranker train` and :mod:`ranker.train`.

A step's loss is the mean over the candidates of all ranks, so that the numbers do not depend on how many ranks share a
global batch.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter

from features.batch import RequestBatch
from features.dataset import Dataset
from features.errors import UserError
from features.loader import Loader, Selection
from features.moments import dense_moments
from features.progress import Progress, log
from features.selection import FeatureSpec, resolve
from ranker import checkpoint
from ranker.blocks import Codewords
from ranker.checkpoint import Position
from ranker.config import TrainConfig
from ranker.divergence import Divergence
from ranker.doctor import ensure_healthy
from ranker.embeddings import load_content
from ranker.evaluation.metrics import Predictions, task_metrics
from ranker.evaluation.predict import predict, refuse_not_finite, scoring_loader, selection_of
from ranker.interruption import Interruption
from ranker.learning_rates import LearningRates
from ranker.model import Moments, Ranker
from ranker.ranks import Ranks, join_ranks
from ranker.run import Run, codewords_of, refuse_existing, training_alone, write_json
from ranker.sharding import describe_plan, optimizer_of, shard
from ranker.towers import click_losses, esmm_loss
from ranker.training_cost import TrainingCost, table_parameters


def build(spec: FeatureSpec, config: TrainConfig, moments: Moments, codewords: Codewords) -> Ranker:
    """The unsharded ranker with tables on the meta device, the dense part from the seed."""
    torch.manual_seed(config.seed)
    return Ranker(spec, config, moments, codewords, device=torch.device("meta"))


def _mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@dataclass
class _Window:
    """Sums since the last log line."""

    losses: Tensor
    auxiliary: Tensor
    steps: int = 0
    candidates: float = 0.0
    requests: float = 0.0
    clicks: float = 0.0
    norm: float = 0.0
    started: float = 0.0


class Trainer:
    """One training run on this rank: built from its config, then :meth:`fit`.

    Args:
        start: the checkpoint to go on from.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, moments: Moments, ranks: Ranks, start: Path | None = None
    ) -> None:
        self.config, self.ranks = config, ranks
        spec = resolve(config.features, dataset.manifest)
        selection = selection_of(config, dataset, spec)
        self.position = checkpoint.position_of(start) if start else Position(shards=1)
        self._settle_shards(dataset, selection)
        self.loader = self._training_loader(dataset, selection, self.position.shards, ranks.rank, ranks.world)
        self.validation = self._validation_loader(dataset, selection)
        model = build(spec, config, moments, codewords_of(config, dataset))
        tables = table_parameters(model.tables)
        torch.manual_seed(config.seed + ranks.rank)  # each rank's part of a table starts with values of its own
        self.model, plan = shard(model, config.tables, ranks)
        load_content(self.model, spec, dataset)
        self.optimizer, self.adam = optimizer_of(self.model, config.optimizer)
        self.rates = LearningRates(
            (self.adam.param_groups, config.optimizer.schedule),
            (self.model.fused_optimizer.param_groups, config.tables.schedule),
        )
        self.dense_parameters: list[nn.Parameter] = [p for group in self.adam.param_groups for p in group["params"]]
        self.cost = TrainingCost(sum(p.numel() for p in self.dense_parameters), tables)
        self.window = self._new_window()
        self.total = sys.maxsize
        self.interruption, self.ending = Interruption(), False
        self.divergence = Divergence(config.training.divergence, ranks)
        self.writer: SummaryWriter | None = None
        if ranks.first:
            for table, sharding, kernel, where in describe_plan(plan):
                log(f"table {table}: {sharding}, kernel {kernel}, ranks {where}")
            log(f"dense parameters: {self.cost.dense_parameters:,}")
        if start:
            checkpoint.load(start, self.model, self.optimizer)
            if ranks.first:
                log(f"resumed from {start} at step {self.position.step}")

    def _training_loader(self, dataset: Dataset, selection: Selection, shards: int, rank: int, world: int) -> Loader:
        config = self.config.loader.model_copy(update={"shards": shards})
        return Loader(
            dataset, tuple(self.config.training.splits), selection, config, self.config.seed, True, rank, world
        )

    def _settle_shards(self, dataset: Dataset, selection: Selection) -> None:
        """The shards of a resumed run stay as they were, and with them its batches, unless there are too few for the
        ranks: then the epoch goes on at the same share of it."""
        before, world = self.position.shards, self.ranks.world
        now = self.config.loader.shards or max(world, before)
        if self.position.step_in_epoch and now != before:
            steps_before, steps = (self._training_loader(dataset, selection, n, 0, 1).steps() for n in (before, now))
            step = self.position.step_in_epoch * steps // steps_before
            if self.ranks.first:
                log(
                    f"{before} data shards are too few for {world} ranks, now {now}: the epoch goes on at step {step} "
                    f"of {steps}, where it was at {self.position.step_in_epoch} of {steps_before}"
                )
            self.position.step_in_epoch = step
        self.position.shards = now

    def _validation_loader(self, dataset: Dataset, selection: Selection) -> Loader | None:
        split = self.config.training.validation_split
        if split is None or split in self.config.training.splits:
            return None
        if split not in dataset.manifest.filled_splits():
            if self.config.training.patience is not None:
                raise UserError(
                    f"training.patience: the dataset has no split {split!r} to watch; prepare one (split.valid_time, "
                    "split.valid_users or split.valid_last) or set training.patience: null"
                )
            return None
        return scoring_loader(self.config, dataset, split, selection, self.ranks)

    def fit(self, root: Path) -> None:
        """Train to the end, all epochs, the step limit, or patience spent, and write into the run folder `root`."""
        config = self.config.training
        self.divergence.root = root
        epoch_steps = self.loader.steps()
        ahead = epoch_steps * (config.epochs - self.position.epoch) - self.position.step_in_epoch
        self.total = min(self.position.step + max(ahead, 0), config.max_steps or sys.maxsize)
        if self.ranks.first:
            self.writer = SummaryWriter(str(root / "tensorboard"), purge_step=self.position.step + 1)
        self.window = self._new_window()
        progress = Progress("train", self.total, self.ranks.first, self.position.step)
        with self.interruption.heard(), self.ranks.named(lambda: f"step {self.position.step + 1}"), progress:
            while self.position.step < self.total and not self._patience_spent():
                for batch in self.loader.batches(self.position.epoch, self.position.step_in_epoch):
                    self.step(batch.to(self.ranks.device), progress)
                    self.position.step_in_epoch += 1
                    epoch_done = self.position.step_in_epoch == epoch_steps
                    if epoch_done:
                        self.position.epoch += 1
                        self.position.step_in_epoch = 0
                    if self.ending:
                        self._end_early(root)
                    last = self.position.step == self.total
                    gained = False
                    if self.validation and (last or self._due(config.validate_every, epoch_done)):
                        gained = self._validate(self.validation)
                    last = last or self._patience_spent()
                    if gained or last or self._due(config.checkpoint_every, epoch_done):
                        self._save(root)
                    if epoch_done or last:
                        break
        if self.ranks.first and self._patience_spent():
            log(f"stopped early: no gain in {self.position.stale_validations} validations")
        if self.writer:
            self.writer.close()
        # a run that was resumed at its end keeps what it cost
        if self.ranks.first and (self.cost.steps or not (root / "training.json").exists()):
            write_json(root / "training.json", self.cost.content())

    def _end_early(self, root: Path) -> None:
        """On SIGTERM: a checkpoint, then the exit code of a process that a signal ended."""
        self._save(root)
        if self.ranks.first:
            log(f"told to end (SIGTERM): checkpoint at step {self.position.step}; `--resume` goes on from there")
        raise SystemExit(128 + signal.SIGTERM)

    def _due(self, every: int | None, epoch_done: bool) -> bool:
        return self.position.step % every == 0 if every else epoch_done

    def _patience_spent(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.position.stale_validations >= patience

    def step(self, batch: RequestBatch, progress: Progress) -> None:
        """Train on one batch, or skip it, as `training.divergence` says.

        Raises:
            UserError: training diverged; on every rank.
        """
        self.model.train()
        # what dropout masks is a function of seed, step and rank alone, so that a resumed run masks the same
        torch.manual_seed(_mixed(self.config.seed, self.position.step, self.ranks.rank))
        self.rates.set(self.position.step, self.total)
        self.optimizer.zero_grad()  # before the forward pass, which hands the tables' rate on to the backward's kernels
        # one collective for both: a rank that is told to end takes the others along
        candidates, ending = self.ranks.totals(batch.candidates, self.interruption.asked)
        self.ending = ending > 0
        scores = self.model(batch)
        losses = esmm_loss(scores.logits, batch.labels)
        weights = torch.tensor([1.0, self.config.tasks.conversion_weight][: losses.numel()], device=losses.device)
        # ranks are averaged in the backward pass; times their number, this is the mean over all candidates
        share = self.ranks.world / max(candidates, 1.0)
        loss = (losses * weights).sum() * share
        # each rank's is the mean over its requests with events, of which ranks have unlike numbers
        read = float((batch.end > batch.start).sum())
        auxiliary = scores.auxiliary * (read * self.ranks.world / max(self.ranks.total(read), 1.0))
        of_blocks = click_losses(scores.click_logits, batch.labels)
        auxiliary = auxiliary + (of_blocks * of_blocks.new_tensor(self.config.search_weights)).sum() * share
        loss = loss + auxiliary
        whole = self.ranks.total(float(loss.detach())) / self.ranks.world
        if not self.divergence.skips(batch, whole, self.position):
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.dense_parameters, self.config.optimizer.clip_norm)
            if not torch.isfinite(norm):
                state = "tables were updated by it, dense parameters not; `--resume` goes on from the last checkpoint"
                self.divergence.stop(batch, f"the gradient is {float(norm)}", state, self.position)
            self.optimizer.step()
            self.window.norm = float(norm)
            self.window.losses += losses.detach()
            self.window.auxiliary += auxiliary.detach()
            self.window.steps += 1
            self.window.candidates += batch.candidates
            self.window.requests += batch.requests
            self.window.clicks += float(batch.labels[:, 0].sum())
        self.position.step += 1
        if self.position.step % self.config.training.log_every == 0 or self.position.step == self.total:
            self._log(progress)
        progress.advance()

    def _new_window(self) -> _Window:
        tasks = 1 if self.config.tasks.conversion is None else 2
        losses, auxiliary = torch.zeros(tasks, device=self.ranks.device), torch.zeros([], device=self.ranks.device)
        return _Window(losses, auxiliary, started=time.perf_counter())

    def _log(self, progress: Progress) -> None:
        window, step = self.window, self.position.step
        seconds = time.perf_counter() - window.started
        counts = (window.candidates, window.requests, window.clicks)
        candidates, requests, clicks = (self.ranks.total(x) for x in counts)
        self.cost.add(window.steps, candidates, seconds)
        losses = [self.ranks.total(float(x)) / max(candidates, 1) for x in window.losses]
        rate = min(max(clicks / max(candidates, 1), 1e-7), 1 - 1e-7)
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        scalars = dict(zip(("loss/ctr", "loss/ctcvr"), losses, strict=False))
        scalars |= {
            "loss/auxiliary": self.ranks.total(float(window.auxiliary)) / max(window.steps * self.ranks.world, 1),
            "train/ne": losses[0] / entropy,
            "train/gradient_norm": window.norm,
            "train/skipped_batches": self.position.skipped,
            "train/learning_rate": self.adam.param_groups[0]["lr"],
            "speed/requests_per_s": requests / seconds,
            "speed/candidates_per_s": candidates / seconds,
        }
        if self.writer:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
        progress.note(
            f"loss {losses[0]:.4f}  ne {scalars['train/ne']:.4f}  {scalars['speed/candidates_per_s']:,.0f} candidates/s"
        )
        self.window = self._new_window()

    def _validate(self, loader: Loader) -> bool:
        """Measure the validation split; whether the monitored metric gained. The same answer on every rank."""
        started = time.perf_counter()
        predictions = predict(self.model, loader, self.config, self.ranks)

        def measure() -> float:
            assert predictions is not None
            return self._measure(predictions)

        value = self.ranks.agree(measure)
        better = value if self.config.training.monitor in ("auc", "uauc") else -value
        gained = self.position.best is None or better > self.position.best
        if gained:
            self.position.best, self.position.best_step, self.position.stale_validations = better, self.position.step, 0
        else:
            self.position.stale_validations += 1
        self.window.started += time.perf_counter() - started
        return gained

    def _measure(self, predictions: Predictions) -> float:
        """Log the metrics; the monitored one."""
        refuse_not_finite(predictions)
        step, monitor = self.position.step, self.config.training.monitor
        measured = task_metrics(predictions)
        for task, metrics in measured.items():
            for name in ("auc", "uauc", "logloss", "ne", "calibration"):
                number = getattr(metrics, name)
                if self.writer and number is not None:
                    self.writer.add_scalar(f"valid/{task}/{name}", number, step)
        ctr = measured["ctr"]
        shown = {"auc": ctr.auc, "uauc": ctr.uauc, "log loss": ctr.logloss, "ne": ctr.ne}
        log(f"step {step}: valid " + "  ".join(f"{k} {'–' if v is None else f'{v:.4f}'}" for k, v in shown.items()))
        watched = getattr(ctr, monitor)
        if watched is None:
            raise UserError(
                f"training.monitor: {monitor} is undefined on the validation split, where {ctr.positives:,} of "
                f"{ctr.impressions:,} impressions are clicked; watch logloss, or set training.validation_split: null"
            )
        return float(watched)

    def _save(self, root: Path) -> None:
        path = checkpoint.path_of(root, self.position.step)
        checkpoint.save(path, self.model, self.optimizer, self.position, self.ranks)
        if not self.ranks.first:
            return
        written = checkpoint.all_of(root)
        keep = written[-self.config.training.keep_checkpoints :]
        if self.position.best_step is not None:
            keep.append(checkpoint.path_of(root, self.position.best_step))
        for old in written:
            if old not in keep:
                checkpoint.remove(old)


def train(config: TrainConfig, out: Path, resume: bool = False) -> None:
    """Train a run into the folder `out`, on this process or on the ranks it is one of.

    Args:
        resume: go on from the run's newest whole checkpoint; without a run in `out`, start one, so that a scheduler can
            start the same command again and again.

    Raises:
        UserError: an unhealthy toolchain, a config that does not fit the dataset or the run, a folder that exists (or,
            resuming, is no run).
    """
    ensure_healthy(config.training.device)
    options = config.training
    with join_ranks(options.device, options.threads, config.loader.workers, options.collective_timeout_s) as ranks:
        if resume and ranks.agree(lambda: _begun(out)):
            run = Run(out)
            with training_alone(out, ranks):
                run.go_on_with(config)
                start = checkpoint.newest_whole(out, ranks)
                trainer = Trainer(config, run.dataset(), run.moments(), ranks, start)
                if ranks.first:
                    run.save_config()
                trainer.fit(out)
        else:
            refuse_existing(out)
            dataset = Dataset(config.dataset)
            moments = ranks.agree(lambda: _moments(config, dataset))
            # the folder comes last: what is refused until here leaves nothing behind
            trainer = Trainer(config, dataset, moments, ranks)
            ranks.agree(lambda: Run.create(out, config, dataset, moments, ranks.world).root)
            with training_alone(out, ranks):
                trainer.fit(out)


def _begun(out: Path) -> bool:
    """Whether there is a run to go on with; said where there is none."""
    begun = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if not begun:
        log(f"{out}: no run to resume; a new one starts")
    return begun


def _moments(config: TrainConfig, dataset: Dataset) -> Moments:
    spec = resolve(config.features, dataset.manifest)
    dense = (*spec.request_dense, *spec.candidate_dense, *spec.event_dense)
    return dense_moments(dataset, dense, tuple(config.training.splits))
