"""Training: the loop, validation, early stopping, checkpoints. Started by `ranker train` and :mod:`ranker.train`.

One step of it is in :mod:`ranker.training.learner`.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from features.dataset import Dataset
from features.errors import UserError
from features.loader import Loader, Selection
from features.moments import dense_moments
from features.progress import Progress, log
from features.selection import FeatureSpec, resolve
from ranker.blocks import Codewords
from ranker.config import TrainConfig
from ranker.doctor import ensure_healthy
from ranker.evaluation.metrics import Predictions, task_metrics
from ranker.evaluation.predict import predict, refuse_not_finite, scoring_loader, selection_of
from ranker.model import Moments, Ranker
from ranker.planning.reads import reads_of
from ranker.ranks import Ranks, join_ranks
from ranker.run import Run, codewords_of, refuse_existing, training_alone, write_json
from ranker.tables.embeddings import load_content
from ranker.tables.managed_collision import refuse_unmanageable
from ranker.tables.sharding import describe_plan, shard
from ranker.training import checkpoint
from ranker.training.checkpoint import Position
from ranker.training.cost import TrainingCost, table_parameters
from ranker.training.divergence import Diverged, Divergence
from ranker.training.interruption import Interruption
from ranker.training.learner import Learner
from ranker.training.out_of_memory import naming_the_tables
from ranker.training.report import Report
from ranker.training.saver import Saver
from ranker.training.source import BatchSource, ReadAhead, ReadWhenAsked
from ranker.training.table_figures import managed_rows
from ranker.training.trace import Tracer
from ranker.training.warm_start import Source, TableRows, record_of, source_of, start_from


def build(spec: FeatureSpec, config: TrainConfig, moments: Moments, codewords: Codewords, held: bool = False) -> Ranker:
    """The unsharded ranker with tables on the meta device, the dense part from the seed; managed tables to train, or to
    be held."""
    torch.manual_seed(config.seed)
    return Ranker(spec, config, moments, codewords, torch.device("meta"), held)


class Trainer:
    """One training run on this rank: built from its config, then :meth:`fit`.

    Args:
        start: the checkpoint to go on from.
        source: the other run to start from, where there is no such checkpoint yet.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        moments: Moments,
        ranks: Ranks,
        start: Path | None = None,
        source: Source | None = None,
    ) -> None:
        self.config, self.ranks = config, ranks
        spec = resolve(config.features, dataset.manifest)
        refuse_unmanageable(config.tables, spec, dataset.manifest)
        selection = selection_of(config, dataset, spec)
        self.position = checkpoint.position_of(start) if start else Position(shards=1)
        self._settle_shards(dataset, selection)
        self.loader = self._training_loader(dataset, selection, self.position.shards, ranks.rank, ranks.world)
        self.validation = self._validation_loader(dataset, selection)
        model = build(spec, config, moments, codewords_of(config, dataset))
        tables = table_parameters(model.tables)
        # each rank's part of a table starts with values of its own, and those of its replicas with the same
        replicas = config.tables.replicas
        torch.manual_seed(config.seed + ranks.rank % max(ranks.world // replicas, 1))
        with naming_the_tables(model.tables, ranks):
            self.model, plan = shard(
                model, config.tables, ranks, reads_of(config, dataset, spec, ranks.world), replicas
            )
        load_content(self.model, spec, dataset)
        self.learner = Learner(config, self.model, ranks, Interruption())
        dense = sum(p.numel() for p in self.learner.dense_parameters)
        cost = TrainingCost(dense, tables, self.position.step)
        self.report = Report(1 if config.tasks.conversion is None else 2, cost, self.learner.clock, ranks)
        self.total = sys.maxsize
        self.divergence = Divergence(config.training.divergence, ranks, None)
        if ranks.first:
            for table, sharding, kernel, where in describe_plan(plan):
                log(f"table {table}: {sharding}, kernel {kernel}, ranks {where}")
            log(f"dense parameters: {cost.dense_parameters:,}")
        if start:
            checkpoint.load(start, self.model, self.learner.optimizer)
            if ranks.first:
                log(f"resumed from {start} at step {self.position.step}")
        self.carried: dict[str, TableRows] | None = None
        if source and not start:
            self.carried = start_from(source, config, dataset, self.model, self.learner.optimizer, ranks)

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
        if self.position.batch_in_epoch and now != before:
            batches_before, batches = (
                self._training_loader(dataset, selection, n, 0, 1).steps() for n in (before, now)
            )
            batch = self.position.batch_in_epoch * batches // batches_before
            if self.ranks.first:
                log(
                    f"{before} data shards are too few for {world} ranks, now {now}: the epoch goes on at batch "
                    f"{batch} of {batches}, where it was at {self.position.batch_in_epoch} of {batches_before}"
                )
            self.position.batch_in_epoch = batch
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
        config, position = self.config.training, self.position
        self.divergence = Divergence(config.divergence, self.ranks, root)
        saver = Saver(root, self.ranks, config.keep_checkpoints, config.asynchronous_checkpoints)
        most = sys.maxsize if config.max_steps is None else config.max_steps
        self.total = min(position.step + self._steps_ahead(), most)
        self.report.open(root, position.step)
        if self.carried is not None:  # what a resumed run starts from, and what the other run is worth on this dataset
            saver.save(self.model, self.learner.optimizer, position)
        progress = Progress("train", self.total, self.ranks.first, position.step)
        tracer = Tracer(root, self.ranks, config.trace_after, config.trace_steps)
        named = self.ranks.named(lambda: f"step {position.step + 1}")
        with self.learner.interruption.heard(), tracer.heard(), named, progress:
            try:
                while position.step < self.total and not self._patience_spent():
                    with closing(self._source()) as source:
                        self._rest_of_epoch(source, saver, tracer, progress)
            except Diverged:
                saver.finish()  # the checkpoint that was being written is one to go on from
                raise
            saver.finish()
        if self.ranks.first and self._patience_spent():
            log(f"stopped early: no gain in {position.stale_validations} validations")
        self.report.close()
        # a run that was resumed at its end keeps what it cost
        if self.ranks.first and (self.report.cost.steps or not (root / "training.json").exists()):
            write_json(root / "training.json", self.report.cost.content())

    def _rest_of_epoch(self, source: BatchSource, saver: Saver, tracer: Tracer, progress: Progress) -> None:
        """Step after step, with what is due between them, to the epoch's end or the run's."""
        config, position, epoch_batches = self.config.training, self.position, self.loader.steps()
        epoch_done = last = False
        while not (epoch_done or last):
            tracer.look(position.step)
            self.step(source, min(config.accumulate, epoch_batches - position.batch_in_epoch), progress)
            epoch_done = position.batch_in_epoch == epoch_batches
            if epoch_done:
                position.epoch += 1
                position.batch_in_epoch = 0
            last = position.step == self.total
            gained = False
            if self.validation and (last or self._due(config.validate_every, epoch_done)):
                self.learner.average_replicas()
                with source.paused():
                    gained = self._validate(self.validation)
            last = last or self._patience_spent()
            ending = self.learner.told
            if gained or last or ending or self._due(config.checkpoint_every, epoch_done):
                self.learner.average_replicas()
                saver.save(self.model, self.learner.optimizer, position)
                self.report.saved(self.model, position.step)
            else:
                saver.look()
            if ending and not last:
                saver.finish()
                if self.ranks.first:
                    log(f"told to end (SIGTERM) after step {position.step}; `--resume` goes on from there")
                raise SystemExit(128 + signal.SIGTERM)

    def _steps_ahead(self) -> int:
        """Steps of the epochs that are left; none where as many were trained before."""
        each, epoch_batches = self.config.training.accumulate, self.loader.steps()
        left = self.config.training.epochs - self.position.epoch
        if left <= 0:
            return 0
        return -(-(epoch_batches - self.position.batch_in_epoch) // each) + (left - 1) * -(-epoch_batches // each)

    def _source(self) -> BatchSource:
        """The epoch's batches from here on."""
        batches = self.loader.batches(self.position.epoch, self.position.batch_in_epoch)
        if self.config.training.read_ahead:
            return ReadAhead(batches, self.ranks.device, self.model, self.learner.optimizer)
        return ReadWhenAsked(batches, self.ranks.device)

    def _due(self, every: int | None, epoch_done: bool) -> bool:
        return self.position.step % every == 0 if every else epoch_done

    def _patience_spent(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.position.stale_validations >= patience

    def step(self, source: BatchSource, batches: int, progress: Progress) -> None:
        """Train on the next `batches`, or skip one, as `training.divergence` says.

        Raises:
            UserError: training diverged; on every rank.
            OutOfMemory: on this rank.
        """
        self.learner.step(source, batches, self.position, self.total, self.divergence, self.report.window)
        if self.position.step % self.config.training.log_every == 0 or self.position.step == self.total:
            rates = {"train/learning_rate": self.learner.adam.param_groups[0]["lr"]}
            skipped = {"train/skipped_batches": float(self.position.skipped)}
            found = rates | skipped | managed_rows(self.model, self.ranks)
            self.report.steps(self.position.step, found, progress)
        progress.advance()

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
        self.report.window.started += time.perf_counter() - started
        return gained

    def _measure(self, predictions: Predictions) -> float:
        """Log the metrics; the monitored one."""
        refuse_not_finite(predictions)
        step, monitor = self.position.step, self.config.training.monitor
        measured = task_metrics(predictions)
        for task, metrics in measured.items():
            for name in ("auc", "uauc", "logloss", "ne", "calibration"):
                number = getattr(metrics, name)
                if number is not None:
                    self.report.scalar(f"valid/{task}/{name}", number, step)
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


def train(config: TrainConfig, out: Path, resume: bool = False) -> None:
    """Train a run into the folder `out`, on this process or on the ranks it is one of.

    Args:
        resume: go on from the run's newest whole checkpoint; without a run in `out`, start one, so that a scheduler can
            start the same command again and again.

    Raises:
        UserError: an unhealthy toolchain, a config that does not fit the dataset or the run (or the one it starts
            from), a folder that exists (or, resuming, is no run).
    """
    ensure_healthy(config.training.device)
    options = config.training
    with join_ranks(options.device, options.threads, config.loader.workers, options.collective_timeout_s) as ranks:
        if resume and ranks.agree(lambda: _begun(out)):
            run = Run(out)
            with training_alone(out, ranks):
                run.go_on_with(config)
                start, dataset = checkpoint.newest_whole(out, ranks), run.dataset()
                begun: Any = run.info.get("warm_start")
                source = None
                if begun and start is None:
                    source = ranks.agree(lambda: source_of(config, dataset, begun["checkpoint"]))
                trainer = Trainer(config, dataset, run.moments(), ranks, start, source)
                if ranks.first:
                    run.save_config()
                trainer.fit(out)
        else:
            refuse_existing(out)
            dataset = Dataset(config.dataset)
            warm = config.warm_start
            source = ranks.agree(lambda: source_of(config, dataset) if warm.run else None)
            of_source = source.run.moments() if source and warm.moments == "keep" else None
            moments = of_source if of_source is not None else ranks.agree(lambda: _moments(config, dataset))
            # the folder comes last: what is refused until here leaves nothing behind
            trainer = Trainer(config, dataset, moments, ranks, source=source)
            record = record_of(source, trainer.carried or {}) if source else None
            ranks.agree(lambda: Run.create(out, config, dataset, moments, ranks.world, record).root)
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
