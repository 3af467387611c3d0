"""Every compressor's pair as compiled packages: whether they compile, score as the trainer does, and what they gain.

    python -m tests.benchmarks.packages configs/synthetic --dataset demo/dataset [--methods uxsid hytrec]

For each compressor, the config TYPE.yaml of the folder with fresh weights, none of them zero: its user encoder and its
candidate ranker are compiled as `ranker export --compiled try` compiles them. Each package stands in the place of its
TorchScript file, whose neighbour of the pair is scripted, and both score as in the parity of an export: beside the
trainer's model, on --requests requests of the dataset, the held-out ones first. These come alone, by eights and in
batches of the config's size, and before them, at each size, the same requests of users without history, with every
other history emptied, with one event, and cut to ragged lengths; and one request after --long events.

Latency is that of a request alone: package and TorchScript, the named alternative, take turns on held-out requests in
one process: p50 of each, and the median ratio of a turn. The time of compiling is processor time, the compilers' that
are started included. A package that cannot be made is told with the reason, and ends the command with exit code 1, as a
difference beyond the parity's tolerance does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from features.batch import RequestBatch
from features.config_file import load_config
from features.dataset import Dataset
from features.errors import UserError
from features.schema import Split
from features.selection import FeatureSpec, resolve
from ranker.blocks import MODULES
from ranker.config import TrainConfig
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export.command import TRACED
from ranker.export.compiled import Package, Scoring, compiled, load
from ranker.export.inputs import (
    File,
    Inputs,
    encoder_inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
    without_history,
)
from ranker.export.parity import TOLERANCE, Way, compare
from ranker.export.ways import Modules, What, modules_of, samples_of, through_pair
from ranker.freed_memory import keep_freed_memory
from ranker.model import Ranker
from ranker.ranks import Ranks
from ranker.run import codewords_of
from ranker.towers import esmm_probabilities
from tests.benchmarks.machine import machine
from tests.benchmarks.serving import request_of

COMPRESSORS = ("uxsid", "hisac", *(name for name, made in MODULES.items() if hasattr(made, "store")))
FILES: tuple[What, What] = ("user_encoder", "candidate_ranker")
SHARES = {1: 0.05, 8: 0.15, 0: 0.8}
"""of the requests, by how many a batch has; 0: as many as the config says"""
FAR_APART = "tables.init_scale=1"
"""scores of fresh weights, that a difference between them means something"""
TIMED = 50
"""distinct requests that take their turns"""
ALONE = Ranks(0, 1, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Method:
    """A compressor's config on the dataset."""

    name: str
    config: TrainConfig
    dataset: Dataset
    spec: FeatureSpec

    @property
    def splits(self) -> list[Split]:
        """The held-out one first."""
        return list(reversed(self.dataset.manifest.filled_splits()))

    def batches(self, split: Split, requests: int) -> Generator[RequestBatch]:
        """A split in file order, in batches of so many requests; 0: as the config says."""
        loader = {"requests": requests or self.config.loader.requests, "workers": 0}
        config = self.config.model_copy(update={"loader": self.config.loader.model_copy(update=loader)})
        selection = selection_of(config, self.dataset, self.spec)
        return scoring_loader(config, self.dataset, split, selection, ALONE).batches()

    def ranker(self) -> Ranker:
        """Fresh weights, all moved: those that begin as zero would hide what they are multiplied with."""
        torch.manual_seed(0)
        codewords = codewords_of(self.config, self.dataset)
        ranker = Ranker(self.spec, self.config, {}, codewords, device=torch.device("cpu"))
        with torch.no_grad():
            for parameter in ranker.dense.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return ranker.eval().requires_grad_(False)


def method_of(folder: Path, name: str, dataset: Dataset, settings: Sequence[str]) -> Method:
    """The config of a compressor, by its type."""
    file = folder / f"{name}.yaml"
    config = load_config(file, TrainConfig, [f"dataset={dataset.root}", FAR_APART, *settings])
    if reason := no_pair_because(config):
        raise UserError(f"{file}: there is no pair to compile: {reason}")
    return Method(name, config, dataset, resolve(config.features, dataset.manifest))


def odd(batch: RequestBatch, method: Method, long: int) -> Generator[RequestBatch]:
    """The same requests with other histories, and one after `long` events."""
    length = batch.end - batch.start
    request = torch.arange(batch.requests)
    yield without_history(batch, method.spec)
    for kept in (torch.where(request % 2 == 0, length, 0), length.clamp(max=1), request * 37 % (length + 1)):
        yield batch._replace(start=batch.end - kept)
    yield request_of(method.spec, long, candidates=10, groups=5)


def batches_of(method: Method, requests: int, long: int) -> Generator[tuple[Split, Generator[RequestBatch]]]:
    """Of each size odd batches, and the dataset's until there were its share of the requests; with their split."""
    for size, share in SHARES.items():
        yield method.splits[0], odd(next(method.batches(method.splits[0], size)), method, long)
        left = share * requests
        for split in cycle(method.splits):
            yield split, taken(method.batches(split, size), left)
            left -= method.dataset.manifest.splits[split].requests
            if left <= 0:
                break


