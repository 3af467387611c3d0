"""A training step on requests against one on rows: one request with 16 candidates, or one row per candidate.

    python -m tests.benchmarks.request_step [--threads 1] [--length 1000] [--repeats 9]

Both ways run the same model with the same weights on the same 32 × 16 candidates. Request-level: a batch of 32
requests, each with one history. Row-level, the named alternative: 512 requests of one candidate, each with its own copy
of the history. A step is the one of `ranker train`: look-ups in TorchRec tables sharded on one rank, DIN on the latest
50 events, attention to all, tower, backward with the fused row-wise Adagrad, clipping, Adam. Ids are skewed as those of
logs are. The ways alternate; medians are reported. First, the two ways' losses and gradients are compared, in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from features.batch import RequestBatch, from_tensors
from features.selection import Feature, FeatureSpec
from ranker.config import ModelConfig, OptimizerConfig, TablesConfig, TrainConfig
from ranker.model import Plain, Ranker, Scores
from ranker.ranks import join_ranks
from ranker.tables.embeddings import Embedded
from ranker.tables.sharding import optimizer_of, shard
from ranker.towers import esmm_loss
from tests.benchmarks.machine import machine

ITEM = Feature("item", "item", "categorical", 100_000)
CATEGORY = Feature("item.category", "item", "categorical", 1_000)
USER = Feature("user", "user", "categorical", 10_000)
SPEC = FeatureSpec(
    request=(USER,),
    candidate=(ITEM, CATEGORY),
    request_dense=(),
    candidate_dense=(),
    sequence=(ITEM, CATEGORY),
    event=(),
    event_dense=(),
)
ATTENTION = {"type": "target_attention", "heads": 2, "head_dim": 16}
MODELS = {
    "DIN-50 + attention": ModelConfig.model_validate({"long": [ATTENTION]}),
    "attention only": ModelConfig.model_validate({"short": None, "long": [ATTENTION]}),
}


def config_of(model: ModelConfig) -> TrainConfig:
    """A run's config around `model`."""
    return TrainConfig(name="request_step", dataset=Path("none"), tables=TablesConfig(dim=16), model=model)


def request_level(requests: int, candidates: int, length: int) -> dict[str, Tensor]:
    """A batch of random requests as plain tensors."""
    generator = torch.Generator().manual_seed(0)

    def ids(feature: Feature, count: int) -> Tensor:
        return (torch.rand(count, generator=generator) ** 3 * feature.size).long()

    rows, events = requests * candidates, requests * length
    target = [ids(feature, rows) for feature in SPEC.sequence]
    history = [ids(feature, events) for feature in SPEC.sequence]
    gaps_ms = torch.randint(1, 3_600_000, [requests, length], generator=generator)
    event_time = gaps_ms.cumsum(1)
    return {
        "request.values": torch.arange(requests),
        "request.lengths": torch.ones(requests, dtype=torch.int64),
        "candidate.values": torch.cat(target),
        "candidate.lengths": torch.ones(2 * rows, dtype=torch.int64),
        "sequence.values": torch.cat([*history, *target]),
        "sequence.lengths": torch.tensor([length] * 2 * requests + [candidates] * 2 * requests),
        "request_dense": torch.zeros(requests, 0),
        "candidate_dense": torch.zeros(rows, 0),
        "event_dense": torch.zeros(events, 0),
        "event_codes": torch.zeros(events, 0, dtype=torch.int64),
        "candidate_codes": torch.zeros(rows, 0, dtype=torch.int64),
        "event_time": event_time.flatten(),
        "now": event_time[:, -1] + 60_000,
        "start": torch.arange(requests) * length,
        "end": (torch.arange(requests) + 1) * length,
        "offsets": torch.arange(requests + 1) * candidates,
        "labels": torch.randint(0, 2, [rows, 1], generator=generator).float(),
        "user": torch.arange(requests),
        "item": target[0],
        "history_length": torch.full([requests], length),
        "oracles": torch.zeros(rows, 0),
    }


def row_level(batch: dict[str, Tensor], requests: int, candidates: int, length: int) -> dict[str, Tensor]:
    """The same candidates, each a request of its own with its own copy of the history."""
    rows, events = requests * candidates, requests * length

    def copied(x: Tensor) -> Tensor:
        return x.view(requests, length).repeat_interleave(candidates, 0).flatten()

    items, categories, target = batch["sequence.values"].split([events, events, 2 * rows])
    out = dict(batch)
    for name in ("now", "user", "history_length", "request.values", "request.lengths"):
        out[name] = batch[name].repeat_interleave(candidates)
    out["sequence.values"] = torch.cat([copied(items), copied(categories), target])
    out["sequence.lengths"] = torch.tensor([length] * 2 * rows + [1] * 2 * rows)
    out["event_time"] = copied(batch["event_time"])
    out["event_dense"] = torch.zeros(rows * length, 0)
    out["event_codes"] = torch.zeros(rows * length, 0, dtype=torch.int64)
    out["request_dense"] = torch.zeros(rows, 0)
    out["start"] = torch.arange(rows) * length
    out["end"] = out["start"] + length
    out["offsets"] = torch.arange(rows + 1)
    return out


