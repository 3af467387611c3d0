"""A request of 500 candidates, from its inputs to its scores, as histories grow: memories out of a store, or not.

    python -m tests.benchmarks.serving configs/synthetic/uxsid.yaml --dataset demo/dataset [--threads 1] [--rounds 60]

For each history length: the candidate ranker with the user's memories out of an LMDB store and out of a Redis server on
this machine; beside it the named alternatives, all on the same request: the history encoded on the fly (user encoder
and candidate ranker, and both as one file, the whole ranker), and target attention over the whole history (the config
given as --against). Models have fresh weights, which cost what trained ones do; requests are generated, and their
candidates have --groups values of the feature that histories are probed with. Each store holds --users users' memories,
and every round asks for another one's. All ways of all lengths alternate; wall times, as stores are waited for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from features.batch import RequestBatch, from_tensors
from features.config_file import load_config
from features.dataset import Dataset
from features.selection import Feature, FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.export.inputs import (
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.export.pair import CandidateRanker, UserEncoder
from ranker.export.whole import ServedRanker
from ranker.freed_memory import keep_freed_memory
from ranker.longseq.stored import Stored
from ranker.memory.encode import encode
from ranker.memory.keys import hashes_of, keys_of
from ranker.memory.reader import MemoryReader
from ranker.memory.record import Dtype
from ranker.memory.store import Generation, open_store
from ranker.memory.versions import MemoryVersions
from ranker.model import Ranker
from ranker.run import codewords_of
from tests.benchmarks.machine import machine
from tests.redis_servers import redis_server

VERSIONS = MemoryVersions(1, 2)
STORE = "store, LMDB"
Way = Callable[[int], Tensor]


class Files(NamedTuple):
    """The exported modules of one config, scripted."""

    config: TrainConfig
    spec: FeatureSpec
    blocks: list[StoredBlock]
    whole: nn.Module
    encoder: nn.Module | None
    ranker: nn.Module | None


def files_of(path: Path, dataset: Dataset, length: int) -> Files:
    """Modules with fresh weights, whose blocks read histories of any length up to `length`."""
    config = load_config(path, TrainConfig, [f"dataset={dataset.root}"])
    blocks = [block.model_copy(update={"length": length}) for block in config.model.long]
    config = config.model_copy(update={"model": config.model.model_copy(update={"long": blocks})})
    spec = resolve(config.features, dataset.manifest)
    torch.manual_seed(0)
    ranker = Ranker(spec, config, {}, codewords_of(config, dataset), device=torch.device("cpu"))
    ranker.eval().requires_grad_(False)
    pair = no_pair_because(config) is None
    return Files(
        config,
        spec,
        stored_blocks(config, spec),
        torch.jit.script(ServedRanker(ranker, spec).eval()),
        torch.jit.script(UserEncoder(ranker, spec, config.tables).eval()) if pair else None,
        torch.jit.script(CandidateRanker(ranker, spec, config.tables).eval()) if pair else None,
    )


def request_of(spec: FeatureSpec, length: int, candidates: int, groups: int) -> RequestBatch:
    """One request; ids are skewed as those of logs are, and codes of candidates are `groups` distinct ones."""
    rng = np.random.default_rng(0)

    def ids(feature: Feature, count: int) -> Tensor:
        return torch.from_numpy((rng.random(count) ** 3 * feature.size).astype(np.int64))

    asked = torch.arange(candidates) % groups
    codes = {f.name: asked % max(f.size - 1, 1) + 1 for f in spec.codes}
    history = [ids(f, length) for f in (*spec.sequence, *spec.event, *spec.content)]
    target = [codes.get(f.name, ids(f, candidates)) for f in spec.sequence]
    time_ms = torch.arange(length) * 3_600_000
    one = torch.ones(1, dtype=torch.int64)
    tensors = {
        "request.values": torch.cat([one[:0], *(ids(f, 1) for f in spec.request)]),
        "request.lengths": one.repeat(len(spec.request)),
        "candidate.values": torch.cat([one[:0], *(ids(f, candidates) for f in spec.candidate)]),
        "candidate.lengths": one.repeat(len(spec.candidate) * candidates),
        "sequence.values": torch.cat([*history, *target]),
        "sequence.lengths": torch.tensor([length] * len(history) + [candidates] * len(target)),
        "request_dense": torch.zeros(1, len(spec.request_dense)),
        "candidate_dense": torch.zeros(candidates, len(spec.candidate_dense)),
        "event_dense": torch.zeros(length, len(spec.event_dense)),
        "event_codes": torch.stack([ids(f, length) for f in spec.codes], 1) if spec.codes else time_ms[:, None][:, :0],
        "candidate_codes": torch.stack([codes[f.name] for f in spec.codes], 1) if spec.codes else asked[:, None][:, :0],
        "event_time": time_ms,
        "now": time_ms[-1:] + 60_000,
        "start": torch.zeros(1, dtype=torch.int64),
        "end": torch.tensor([length]),
        "offsets": torch.tensor([0, candidates]),
        "labels": torch.zeros(candidates, 1),
        "user": one,
        "item": asked,
        "history_length": torch.tensor([length]),
        "oracles": torch.zeros(candidates, 0),
    }
    return from_tensors(spec, tensors)


def encoded(files: Files, batch: RequestBatch) -> dict[str, Tensor]:
    """The records of a request's history, of all that its candidates ask for."""
    assert files.encoder is not None
    probes, _ = probes_of(batch, files.blocks)
    return files.encoder(**encoder_inputs_of(batch, probes))


