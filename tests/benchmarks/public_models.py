"""Training speed beside the public implementations of the same methods (FuxiCTR's LongCTR), on the same samples.

    pip install --target public fuxictr==2.3.10
    python -m tests.benchmarks.public_models configs/ml1m --dataset datasets/ml1m --length 500 --public public
    python -m tests.benchmarks.public_models configs/ebnerd --dataset datasets/ebnerd --length 1000 --public public

A step is forward, backward, clipping and update, on batches that are ready in memory. Ours is that of `ranker train`
with the folder's din.yaml, the block at its defaults and, as theirs have it, attention to the latest 50 events beside
it (DIN alone: of all `length` events); theirs the model's `train_step` at the same embedding, attention and tower
widths. Their samples are our batches' candidates, each with its history's latest events padded to the longest of its
batch; samples are pooled over all batches and sorted by length first, which spares them most of the padding. The ways
alternate; the medians of the rounds are shown.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from features.batch import RequestBatch
from features.config_file import load_config
from features.dataset import Dataset
from features.moments import dense_moments
from features.progress import Progress
from features.selection import FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.ranks import Ranks, join_ranks
from ranker.training.source import ReadWhenAsked
from ranker.training.trainer import Trainer
from tests.benchmarks.machine import machine

METHODS = {
    "din": ("DIN", ""),
    "sim_soft": ("SIM", "{type: sim_soft, length: LENGTH}"),
    "eta": ("ETA", "{type: eta, length: LENGTH}"),
    "sdim": ("SDIM", "{type: sdim, length: LENGTH}"),
    "twin": ("TWIN", "{type: twin, length: LENGTH}"),
    "mirrn": ("MIRRN", "{type: mirrn, length: LENGTH}"),
}
Samples = tuple[dict[str, Tensor], dict[str, Tensor], Tensor]


def plain(name: str) -> str:
    """A feature's name as a module's, which has no dots."""
    return name.replace(".", "_")


def samples_of(batch: RequestBatch, spec: FeatureSpec, length: int) -> list[tuple[int, dict[str, Any]]]:
    """Each candidate of a batch with its own history, the latest `length` events: how many it has, and its columns."""
    columns = [*spec.sequence, *spec.event]
    values = {key: batch.sequence[key].values() for key in batch.sequence.keys()}  # noqa: SIM118
    users = {f.name: batch.request[f.name].values() for f in spec.request}
    bounds = zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), batch.end.tolist(), strict=True)
    found: list[tuple[int, dict[str, Any]]] = []
    for request, (first, last, end) in enumerate(bounds):
        start = max(int(batch.start[request]), end - length)
        history = {f.name: values[f"history:{f.name}"][start:end] for f in columns}
        user = {name: x[request] for name, x in users.items()}
        for candidate in range(first, last):
            target = {f.name: values[f"candidate:{f.name}"][candidate] for f in spec.sequence}
            label = batch.labels[candidate, 0]
            found.append((end - start, {"history": history, "user": user, "target": target, "label": label}))
    return found


def padded(samples: list[tuple[int, dict[str, Any]]], spec: FeatureSpec) -> Samples:
    """A batch as LongCTR reads it: what the user has, of each item of the padded histories and the target, the mask."""
    longest = max(50, *(count for count, _ in samples))  # with fewer, LongCTR's mask of the latest 50 does not fit
    mask = torch.zeros(len(samples), longest)
    items = {f.name: torch.zeros(len(samples), longest + 1, dtype=torch.int64) for f in (*spec.sequence, *spec.event)}
    for row, (count, sample) in enumerate(samples):
        mask[row, longest - count :] = 1.0
        for name, column in items.items():
            column[row, longest - count : longest] = sample["history"][name]
            column[row, longest] = sample["target"].get(name, 0)
    user = {plain(f.name): torch.stack([sample["user"][f.name] for _, sample in samples]) for f in spec.request}
    user["label"] = torch.stack([sample["label"] for _, sample in samples])
    return user, {plain(name): x.flatten() for name, x in items.items()}, mask


def public_step(name: str, spec: FeatureSpec, config: TrainConfig, length: int) -> Callable[[Samples], None]:
    """The training step of LongCTR's model of this name."""
    width = {"type": "categorical", "embedding_dim": config.tables.dim}
    features = {plain(f.name): {**width, "source": "user", "vocab_size": f.size} for f in spec.request}
    features |= {
        plain(f.name): {**width, "source": "item", "vocab_size": f.size} for f in (*spec.sequence, *spec.event)
    }
    feature_map = SimpleNamespace(
        features=features, labels=["label"], dataset_id="benchmark", data_dir=".", group_id=None,
        sum_emb_out_dim=lambda: len(features) * config.tables.dim,
    )  # fmt: skip
    options: dict[str, Any] = {
        "embedding_dim": config.tables.dim, "dnn_hidden_units": config.model.tower.hidden, "learning_rate": 1e-3,
        "optimizer": "adam", "loss": "binary_crossentropy", "task": "binary_classification", "metrics": ["AUC"],
        "verbose": 0, "model_root": ".", "gpu": -1, "short_seq_len": 50,
    }  # fmt: skip
    if name == "DIN":
        assert config.model.short is not None
        options |= {"attention_hidden_units": config.model.short.hidden, "attention_hidden_activations": "ReLU"}
    else:
        options |= {"attention_dim": 32, "num_heads": 2}
    options |= {"SDIM": {"num_hashes": 16, "hash_bits": 3}, "MIRRN": {"max_len": length}}.get(name, {})
    model = getattr(importlib.import_module(f"model_zoo.LongCTR.{name}"), name)(feature_map, **options)
    model._max_gradient_norm, model._batch_index = config.optimizer.clip_norm, 0
    model.train()

    def step(batch: Samples) -> None:
        user, items, mask = batch
        model.train_step((dict(user), dict(items), mask))

    return step