def mean_loss(scores: Scores, batch: RequestBatch) -> Tensor:
    """Over the candidates."""
    return esmm_loss(scores.logits, batch.labels.to(scores.logits.dtype)).sum() / batch.candidates


def greatest_differences(model: ModelConfig, ways: list[dict[str, Tensor]]) -> tuple[float, float, float]:
    """Between two ways, relative: of the loss, of the gradients of the dense part, of those of the tables.

    Float64 but for the tables: TorchRec reads them, and sums their gradients, in float32. A gradient's difference is
    its greatest entry's, over the gradient's greatest entry.
    """
    torch.manual_seed(0)
    ranker = Ranker(SPEC, config_of(model), {}, device=torch.device("cpu"))
    ranker.dense.double()
    tables, dense = list(ranker.tables.parameters()), list(ranker.dense.parameters())
    with torch.no_grad():
        for table in tables:
            table.mul_(30)  # far from zero, where attention is not uniform
    losses: list[Tensor] = []
    gradients: list[tuple[Tensor, ...]] = []
    for way in ways:
        batch = from_tensors(SPEC, way)
        embedded = ranker.tables(batch.request, batch.candidate, batch.sequence)
        plain = Plain(*(x.double() if x.is_floating_point() else x for x in (getattr(batch, f) for f in Plain._fields)))
        loss = mean_loss(ranker.dense(Embedded(*(x.double() for x in embedded)), plain), batch)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, dense + tables))
    of_loss = float((losses[0] - losses[1]).abs() / losses[0].abs())
    of_gradient = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(*gradients, strict=True)]
    return of_loss, max(of_gradient[: len(dense)]), max(of_gradient[len(dense) :])


class Step:
    """One training step of a sharded ranker, with its optimisers."""

    def __init__(self, model: DistributedModelParallel) -> None:
        self.model = model
        self.optimizer, dense = optimizer_of(model, OptimizerConfig())
        self.dense_parameters = [p for group in dense.param_groups for p in group["params"]]

    def __call__(self, batch: RequestBatch) -> None:
        loss = mean_loss(self.model(batch), batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.dense_parameters, 10.0)
        self.optimizer.step()


def seconds(step: Step, batch: RequestBatch) -> tuple[float, float]:
    """Wall time and processor time of one step."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    step(batch)
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def compare(step: Step, batches: dict[str, RequestBatch], repeats: int) -> str:
    """Medians of both ways and of their ratio, in wall time and in processor time, which other load disturbs less.

    The first, untimed, round warms up.
    """
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in batches}
    for repeat in range(repeats + 1):
        for way, batch in batches.items():
            took = seconds(step, batch)
            if repeat:
                times[way].append(took)
    shown: list[str] = []
    for clock, name in enumerate(("wall", "processor")):
        ours, rows = ([1e3 * took[clock] for took in times[way]] for way in ("requests", "rows"))
        ratios = [b / a for a, b in zip(ours, rows, strict=True)]
        shown.append(
            f"{name} time: requests {statistics.median(ours):.0f} ms, rows {statistics.median(rows):.0f} ms, "
            f"ratio {statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"
        )
    return "; ".join(shown)


def main() -> None:
    """Print machine, sizes, differences, medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--profile", action="store_true", help="where the request-level step spends its time")
    options = parser.parse_args()
    sizes = options.requests, options.candidates, options.length
    print(f"machine   {machine('torch', 'torchrec')}")
    print(f"sizes     {sizes[0]} requests × {sizes[1]} candidates, histories of {sizes[2]:,}, 2 features of width 16")
    ours = request_level(*sizes)
    rows = row_level(ours, *sizes)
    batches = {"requests": from_tensors(SPEC, ours), "rows": from_tensors(SPEC, rows)}
    for name, model in MODELS.items():
        of_loss, of_dense, of_tables = greatest_differences(model, [ours, rows])
        print(f"{name}")
        print(f"  differ by {of_loss:.0e} (loss), {of_dense:.0e} (gradients), {of_tables:.0e} (tables', float32)")
        config = config_of(model)
        with join_ranks("cpu", 1, 0) as ranks:
            torch.manual_seed(0)
            sharded, _ = shard(Ranker(SPEC, config, {}, device=torch.device("meta")), config.tables, ranks, {})
            step = Step(sharded)
            for threads in options.threads:
                torch.set_num_threads(threads)
                print(
                    f"  {threads} thread{'s' if threads > 1 else ''}: {compare(step, batches, options.repeats)}",
                    flush=True,
                )
            if options.profile:
                torch.set_num_threads(1)
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                    step(batches["requests"])
                print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


if __name__ == "__main__":
    main()
