"""`ranker export`: restore, script, compare, describe; or nothing is left."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from features.batch import RequestBatch
from features.errors import UserError
from features.progress import log
from features.selection import FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.evaluate import restore
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export.inputs import (
    File,
    StoredBlock,
    encoder_inputs_of,
    inputs_of,
    no_pair_because,
    probes_of,
    ranker_inputs_of,
    short_length_of,
    stored_blocks,
)
from ranker.export.manifest import write_manifest
from ranker.export.pair import CandidateRanker, UserEncoder
from ranker.export.parity import Score, Way, compare, refuse_differences
from ranker.export.restored import unsharded
from ranker.export.whole import ServedRanker
from ranker.model import Ranker
from ranker.ranks import join_ranks
from ranker.run import Run, refuse_existing
from ranker.towers import esmm_probabilities

REQUESTS = 10_000
"""compared, where the dataset has as many"""
WHOLE = File("ranker.pt", "ranker")
ENCODER = File("user_encoder.pt", "user_encoder")
READER = File("candidate_ranker.pt", "candidate_ranker")


def export(run_root: Path, out: Path, requests: int = REQUESTS) -> float:
    """Export a run's best checkpoint; the greatest difference of the whole ranker's scores from the trainer's.

    Args:
        requests: held-out requests to compare scores on; other splits follow where the held-out one has fewer.

    Raises:
        ExportError: scores differ by more than is allowed; nothing is left at `out`.
    """
    if requests < 1:
        raise UserError(f"--requests {requests}: must be at least 1: what is exported is compared with the trainer")
    run = Run(run_root)
    refuse_existing(out)
    aside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        aside.mkdir(parents=True)
        difference = _export(run, aside, requests)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log(f"exported to {out}")
    return difference


def _export(run: Run, folder: Path, requests: int) -> float:
    dataset, config = run.dataset(), run.config
    spec = resolve(config.features, dataset.manifest)
    selection = selection_of(config, dataset, spec)
    with join_ranks("cpu", config.training.threads, config.loader.workers) as ranks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit still is what C++ servers load
        trained = restore(run, ranks)
        ways = ways_of(unsharded(trained, spec, run), spec, config, folder)
        trained.eval()
        parity = compare(
            lambda batch: esmm_probabilities(trained(batch).logits),
            ways,
            (
                (split, scoring_loader(config, dataset, split, selection, ranks).batches())
                for split in reversed(dataset.manifest.filled_splits())  # the held-out one first
            ),
            min(requests, sum(info.requests for info in dataset.manifest.splits.values())),
        )
        refuse_differences(parity)
    files = [file for way in ways for file in way.files]
    write_manifest(folder, run, selection, files, parity)
    return parity.ways["ranker"].greatest_difference


def ways_of(ranker: Ranker, spec: FeatureSpec, config: TrainConfig, folder: Path) -> list[Way]:
    """Write the files, load them again, and say how each must score."""
    reason = no_pair_because(config)
    ranker.requires_grad_(False)  # a server has no use for a graph of what it computed
    _save(ServedRanker(ranker, spec), folder / WHOLE.name)
    if reason is None:
        _save(UserEncoder(ranker, spec, config.tables), folder / ENCODER.name)
        _save(CandidateRanker(ranker, spec, config.tables), folder / READER.name)
    del ranker  # beside the trainer's tables memory holds those that are loaded, and not these too
    whole = torch.jit.load(str(folder / WHOLE.name))
    ways = [Way("ranker", lambda batch: whole(**inputs_of(batch)), (WHOLE,))]
    if reason is not None:
        log(f"no user encoder and no candidate ranker: {reason}")
        return ways
    encoder, reader = (torch.jit.load(str(folder / file.name)) for file in (ENCODER, READER))
    score = through_pair(encoder, reader, spec, stored_blocks(config, spec), short_length_of(config))
    return [*ways, Way("pair", score, (ENCODER, READER), against="ranker")]


def through_pair(
    encoder: nn.Module, ranker: nn.Module, spec: FeatureSpec, blocks: list[StoredBlock], short_length: int | None
) -> Score:
    """Records made and read at once."""

    def score(batch: RequestBatch) -> Tensor:
        probes, records = probes_of(batch, blocks)
        memory = encoder(**encoder_inputs_of(batch, probes)) | records
        return ranker(**ranker_inputs_of(batch, spec, short_length), memory=memory)

    return score


def _save(module: nn.Module, file: Path) -> None:
    torch.jit.script(module.eval()).save(str(file))
