"""Steps of `ranker train` against a plain PyTorch loop over the same model without TorchRec, one process.

    python -m tests.benchmarks.overhead configs/synthetic/uxsid.yaml --dataset demo/dataset [--steps 30]

The plain loop, the named alternative, is what one would write for one machine: ``nn.EmbeddingBag`` and ``nn.Embedding``
with sparse gradients and PyTorch's Adagrad for the tables, Adam for the rest, the same dense modules, loss and
clipping, and nothing else: no sharding, no fused kernels, no check of the loss, no times by part. Both read the same
batches, made beforehand, and start from the same parameters; the losses of the first steps are compared, and say that
both train the same model. Rounds alternate; medians are reported, and where our step's time goes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import RequestBatch
from features.config_file import load_config
from features.dataset import Dataset
from features.moments import dense_moments
from features.progress import Progress
from features.selection import Feature, FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.export import unsharded
from ranker.model import Ranker, plain_of
from ranker.ranks import join_ranks
from ranker.tables.embeddings import Embedded
from ranker.towers import click_losses, esmm_loss
from ranker.training.source import ReadWhenAsked
from ranker.training.trainer import Trainer
from tests.benchmarks.machine import machine


class PlainTables(nn.Module):
    """What :class:`ranker.tables.embeddings.Tables` computes, by PyTorch alone; starts with its weights."""

    def __init__(self, spec: FeatureSpec, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.spec = spec

        def weight_of(place: str, feature: Feature) -> Tensor:
            name = f"{place}.{feature.name}".replace(".", "_")
            return next(w.clone() for key, w in weights.items() if key.endswith(f"{name}.weight"))

        def bags(place: str, features: tuple[Feature, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.EmbeddingBag.from_pretrained(
                    weight_of(place, f), freeze=False, mode="mean" if f.kind == "bag" else "sum", sparse=True,
                    include_last_offset=True,
                )
                for f in features
            )  # fmt: skip

        def rows(features: tuple[Feature, ...]) -> nn.ModuleList:
            return nn.ModuleList(
                nn.Embedding.from_pretrained(weight_of("sequence", f), freeze=False, sparse=True) for f in features
            )

        self.request, self.candidate = bags("request", spec.request), bags("candidate", spec.candidate)
        self.shared, self.added = rows(spec.sequence), rows(spec.event)

    def forward(
        self, request: KeyedJaggedTensor, candidate: KeyedJaggedTensor, sequence: KeyedJaggedTensor
    ) -> Embedded:
        """As there."""
        by_key = sequence.to_dict()

        def pooled(tables: nn.ModuleList, ids: KeyedJaggedTensor, features: tuple[Feature, ...], rows: int) -> Tensor:
            of = ids.to_dict() if features else {}
            found = [
                table(of[f.name].values(), of[f.name].offsets()) for table, f in zip(tables, features, strict=True)
            ]
            return torch.cat([torch.zeros([rows, 0]), *found], 1)

        def events(key: str) -> Tensor:
            return torch.cat(
                [t(by_key[f"{key}:{f.name}"].values()) for t, f in zip(self.shared, self.spec.sequence, strict=True)], 1
            )

        event, target = events("history"), events("candidate")
        for table, feature in zip(self.added, self.spec.event, strict=True):
            event = event + table(by_key[f"history:{feature.name}"].values())
        return Embedded(
            pooled(self.request, request, self.spec.request, sequence.stride()),
            pooled(self.candidate, candidate, self.spec.candidate, target.size(0)),
            event,
            target,
            event[:, :0],
        )


class PlainLoop:
    """The plain loop's step."""

    def __init__(self, config: TrainConfig, spec: FeatureSpec, start: Ranker) -> None:
        self.config = config
        self.tables, self.dense = PlainTables(spec, start.tables.state_dict()), start.dense
        table = config.tables
        self.optimizers = [
            torch.optim.Adagrad(self.tables.parameters(), lr=table.lr, eps=table.eps),
            torch.optim.Adam(self.dense.parameters(), lr=config.optimizer.lr),
        ]

    def __call__(self, batch: RequestBatch) -> float:
        """Train on a batch; its loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        scores = self.dense(self.tables(batch.request, batch.candidate, batch.sequence), plain_of(batch))
        losses = esmm_loss(scores.logits, batch.labels) / batch.candidates
        loss = losses[0] + (self.config.tasks.conversion_weight * losses[1] if len(losses) > 1 else 0)
        of_blocks = click_losses(scores.click_logits, batch.labels) / batch.candidates
        loss = loss + scores.auxiliary + (of_blocks * of_blocks.new_tensor(self.config.search_weights)).sum()
        loss.backward()
        nn.utils.clip_grad_norm_(self.dense.parameters(), self.config.optimizer.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss.detach())


def main() -> None:
    """Print machine, sizes, losses of both, medians, ratio, our time by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=30, help="batches of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    options = [
        f"dataset={given.dataset}", f"training.threads={given.threads}", f"training.log_every={sys.maxsize}",
        "training.device=cpu", "tables.optimizer=adagrad", "features.content=[]", *given.set,
    ]  # fmt: skip
    config = load_config(given.config, TrainConfig, options)
    dataset = Dataset(config.dataset)
    spec = resolve(config.features, dataset.manifest)
    dense = (*spec.request_dense, *spec.candidate_dense, *spec.event_dense)
    moments = dense_moments(dataset, dense, tuple(config.training.splits))
    with join_ranks("cpu", given.threads) as ranks:
        trainer = Trainer(config, dataset, moments, ranks)
        run = SimpleNamespace(config=config, moments=lambda: moments, dataset=lambda: dataset)
        plain = PlainLoop(config, spec, unsharded(trainer.model, spec, run).train())  # type: ignore[arg-type]
        batches = [batch for batch, _ in zip(trainer.loader.batches(), range(given.steps), strict=False)]
        quiet = Progress("train", sys.maxsize, shown=False)

        def ours(batch: RequestBatch) -> float:
            trainer.step(ReadWhenAsked((b for b in [batch]), ranks.device), 1, quiet)
            return 0.0

        candidates = sum(batch.candidates for batch in batches)
        events = sum(batch.event_time.numel() for batch in batches)
        print(machine("torch", "torchrec", threads=given.threads))
        print(
            f"{given.config}: {len(batches)} batches a round, of {candidates / len(batches):,.0f} candidates and "
            f"{events / len(batches):,.0f} events, {sum(p.numel() for p in plain.tables.parameters()):,} table "
            f"parameters, {sum(p.numel() for p in plain.dense.parameters()):,} dense ones"
        )
        first: dict[str, list[float]] = {"plain": [plain(batch) for batch in batches], "ranker": []}
        for batch in batches:
            before = trainer.report.window.losses.clone(), trainer.report.window.auxiliary.clone()
            ours(batch)
            losses = (trainer.report.window.losses - before[0]) / batch.candidates
            weights = losses.new_tensor([1.0, config.tasks.conversion_weight])[: losses.numel()]
            auxiliary = trainer.report.window.auxiliary - before[1]
            first["ranker"].append(float((losses * weights).sum() + auxiliary))
        gap = max(abs(a - b) for a, b in zip(first["plain"], first["ranker"], strict=True))
        print(f"losses of the first {len(batches)} steps differ by {gap:.1e} at most, of {first['plain'][-1]:.4f}")
        trainer.learner.clock.read()
        ways: dict[str, Callable[[RequestBatch], float]] = {"ranker": ours, "plain": plain}
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(given.rounds):
            for way, step in ways.items():
                began = time.perf_counter()
                for batch in batches:
                    step(batch)
                spent[way].append((time.perf_counter() - began) / len(batches))
        ratios = [a / b for a, b in zip(spent["ranker"], spent["plain"], strict=True)]
        for way, times in spent.items():
            print(f"{way}: {1e3 * statistics.median(times):.1f} ms a step, {1 / statistics.median(times):.2f} steps/s")
        print(
            f"step of ranker train over the plain loop's: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}–{max(ratios):.2f})"
        )
        steps = given.rounds * len(batches)
        parts = {part: 1e3 * seconds / steps for part, seconds in trainer.learner.clock.read().items()}
        print("of ours, ms: " + ", ".join(f"{part} {ms:.1f}" for part, ms in parts.items()))


if __name__ == "__main__":
    main()