def fill(url: str, files: Files, batch: RequestBatch, users: list[str], dtype: Dtype) -> int:
    """Give every user the memories of one history; the bytes of a user."""
    records, (probes, _) = encoded(files, batch), probes_of(batch, files.blocks)
    per = {block.number: "probe" if block.probe else "request" for block in files.blocks}
    generation = Generation.model_validate(
        {
            "name": "g", "model": VERSIONS.model, "codebook": VERSIONS.codebook, "dtype": dtype, "blocks": per,
            "as_of_ms": 0, "begun_ms": 0,
        }
    )  # fmt: skip
    store, of_user = open_store(url), 0
    writer = store.begin(generation)
    for hashes in np.split(hashes_of(users), len(users)):
        of_user = 0
        for number in per:
            code = probes[f"{number}.code"].numpy() if f"{number}.code" in probes else np.zeros(1, np.int64)
            keys = keys_of(hashes, number, np.zeros(code.size, np.int64), code)
            stored = Stored(*(records[f"{number}.{field}"] for field in Stored._fields))
            values = encode(stored, keys.fingerprint, VERSIONS, 0, dtype).values
            writer.put_many(keys.key, values)
            of_user += sum(map(len, values))
    writer.close()
    store.finish(generation.model_copy(update={"finished_ms": 1}))
    store.switch("g")
    store.close()
    return of_user


def from_store(url: str, files: Files, batch: RequestBatch, users: list[str], held: ExitStack) -> Way:
    """Look up a user's memories, then score."""
    assert files.ranker is not None
    per = {block.number: "probe" if block.probe else "request" for block in files.blocks}
    reader = MemoryReader(url, per, VERSIONS, deadline_ms=1_000)  # type: ignore[arg-type]
    held.callback(reader.close)
    held.callback(lambda: refuse_losses(reader, url))
    inputs, ranker = ranker_inputs_of(batch, files.spec, short_length_of(files.config)), files.ranker

    def way(turn: int) -> Tensor:
        probes, records = probes_of(batch, files.blocks)
        memory = reader.read([users[turn % len(users)]], probes)
        return ranker(**inputs, memory=memory | records)

    return way


