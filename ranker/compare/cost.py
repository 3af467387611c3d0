"""What a method costs alone: time of `encode` a request and of `read` a candidate, and the memory of a user, as
histories grow.

Measured are DIN on the short history and every long-sequence block of a run's config, of the run's widths, with fresh
weights and generated histories of exactly L events, of which DIN reads its latest `length`; in a method without a block
DIN reads all L, and has no `encode`: it keeps the events. A block's memory is what its `encode` returns. One thread,
no gradients, the median of repeats; of the process's processor time, so that others' work on the machine counts for
less.

    python -m ranker.compare.cost JOBS
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from features.config_file import load_config
from features.dataset import Dataset
from features.selection import FeatureSpec, resolve
from ranker.blocks import Block, Codewords
from ranker.config import TrainConfig
from ranker.freed_memory import keep_freed_memory
from ranker.longseq import History, Target
from ranker.machine import machine
from ranker.run import codebooks_of, codewords_of, write_json
from ranker.towers import DIN

T = TypeVar("T")
_LEAST_S, _MOST = 0.05, 500
"""a call is repeated for so long, but at most so often"""


class PartCost(NamedTuple):
    """Of DIN or one block."""

    part: str
    encode_us: float
    read_us: float
    memory_bytes: int


class MethodCost(NamedTuple):
    """Of all that reads histories, at one length. encode_us: a request; read_us: a candidate; memory_bytes: what the
    blocks keep of a user (without a block: DIN)."""

    length: int
    encode_us: float
    read_us: float
    memory_bytes: int
    parts: list[PartCost]


class Sizes(NamedTuple):
    """Of the generated request."""

    candidates: int
    groups: int
    repeats: int


def recorded_sizes(sizes: Sizes, lengths: Sequence[int]) -> dict[str, object]:
    """What a measurement is recognised by, beside :func:`timed_part`."""
    return {**sizes._asdict(), "lengths": list(lengths)}


def timed_part(config: TrainConfig) -> dict[str, object]:
    """What of a run's config and dataset decides its cost; rows that differ in length alone share it."""
    model = config.model.model_copy(update={"long": [b.model_copy(update={"length": 0}) for b in config.model.long]})
    if not model.long and model.short is not None:
        model = model.model_copy(update={"short": model.short.model_copy(update={"length": 0})})
    kept: dict[str, object] = model.model_dump(mode="json", include={"short", "long"})
    dataset = Dataset(config.dataset)
    data = {"dataset": dataset.manifest.content_hash, "codebooks": codebooks_of(config, dataset)}
    return kept | data | {"features": config.features.model_dump(mode="json"), "dim": config.tables.dim}


def measure_cost(config: TrainConfig, dataset: Dataset, length: int, sizes: Sizes) -> MethodCost:
    """The cost of a run's method at a length of at least 1."""
    spec = resolve(config.features, dataset.manifest)
    torch.manual_seed(0)
    history, target = generated_request(spec, config.tables.dim, length, sizes)
    parts = list[PartCost]()
    short = config.model.short
    if short is not None:
        reads = short.length if config.model.long else 0
        din = DIN(target.x.size(1), **short.model_copy(update={"length": reads}).model_dump())
        parts.append(_din(din, history, target, sizes))
    codewords = codewords_of(config, dataset)
    for i in range(len(config.model.long)):
        parts.append(_block(config, i, spec, codewords, history, target, sizes))
    kept = parts[-len(config.model.long) :]  # without a block: all there is
    return MethodCost(
        length,
        sum(part.encode_us for part in parts),
        sum(part.read_us for part in parts),
        sum(part.memory_bytes for part in kept),
        parts,
    )


