"""`ranker export`: restore, script, compare, describe; or nothing is left."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

from features.batch import RequestBatch
from features.dataset import Dataset
from features.errors import UserError
from features.progress import log
from features.selection import Selection, resolve
from ranker.config import TrainConfig
from ranker.evaluate import restore
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export.compiled import Compiling, Package
from ranker.export.manifest import write_manifest
from ranker.export.parity import compare, refuse_differences
from ranker.export.restored import unsharded
from ranker.export.ways import modules_of, ways_through, without_wrong_packages, write_packages, write_scripted
from ranker.ranks import Ranks, join_ranks
from ranker.run import Run, refuse_existing
from ranker.towers import esmm_probabilities

REQUESTS = 10_000
"""compared, where the dataset has as many"""
TRACED = (5, 3, 1)
"""requests that packages are traced with, then tried on"""


def export(run_root: Path, out: Path, requests: int = REQUESTS, compiling: Compiling = "off") -> float:
    """Export a run's best checkpoint; the greatest difference of the whole ranker's scores from the trainer's.

    Args:
        requests: held-out requests to compare scores on; other splits follow where the held-out one has fewer.
        compiling: compiled packages beside TorchScript: none, those that can be made here, or all of them.

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
        difference = _export(run, aside, requests, compiling)
        if out.exists():
            out.rmdir()
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    log(f"exported to {out}")
    return difference


def _export(run: Run, folder: Path, requests: int, compiling: Compiling) -> float:
    dataset, config = run.dataset(), run.config
    spec = resolve(config.features, dataset.manifest)
    selection = selection_of(config, dataset, spec)
    with join_ranks("cpu", config.training.threads, config.loader.workers) as ranks, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch.jit still is what C++ servers load
        checkpoint = ranks.agree(run.best)  # once: further training may make another the best meanwhile
        trained = restore(run, ranks, checkpoint)
        modules = modules_of(unsharded(trained, spec, run), spec, config)
        write_scripted(modules, folder)
        packages: list[Package] = []
        if compiling != "off":
            batches = [_first(config, dataset, selection, ranks, requests) for requests in TRACED]
            packages = write_packages(modules, batches, spec, config, folder, compiling)
        whole = len(modules) == 1
        del modules  # beside the trainer's tables memory holds those that are loaded, and not these too
        ways = ways_through(folder, whole, packages, spec, config)
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
        if compiling == "try":
            ways, packages, parity = without_wrong_packages(ways, packages, parity, folder)
        refuse_differences(parity)
    files = [file for way in ways for file in way.files]
    write_manifest(folder, run, checkpoint, selection, files, parity, packages)
    return parity.ways["ranker"].greatest_difference


def _first(config: TrainConfig, dataset: Dataset, selection: Selection, ranks: Ranks, requests: int) -> RequestBatch:
    """A batch of the held-out split's first requests."""
    smaller = config.model_copy(update={"loader": config.loader.model_copy(update={"requests": requests})})
    split = dataset.manifest.filled_splits()[-1]
    return next(iter(scoring_loader(smaller, dataset, split, selection, ranks).batches()))
