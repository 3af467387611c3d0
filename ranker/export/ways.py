"""The files of an export, and the ways to score through them: TorchScript of float32, TorchScript with tables of bytes,
compiled packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from features.batch import RequestBatch
from features.progress import log
from features.selection import FeatureSpec
from ranker.config import TrainConfig
from ranker.export.compiled import Compiling, Package, compiled, load
from ranker.export.inputs import (
    File,
    Inputs,
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
    without_history,
)
from ranker.export.pair import CandidateRanker, UserEncoder
from ranker.export.parity import Parity, Score, Way
from ranker.export.quantised import ALLOWED_AUC, ALLOWED_RMS
from ranker.export.whole import ServedRanker
from ranker.model import Ranker
from ranker.tables.served import with_served_tables

What = Literal["ranker", "user_encoder", "candidate_ranker"]
Modules = Mapping[What, nn.Module]
Scored = Callable[..., Tensor]
Encoded = Callable[..., dict[str, Tensor]]


def modules_of(ranker: Ranker, spec: FeatureSpec, config: TrainConfig) -> dict[What, nn.Module]:
    """What is exported: the whole ranker, and the pair where there can be one."""
    ranker.requires_grad_(False)  # a server has no use for a graph of what it computed
    modules: dict[What, nn.Module] = {"ranker": ServedRanker(ranker, spec).eval()}
    if reason := no_pair_because(config):
        log(f"no user encoder and no candidate ranker: {reason}")
    else:
        modules["user_encoder"] = UserEncoder(ranker, spec, config.tables).eval()
        modules["candidate_ranker"] = CandidateRanker(ranker, spec, config.tables).eval()
    return modules


def write_scripted(modules: Modules, folder: Path) -> None:
    """TorchScript of each, with tables of float32 and of bytes."""
    for what, module in modules.items():
        torch.jit.script(module).save(str(folder / f"{what}.pt"))
        torch.jit.script(with_served_tables(module, in_bytes=True)).save(str(folder / f"{what}.int8.pt"))


def write_packages(
    modules: Modules,
    batches: Sequence[RequestBatch],
    spec: FeatureSpec,
    config: TrainConfig,
    folder: Path,
    how: Compiling,
) -> list[Package]:
    """Compile what can be compiled, the candidate ranker first.

    Args:
        batches: as for :func:`samples_of`.

    Raises:
        ExportError: something cannot, and `how` is "require".
    """
    samples = samples_of(modules, batches, spec, config)
    order: tuple[What, ...] = ("candidate_ranker", "user_encoder", "ranker")
    return [compiled(modules[what], samples[what], folder / f"{what}.pt2", how) for what in order if what in modules]


def samples_of(
    modules: Modules, batches: Sequence[RequestBatch], spec: FeatureSpec, config: TrainConfig
) -> dict[What, list[Inputs]]:
    """What packages are traced with and tried on.

    Args:
        batches: of several sizes, a request alone among them; the first one to trace with. Beside them come the first
            one with every other history emptied, and the last one with histories of one event and of none.
    """
    first, last = batches[0], batches[-1]
    every_other = torch.where(torch.arange(first.requests) % 2 == 0, first.start, first.end)
    latest = torch.maximum(last.start, last.end - 1)
    odd = [first._replace(start=every_other), last._replace(start=latest), without_history(last, spec)]
    tried = [*batches, *odd]
    samples: dict[What, list[Inputs]] = {"ranker": [{**inputs_of(batch)} for batch in tried]}
    if "candidate_ranker" in modules:
        pair = spec, stored_blocks(config, spec), short_length_of(config)
        samples["user_encoder"] = [encoder_inputs_of(batch, probes_of(batch, pair[1])[0]) for batch in tried]
        with torch.no_grad():
            samples["candidate_ranker"] = [_reader_inputs(modules["user_encoder"], batch, *pair) for batch in tried]
    return samples


def ways_through(
    folder: Path, whole: bool, packages: Sequence[Package], spec: FeatureSpec, config: TrainConfig
) -> list[Way]:
    """Load the files of a folder, and say how they must score.

    Args:
        whole: the ranker is there as one file alone.
        packages: that were to be compiled.
    """
    pair = spec, stored_blocks(config, spec), short_length_of(config)

    def ranker(name: str) -> tuple[Score, tuple[File]]:
        score = _loaded(folder / name)
        return lambda batch: score(**inputs_of(batch)), (File(name, "ranker"),)

    def both(encoder: str, reader: str) -> tuple[Score, tuple[File, File]]:
        score = through_pair(_loaded(folder / encoder), _loaded(folder / reader), *pair)
        return score, (File(encoder, "user_encoder"), File(reader, "candidate_ranker"))

    ways = [
        Way("ranker", *ranker("ranker.pt")),
        Way("int8 ranker", *ranker("ranker.int8.pt"), allowed=1.0, allowed_rms=ALLOWED_RMS, allowed_auc=ALLOWED_AUC),
    ]
    if not whole:
        names = "user_encoder.int8.pt", "candidate_ranker.int8.pt"
        ways.append(Way("pair", *both("user_encoder.pt", "candidate_ranker.pt"), against="ranker"))
        ways.append(Way("int8 pair", *both(*names), against="int8 ranker", allowed_auc=ALLOWED_AUC))
    made = {package.name for package in packages if package.reason is None}
    if "ranker.pt2" in made:
        ways.append(Way("compiled ranker", *ranker("ranker.pt2")))
    # what is not compiled of a pair is scripted
    names = [f"{what}.pt2" if f"{what}.pt2" in made else f"{what}.pt" for what in ("user_encoder", "candidate_ranker")]
    if made & set(names):
        ways.append(Way("compiled pair", *both(names[0], names[1])))
    return ways


def without_wrong_packages(
    ways: Sequence[Way], packages: Sequence[Package], parity: Parity, folder: Path
) -> tuple[list[Way], list[Package], Parity]:
    """What is left where ways through packages score otherwise than is allowed: their packages are removed, and it is
    said why.

    Their samples were right: a method that chooses, such as the nearest of some centres, may choose otherwise where
    rounding decides.
    """
    wrong: dict[str, str] = {}
    for way in ways:
        found = parity.ways[way.name]
        compiled = [file.name for file in way.files if file.name.endswith(".pt2")]
        if compiled and not found.greatest_difference <= found.allowed:
            reason = f"scores differ by {found.greatest_difference:.2e} (allowed {found.allowed:.0e})"
            wrong |= dict.fromkeys(compiled, reason)
    for name, reason in wrong.items():
        (folder / name).unlink()
        log(f"no {name}: {reason}")
    left = [way for way in ways if not wrong.keys() & {file.name for file in way.files}]
    return (
        left,
        [replace(package, reason=wrong.get(package.name, package.reason)) for package in packages],
        replace(parity, ways={way.name: parity.ways[way.name] for way in left}),
    )


def through_pair(
    encoder: Encoded, ranker: Scored, spec: FeatureSpec, blocks: Sequence[StoredBlock], short_length: int | None
) -> Score:
    """Records made and read at once."""

    def score(batch: RequestBatch) -> Tensor:
        return ranker(**_reader_inputs(encoder, batch, spec, blocks, short_length))

    return score


def _reader_inputs(
    encoder: Encoded,
    batch: RequestBatch,
    spec: FeatureSpec,
    blocks: Sequence[StoredBlock],
    short_length: int | None,
) -> Inputs:
    """The candidate ranker's, with the records that the encoder makes of the batch."""
    probes, records = probes_of(batch, blocks)
    memory = encoder(**encoder_inputs_of(batch, probes)) | records
    return {**ranker_inputs_of(batch, spec, short_length), "memory": memory}


def _loaded(file: Path) -> Callable[..., Any]:
    """The file itself, as a server loads it."""
    return load(file) if file.suffix == ".pt2" else torch.jit.load(str(file))