def refuse_losses(reader: MemoryReader, url: str) -> None:
    """A read that finds nothing is quick, and no figure."""
    lost = sum(reader.counters.records(o) for o in ("missing", "unavailable", "corrupt", "old_version", "collision"))
    if lost or not reader.counters.records("found"):
        raise SystemExit(f"{url}: {lost:,} records were lost; the figures above are of nothing")


def on_the_fly(files: Files, batch: RequestBatch) -> Way:
    """Encode the history, then score."""
    assert files.ranker is not None
    inputs, ranker = ranker_inputs_of(batch, files.spec, short_length_of(files.config)), files.ranker
    _, records = probes_of(batch, files.blocks)
    return lambda turn: ranker(**inputs, memory=encoded(files, batch) | records)


def times_ms(ways: dict[tuple[int, str], Way], rounds: int) -> dict[tuple[int, str], list[float]]:
    """Wall times of each way by length and name; two rounds warm up."""
    taken: dict[tuple[int, str], list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, way in ways.items():
                begin = time.perf_counter()
                way(turn)
                if turn >= 2:
                    taken[name].append(1e3 * (time.perf_counter() - begin))
    return taken


def ways_at(options: argparse.Namespace, length: int, redis: str, held: ExitStack) -> dict[str, Way]:
    """All ways at one length, after a look whether they score alike."""
    dataset = Dataset(options.dataset)
    files, against = files_of(options.config, dataset, length), files_of(options.against, dataset, length)
    sizes = length, options.candidates, options.groups
    batch, users = request_of(files.spec, *sizes), [f"user {i}" for i in range(options.users)]
    lmdb = f"lmdb:{held.enter_context(tempfile.TemporaryDirectory())}"
    remote = f"{redis}?namespace=length{length}"
    of_user = [fill(url, files, batch, users, options.dtype) for url in (lmdb, remote)]
    whole, target = inputs_of(batch), inputs_of(request_of(against.spec, *sizes))
    ways: dict[str, Way] = {
        STORE: from_store(lmdb, files, batch, users, held),
        "store, Redis": from_store(remote, files, batch, users, held),
        "encoded on the fly": on_the_fly(files, batch),
        "the whole ranker": lambda turn: files.whole(**whole),
        "target attention": lambda turn: against.whole(**target),
    }
    with torch.inference_mode():
        scores = {name: way(0) for name, way in ways.items() if name != "target attention"}
    off = max(float((x - scores["the whole ranker"]).abs().max()) for x in scores.values())
    print(
        f"{length:,} events: {of_user[0]:,} bytes a user; scores at most {off:.1e} off the whole ranker's", flush=True
    )
    return ways


def ratio(of_way: list[float], other: list[float]) -> float:
    """The median over rounds."""
    return statistics.median(a / b for a, b in zip(of_way, other, strict=True))


def main() -> None:
    """Print machine, sizes, percentiles and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--against", type=Path, default=Path("configs/synthetic/target_attention_sids.yaml"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--candidates", type=int, default=500)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a server does
    print(f"machine   {machine('torch', 'fbgemm-gpu-cpu', 'lmdb', 'redis', threads=options.threads)}")
    print(
        f"sizes     {options.config.stem}: {options.candidates} candidates of {options.groups} groups, "
        f"{options.users} users in {options.dtype}, {options.rounds} rounds"
    )
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as redis, ExitStack() as held:
        ways: dict[tuple[int, str], Way] = {}
        for length in options.lengths:
            ways |= {(length, name): way for name, way in ways_at(options, length, redis.url, held).items()}
        taken = times_ms(ways, options.rounds)
    for (length, name), of_way in taken.items():
        p50, p99 = np.percentile(of_way, [50, 99])
        over, line = ratio(of_way, taken[length, STORE]), ratio(of_way, taken[options.lengths[0], name])
        print(
            f"{length:>7,} events  {name:<20} p50 {p50:7.2f} ms  p99 {p99:7.2f} ms  {over:6.2f} × the LMDB store's  "
            f"{line:6.3f} × its own at {options.lengths[0]:,}"
        )


if __name__ == "__main__":
    main()
