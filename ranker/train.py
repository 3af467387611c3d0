"""Train a ranker: `ranker train CONFIG --out RUN`, or on many ranks
`torchx run -s local_cwd dist.ddp -j 1x2 -m ranker.train -- CONFIG --out RUN`.

A step's loss is the mean over the candidates of all ranks, so that the numbers do not depend on how many ranks share a global batch.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard.writer import SummaryWriter

from features.batch import RequestBatch
from features.config_file import load_config
from features.dataset import Dataset
from features.errors import UserError
from features.loader import Loader, Selection
from features.moments import dense_moments
from features.selection import FeatureSpec, resolve
from ranker import checkpoint
from ranker.checkpoint import Position
from ranker.config import TrainConfig
from ranker.doctor import ensure_healthy
from ranker.metrics import task_metrics
from ranker.model import Ranker
from ranker.predict import predict, selection_of
from ranker.progress import Progress, log
from ranker.ranks import Ranks, join_ranks
from ranker.run import Run, RunError, refuse_existing, write_json
from ranker.sharding import describe_plan, optimizer_of, shard
from ranker.towers import esmm_loss


def build(spec: FeatureSpec, config: TrainConfig, moments: dict[str, tuple[float, float]]) -> Ranker:
    """The unsharded ranker with tables on the meta device, the dense part from the seed."""
    torch.manual_seed(config.seed)
    return Ranker(spec, config, moments, device=torch.device("meta"))


@dataclass
class _Window:
    """Sums since the last log line."""

    losses: Tensor
    candidates: float = 0.0
    requests: float = 0.0
    clicks: float = 0.0
    started: float = 0.0


class Trainer:
    """One training run on this rank: built from its config, then :meth:`fit`."""

    def __init__(self, config: TrainConfig, dataset: Dataset, run_root: Path, moments: dict[str, tuple[float, float]], ranks: Ranks) -> None:
        self.config, self.ranks, self.root = config, ranks, run_root
        spec = resolve(config.features, dataset.manifest)
        selection = selection_of(config, dataset, spec)
        self.model, plan = shard(build(spec, config, moments), config.tables, ranks)
        torch.manual_seed(config.seed + 1 + ranks.rank)  # dropout differs by rank
        self.optimizer, self.dense_optimizer = optimizer_of(self.model, config.optimizer)
        if ranks.first:
            for table, sharding, kernel, where in describe_plan(plan):
                log(f"table {table}: {sharding}, kernel {kernel}, ranks {where}")
            dense = sum(p.numel() for p in self.model.module.dense.parameters())  # type: ignore[union-attr]
            log(f"dense parameters: {dense:,}")
        training = config.training
        self.loader = Loader(
            dataset, tuple(training.splits), selection, config.loader, config.seed, True, ranks.rank, ranks.world
        )
        self.validation = self._validation_loader(dataset, selection)
        self.dense_parameters = [p for group in self.dense_optimizer.param_groups for p in group["params"]]
        self.writer = SummaryWriter(str(run_root / "tensorboard")) if ranks.first else None
        self.position = Position()

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
        return Loader(dataset, (split,), selection, self.config.loader, rank=self.ranks.rank, world=self.ranks.world)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        self.position = checkpoint.load(path, self.model, self.optimizer, self.ranks)
        if self.ranks.first:
            log(f"resumed from {path} at step {self.position.step}")

    def fit(self) -> None:
        """Train to the end: all epochs, the step limit, or patience spent."""
        config = self.config.training
        epoch_steps = self.loader.steps()
        total = epoch_steps * config.epochs
        if config.max_steps is not None:
            total = min(total, config.max_steps)
        self.window = self._new_window()
        with Progress("train", total, self.ranks.first, self.position.step) as progress:
            while self.position.epoch < config.epochs and self.position.step < total and not self._patience_spent():
                for batch in self.loader.batches(self.position.epoch, self.position.step_in_epoch):
                    self._step(batch.to(self.ranks.device), progress)
                    self.position.step_in_epoch += 1
                    epoch_done = self.position.step_in_epoch == epoch_steps
                    if epoch_done:
                        self.position.epoch += 1
                        self.position.step_in_epoch = 0
                    last = self.position.step == total
                    every = config.validate_every
                    gained = False
                    if self.validation and (last or (self.position.step % every == 0 if every else epoch_done)):
                        gained = self._validate()
                        self.window = self._new_window()
                    every = config.checkpoint_every
                    if gained or last or self._patience_spent() or (self.position.step % every == 0 if every else epoch_done):
                        self._save(gained)
                    if epoch_done or last or self._patience_spent():
                        break
        if self.ranks.first and self._patience_spent():
            log(f"stopped early: no gain in {self.position.stale_validations} validations")
        if self.writer:
            self.writer.close()

    def _patience_spent(self) -> bool:
        patience = self.config.training.patience
        return patience is not None and self.position.stale_validations >= patience

    def _step(self, batch: RequestBatch, progress: Progress) -> None:
        self.model.train()
        for group in self.dense_optimizer.param_groups:
            warmup = self.config.optimizer.warmup_steps
            group["lr"] = self.config.optimizer.lr * min(1.0, (self.position.step + 1) / warmup if warmup else 1.0)
        candidates = self.ranks.total(batch.candidates)
        losses = esmm_loss(self.model(batch), batch.labels)
        weights = torch.tensor([1.0, self.config.tasks.conversion_weight][: losses.numel()], device=losses.device)
        # ranks are averaged in the backward pass; times their number, this is the mean over all candidates
        loss = (losses * weights).sum() * (self.ranks.world / max(candidates, 1.0))
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.dense_parameters, self.config.optimizer.clip_norm)
        if not torch.isfinite(norm):
            raise UserError(
                f"step {self.position.step + 1}: the gradient is {float(norm)}; lower optimizer.lr or tables.lr, or look for "
                "extreme values in features.dense"
            )
        self.optimizer.step()
        self.position.step += 1
        self.window.losses += losses.detach()
        self.window.candidates += batch.candidates
        self.window.requests += batch.requests
        self.window.clicks += float(batch.labels[:, 0].sum())
        if self.position.step % self.config.training.log_every == 0:
            self._log(float(norm), progress)
        progress.advance()

    def _new_window(self) -> _Window:
        tasks = 1 if self.config.tasks.conversion is None else 2
        return _Window(torch.zeros(tasks, device=self.ranks.device), started=time.perf_counter())

    def _log(self, norm: float, progress: Progress) -> None:
        window, step = self.window, self.position.step
        seconds = time.perf_counter() - window.started
        candidates, requests, clicks = (self.ranks.total(x) for x in (window.candidates, window.requests, window.clicks))
        losses = [self.ranks.total(float(x)) / max(candidates, 1) for x in window.losses]
        rate = min(max(clicks / max(candidates, 1), 1e-7), 1 - 1e-7)
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
        scalars = dict(zip(("loss/ctr", "loss/ctcvr"), losses, strict=False))
        scalars |= {
            "train/ne": losses[0] / entropy,
            "train/gradient_norm": norm,
            "train/learning_rate": self.dense_optimizer.param_groups[0]["lr"],
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

    def _validate(self) -> bool:
        """Measure the validation split; whether the monitored metric gained. The same answer on every rank."""
        assert self.validation is not None
        predictions = predict(self.model, self.validation, self.config, self.ranks)
        value = 0.0
        monitor = self.config.training.monitor
        if predictions is not None:
            measured = task_metrics(predictions)
            for task, metrics in measured.items():
                for name in ("auc", "uauc", "logloss", "ne", "calibration"):
                    number = getattr(metrics, name)
                    if self.writer and number is not None:
                        self.writer.add_scalar(f"valid/{task}/{name}", number, self.position.step)
            ctr = measured["ctr"]
            watched = getattr(ctr, monitor)
            if watched is None:
                raise UserError(f"training.monitor: {monitor} is undefined on the validation split (one class only)")
            value = float(watched)
            log(f"step {self.position.step}: valid auc {ctr.auc:.4f}  uauc {ctr.uauc or float('nan'):.4f}  log loss {ctr.logloss:.4f}  ne {ctr.ne:.4f}")
        value = self.ranks.total(value)
        better = value if monitor in ("auc", "uauc") else -value
        gained = self.position.best is None or better > self.position.best
        if gained:
            self.position.best, self.position.stale_validations = better, 0
        else:
            self.position.stale_validations += 1
        return gained

    def _save(self, gained: bool) -> None:
        folder = self.root / "checkpoints"
        path = folder / f"step-{self.position.step:08d}"
        checkpoint.save(path, self.model, self.optimizer, self.position, self.ranks)
        if not self.ranks.first:
            return
        best = folder / "best.json"
        if gained:
            write_json(best, {"checkpoint": path.name, "monitor": self.config.training.monitor, "value": self.position.best})
        keep = {p.name for p in sorted(folder.glob("step-*"))[-self.config.training.keep_checkpoints :]}
        if best.is_file():
            keep.add(Run(self.root).best().name)
        for old in folder.glob("step-*"):
            if old.name not in keep:
                shutil.rmtree(old)


def train(config: TrainConfig, out: Path, resume: bool = False) -> None:
    """Train a run into the folder `out`, on this process or on the ranks it is one of.

    Raises:
        UserError: an unhealthy toolchain, a config that does not fit the dataset, a folder that exists (or, resuming, does not).
    """
    ensure_healthy()
    dataset = Dataset(config.dataset)
    with join_ranks(config.training.device, config.training.threads, config.loader.workers) as ranks:
        random.seed(config.seed)
        np.random.seed(config.seed)
        if resume:
            run = Run(out)
            dataset, moments = run.dataset(), run.moments()
            _refuse_changed_model(run.config, config)
        else:
            refuse_existing(out)
            spec = resolve(config.features, dataset.manifest)
            dense = (*spec.request_dense, *spec.candidate_dense, *spec.event_dense)
            moments = dense_moments(dataset, dense, tuple(config.training.splits))
            ranks.barrier()
            if ranks.first:
                Run.create(out, config, dataset, moments, ranks.world)
            ranks.barrier()
        trainer = Trainer(config, dataset, out, moments, ranks)
        if resume:
            if checkpoints := Run(out).checkpoints():
                trainer.resume(checkpoints[-1])
        trainer.fit()


def _refuse_changed_model(old: TrainConfig, new: TrainConfig) -> None:
    """A resumed run may train longer, not differently."""
    for part in ("seed", "features", "tables", "model", "tasks", "loader"):
        if getattr(old, part) != getattr(new, part):
            raise RunError(f"{part}: differs from the run's own config.yaml; resume with that one, or start a new run")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ranker.train`` and of `torchx run`."""
    parser = argparse.ArgumentParser(prog="ranker.train", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args(arguments)
    try:
        train(load_config(given.config, TrainConfig, given.set), given.out, given.resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