def taken(batches: Generator[RequestBatch], requests: float) -> Generator[RequestBatch]:
    """So many requests of them at least, where there are as many."""
    for batch in batches:
        yield batch
        requests -= batch.requests
        if requests <= 0:
            return


def compiled_pair(modules: Modules, method: Method, folder: Path) -> dict[What, tuple[Package, float]]:
    """Each file's package, and the seconds of processor time that it took."""
    traced = [next(method.batches(method.splits[0], requests)) for requests in TRACED]
    samples = samples_of(modules, traced, method.spec, method.config)
    made: dict[What, tuple[Package, float]] = {}
    for what in FILES:
        begin = sum(os.times()[:4])
        package = compiled(modules[what], samples[what], folder / f"{what}.pt2", "try")
        made[what] = package, sum(os.times()[:4]) - begin
    return made


def calls_of(method: Method, scripted: Modules) -> dict[What, list[Inputs]]:
    """The inputs of held-out requests, each alone."""
    calls: dict[What, list[Inputs]] = {what: [] for what in FILES}
    for batch in islice(method.batches(method.splits[0], 1), TIMED):
        probes, records = probes_of(batch, stored_blocks(method.config, method.spec))
        calls["user_encoder"].append(encoder_inputs_of(batch, probes))
        memory = scripted["user_encoder"](**calls["user_encoder"][-1]) | records
        inputs = ranker_inputs_of(batch, method.spec, short_length_of(method.config))
        calls["candidate_ranker"].append({**inputs, "memory": memory})
    return calls


def latencies_ms(package: Scoring, scripted: Scoring, calls: list[Inputs], rounds: int) -> tuple[list[float], ...]:
    """Wall times of both on the same requests, by turns, after a call of each."""
    of_ways: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for turn in range(len(calls) + rounds):
            for way, times in zip((package, scripted), of_ways, strict=True):
                begin = time.perf_counter()
                way(**calls[turn % len(calls)])
                if turn >= len(calls):
                    times.append(1e3 * (time.perf_counter() - begin))
    return of_ways


@torch.no_grad()
def measure(method: Method, folder: Path, options: argparse.Namespace) -> bool:
    """Print a line for each package of a method; whether both are there and score as the trainer does."""
    ranker = method.ranker()
    of_ranker = modules_of(ranker, method.spec, method.config)
    modules: dict[What, nn.Module] = {what: of_ranker[what] for what in FILES}
    made = compiled_pair(modules, method, folder)
    scripted: dict[What, nn.Module] = {what: cast(nn.Module, torch.jit.script(modules[what])) for what in FILES}
    pair = method.spec, stored_blocks(method.config, method.spec), short_length_of(method.config)
    packages: dict[What, Scoring] = {}
    ways: list[Way] = []
    for what in FILES:
        if made[what][0].reason is None:
            packages[what] = load(folder / f"{what}.pt2")
            encoder, reader = ({**scripted, what: packages[what]}[of] for of in FILES)
            ways.append(Way(what, through_pair(encoder, reader, *pair), (File(f"{what}.pt2", what),)))
    clicks: list[Tensor] = []

    def trainer(batch: RequestBatch) -> Tensor:
        scores = esmm_probabilities(ranker(batch).logits)
        clicks.append(scores[:, 0])
        return scores

    parity = compare(trainer, ways, batches_of(method, options.requests, options.long), options.requests)
    requests, spread, calls = sum(parity.requests.values()), torch.cat(clicks).std(), calls_of(method, scripted)
    good = True
    for what in FILES:
        package, seconds = made[what]
        if package.reason is not None:
            print(f"{method.name:<13} {what:<17} left out after {seconds:.0f} s: {package.reason}", flush=True)
            good = False
            continue
        difference = parity.ways[what].greatest_difference
        good = good and difference <= TOLERANCE
        own, other = latencies_ms(packages[what], scripted[what], calls[what], options.rounds)
        ratio = statistics.median(a / b for a, b in zip(own, other, strict=True))
        print(
            f"{method.name:<13} {what:<17} {seconds:5.0f}  {difference:12.1e}  {spread:9.3f}  {requests:8,}  "
            f"{statistics.median(own):9.2f}  {statistics.median(other):11.2f}  {ratio:5.2f}",
            flush=True,
        )
    return good


def main() -> None:
    """Print machine, sizes and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=COMPRESSORS, choices=COMPRESSORS, metavar="TYPE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every config")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--long", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit still is what C++ servers load
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a server does
    methods = [method_of(options.folder, name, Dataset(options.dataset), options.set) for name in options.methods]
    print(f"machine   {machine('torch', 'fbgemm-gpu-cpu', threads=options.threads)}")
    print(
        f"sizes     {options.folder}: {options.requests:,} requests of {options.dataset}, compared alone, by 8 and by "
        f"{methods[0].config.loader.requests}; histories up to {options.long:,} events; {options.rounds} rounds"
    )
    print(f"{'':<31} compile  difference    of scores              p50 in ms")
    print(f"{'compressor':<13} {'package':<17} s CPU  from trainer  deviation  requests    package  TorchScript  ratio")
    good = True
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            good = measure(method, Path(folder), options) and good
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