def rate(step: Callable[[Any], None], batches: list[Any], samples: int) -> float:
    """Samples a second."""
    began = time.perf_counter()
    for batch in batches:
        step(batch)
    return samples / (time.perf_counter() - began)


def compare(given: argparse.Namespace, method: str, ranks: Ranks) -> None:
    """One line: both speeds and their ratio."""
    public, block = METHODS[method]
    options = [f"dataset={given.dataset}", f"training.threads={given.threads}", "tasks.conversion=null"]
    options += [f"training.log_every={sys.maxsize}"]
    if block:
        beside = block.replace("LENGTH", str(given.length))
        options += ["model.short=null", f"model.long=[{{type: target_attention, length: 50}}, {beside}]"]
    else:
        options += [f"model.short.length={given.length}"]
    config = load_config(given.configs / "din.yaml", TrainConfig, options)
    dataset = Dataset(config.dataset)
    spec = resolve(config.features, dataset.manifest)
    dense = (*spec.request_dense, *spec.candidate_dense, *spec.event_dense)
    trainer = Trainer(config, dataset, dense_moments(dataset, dense, tuple(config.training.splits)), ranks)
    ours = [batch for batch, _ in zip(trainer.loader.batches(0, 0), range(given.batches), strict=False)]
    samples = sorted((s for batch in ours for s in samples_of(batch, spec, given.length)), key=lambda s: s[0])
    size = -(-len(samples) // given.batches)
    theirs = [padded(samples[a : a + size], spec) for a in range(0, len(samples), size)]
    quiet = Progress("train", sys.maxsize, shown=False)
    ways: dict[str, tuple[Callable[[Any], None], list[Any]]] = {
        "ours": (lambda batch: trainer.step(ReadWhenAsked(iter([batch]), ranks.device), 1, quiet), ours),
        "public": (public_step(public, spec, config, given.length), theirs),
    }
    torch.set_num_threads(given.threads)
    rates: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(given.rounds + 1):
        for way, (step, batches) in ways.items():
            measured = rate(step, batches[:2] if round_ == 0 else batches, len(samples))
            if round_ > 0:
                rates[way].append(measured)
    found = {way: statistics.median(values) for way, values in rates.items()}
    mean = statistics.mean(count for count, _ in samples)
    print(
        f"| {method} | {found['ours']:,.0f} | {found['public']:,.0f} | {found['ours'] / found['public']:.1f} | "
        f"{len(samples) // given.batches} | {mean:.0f} |",
        flush=True,
    )


def main() -> None:
    """Print machine, sizes and a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, help="folder of the dataset's configs")
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--public", type=Path, required=True, help="folder with fuxictr and model_zoo")
    parser.add_argument("--length", type=int, default=500)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    sys.path.append(str(given.public))
    print(f"machine   {machine('torch', 'torchrec')}")
    print(f"sizes     {given.dataset.name}, histories of at most {given.length:,}, {given.threads} threads")
    print("| method | ours, samples/s | LongCTR, samples/s | ratio | samples a batch | mean history |\n|" + "---|" * 6)
    with join_ranks("cpu", given.threads) as ranks:
        for method in given.methods:
            compare(given, method, ranks)


if __name__ == "__main__":
    main()