def generated_request(spec: FeatureSpec, dim: int, length: int, sizes: Sizes) -> tuple[History, Target]:
    """One request with `length` events an hour apart, each of ``features.codes`` skewed as codes are (Zipf); its
    candidates, and their codes, `groups` distinct ones."""
    width, rng = dim * len(spec.sequence), np.random.default_rng(0)
    columns = [rng.zipf(1.2, length) % max(f.size - 1, 1) + 1 for f in spec.codes]
    code = torch.from_numpy(np.stack(columns, 1)) if columns else torch.zeros(length, 0, dtype=torch.int64)
    time_ms = torch.arange(length) * 3_600_000
    history = History(
        torch.randn(length, width), time_ms, torch.zeros(1, dtype=torch.int64), torch.tensor([length]),
        time_ms[-1:] + 60_000, code, torch.randn(length, sum(f.dim for f in spec.content)),
    )  # fmt: skip
    offsets = torch.tensor([0, sizes.candidates])
    asked = torch.arange(sizes.candidates) % sizes.groups
    groups = [asked % max(f.size - 1, 1) + 1 for f in spec.codes]
    codes = torch.stack(groups, 1) if groups else torch.zeros(sizes.candidates, 0, dtype=torch.int64)
    candidates = torch.randn(sizes.candidates, width)
    return history, Target(candidates, offsets, torch.zeros(0, dtype=torch.int64), codes)


def _din(din: DIN, history: History, target: Target, sizes: Sizes) -> PartCost:
    events = min(din.length or history.x.size(0), history.x.size(0))
    read_s, _ = _median_s(lambda: din.eval()(history, target), sizes.repeats)
    return PartCost("DIN", 0.0, 1e6 * read_s / sizes.candidates, 4 * events * history.x.size(1))


def _block(
    config: TrainConfig, index: int, spec: FeatureSpec, codewords: Codewords, history: History, target: Target,
    sizes: Sizes,
) -> PartCost:  # fmt: skip
    whole = config.model.long[index].model_copy(update={"length": history.x.size(0)})
    block = Block(index, whole, spec, config.tables.dim, codewords).eval()
    own_history, probes, own_target = block.inputs(history, target)
    method = cast(Any, block.block)
    encode_s, memory = _median_s(lambda: method.encode(own_history, probes), sizes.repeats)
    read_s, _ = _median_s(lambda: method.read(memory, own_target), sizes.repeats)
    return PartCost(whole.type, 1e6 * encode_s, 1e6 * read_s / sizes.candidates, stored_bytes(memory))


def stored_bytes(memory: object) -> int:
    """Of all tensors of a memory, which may hold another's."""
    if isinstance(memory, Tensor):
        return memory.numel() * memory.element_size()
    return sum(stored_bytes(part) for part in cast("tuple[object, ...]", memory)) if isinstance(memory, tuple) else 0


def _median_s(run: Callable[[], T], repeats: int) -> tuple[float, T]:
    """Median seconds of a call, and its result. The first call, untimed, warms up; short ones are repeated longer."""
    times: list[float] = []
    with torch.no_grad():
        result = run()
        while len(times) < repeats or (sum(times) < _LEAST_S and len(times) < _MOST):
            began = time.process_time()
            run()
            times.append(time.process_time() - began)
    return statistics.median(times), result


class Job(BaseModel):
    """One method to time."""

    config: Path
    """of a run"""
    lengths: list[int]
    sizes: Sizes
    out: Path
    """JSON file to write"""


def run_job(job: Job) -> None:
    """Time one method, write its file."""
    config = load_config(job.config, TrainConfig)
    dataset = Dataset(config.dataset)
    measured = [measure_cost(config, dataset, length, job.sizes) for length in job.lengths]
    costs = [cost._asdict() | {"parts": [part._asdict() for part in cost.parts]} for cost in measured]
    about = {"sizes": recorded_sizes(job.sizes, job.lengths), "of": timed_part(config)}
    write_json(job.out, {"machine": machine("torch", threads=1), **about, "costs": costs})


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ranker.compare.cost``: one job."""
    parser = argparse.ArgumentParser(prog="ranker.compare.cost", description="what a run's method costs alone")
    parser.add_argument("job", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()  # as a server does: else a read of the same size takes 11 or 38 µs, by the system's new pages
    run_job(Job.model_validate_json(given.job.read_text()))


if __name__ == "__main__":
    main()
