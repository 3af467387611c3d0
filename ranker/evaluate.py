"""`ranker evaluate RUN --split test`: score a split with the run's best checkpoint, beside references and oracle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from features.errors import UserError
from features.progress import log
from features.schema import SPLITS, Split
from features.selection import resolve
from ranker.evaluation.diagnostics import diagnose
from ranker.evaluation.predict import predict, refuse_not_finite, scoring_loader, selection_of
from ranker.evaluation.references import fit_references
from ranker.evaluation.report import Report, make_report, print_report, write_metrics
from ranker.evaluation.stored_predictions import write_predictions
from ranker.model import Ranker
from ranker.planning.reads import reads_of
from ranker.ranks import Ranks, join_ranks
from ranker.run import Run, codewords_of
from ranker.tables.sharding import shard
from ranker.training import checkpoint
from ranker.training.managed_state import hold
from ranker.training.trainer import build


def restore(run: Run, ranks: Ranks, checkpoint_path: Path | None = None) -> Ranker:
    """The run's ranker, sharded, with a checkpoint of it: by default the best of now, the same on all ranks."""
    dataset = run.dataset()
    spec = resolve(run.config.features, dataset.manifest)
    model, _ = shard(
        build(spec, run.config, run.moments(), codewords_of(run.config, dataset), held=True),
        run.config.tables,
        ranks,
        reads_of(run.config, dataset, spec, ranks.world),
    )
    best = checkpoint_path or ranks.agree(run.best)
    checkpoint.check(best, ranks)
    checkpoint.load(best, model, None)
    hold(model, best)
    return model  # type: ignore[return-value]


def evaluate(
    run_root: Path, split: Split = "test", frozen: bool = False, keep_predictions: bool = False
) -> Report | None:
    """Measure a run on a split, write ``metrics.json``, show the tables; the report on rank 0, None on the others.

    Args:
        frozen: each user's requests have the history before her first one in the split, as from memories computed
            once before it; into ``metrics-frozen.json``. What stale memories cost; and how much of UAUC is owed to
            histories that hold the outcome of a user's other test impressions.
        keep_predictions: write the scored impressions too, ``predictions.parquet`` or ``predictions-frozen.parquet``.

    Raises:
        UserError: no run, no such split, or another dataset than it was trained on.
    """
    run = Run(run_root)
    dataset, config = run.dataset(), run.config
    if split not in dataset.manifest.filled_splits():
        raise UserError(f"--split {split}: not in {dataset.root}; it has {', '.join(dataset.manifest.filled_splits())}")
    options = config.training
    with join_ranks(options.device, options.threads, config.loader.workers, options.collective_timeout_s) as ranks:
        selection = selection_of(config, dataset, resolve(config.features, dataset.manifest))
        selection = replace(selection, frozen=frozen)
        loader = scoring_loader(config, dataset, split, selection, ranks)
        model = restore(run, ranks)
        predictions = predict(model, loader, config, ranks, f"score {split}")
        blocks = diagnose(model, dataset, split, selection, config, ranks)
    if predictions is None:
        return None
    refuse_not_finite(predictions)
    labels = (config.tasks.click, config.tasks.conversion)
    references = fit_references(dataset, config.training.splits, labels=labels)
    unknown = int(np.count_nonzero(predictions.item >= dataset.manifest.known_items))
    report = make_report(predictions, split, unknown, references, blocks=blocks)
    kind = "-frozen" if frozen else ""
    if keep_predictions:
        write_predictions(predictions, run.root / f"predictions{kind}.parquet")
    write_metrics(report, run.root / f"metrics{kind}.json")
    if frozen:
        log("histories end at each user's first request of the split")
    print_report(report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m ranker.evaluate`` and of `torchx run`."""
    parser = argparse.ArgumentParser(prog="ranker.evaluate", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--frozen", action="store_true", help="histories end at each user's first request of the split")
    parser.add_argument("--predictions", action="store_true", help="keep the scored impressions in the run's folder")
    given = parser.parse_args(arguments)
    try:
        evaluate(given.run, given.split, given.frozen, given.predictions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
