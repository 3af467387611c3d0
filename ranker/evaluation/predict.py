"""Score a split: model and loader in, one row an impression out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from features.dataset import Dataset
from features.errors import UserError
from features.loader import Loader, Selection
from features.progress import Progress
from features.schema import Split
from features.selection import FeatureSpec
from ranker.config import TrainConfig
from ranker.evaluation.metrics import Predictions, gather_predictions
from ranker.ranks import Ranks
from ranker.towers import esmm_probabilities


def selection_of(config: TrainConfig, dataset: Dataset, spec: FeatureSpec) -> Selection:
    """What a run reads of its dataset; true probabilities too where every task has them.

    Raises:
        UserError: a task's label is not in the dataset.
    """
    labels = [config.tasks.click] + ([config.tasks.conversion] if config.tasks.conversion else [])
    for key, label in zip(("click", "conversion"), labels, strict=False):
        if label not in dataset.manifest.labels:
            have = ", ".join(dataset.manifest.labels)
            raise UserError(f"tasks.{key}: {label!r} is not a label of {dataset.root}; it has {have}")
    oracles = tuple(labels) if set(labels) <= set(dataset.manifest.oracles) else ()
    return Selection(spec, tuple(labels), config.history_length, oracles)


def scoring_loader(config: TrainConfig, dataset: Dataset, split: Split, selection: Selection, ranks: Ranks) -> Loader:
    """A split in file order. Its batches, and so its scores, do not depend on how many ranks share it."""
    loader = config.loader.model_copy(update={"shards": None})
    return Loader(dataset, (split,), selection, loader, rank=ranks.rank, world=ranks.world)


def refuse_not_finite(predictions: Predictions) -> None:
    """Raise UserError where a score is NaN."""
    if bad := int(np.count_nonzero(~np.isfinite(predictions.p_ctr))):
        raise UserError(
            f"{bad:,} of {len(predictions):,} scores are not finite: training diverged; lower optimizer.lr or "
            "tables.lr, or look for extreme values in features.dense"
        )


@torch.no_grad()
def predict(
    model: nn.Module, loader: Loader, config: TrainConfig, ranks: Ranks, what: str = "score"
) -> Predictions | None:
    """All ranks' scored impressions on rank 0, None on the others."""
    model.eval()
    parts: list[Predictions] = []
    requests = 0
    two = config.tasks.conversion is not None
    with Progress(what, loader.steps(), ranks.first) as progress:
        for batch in loader.batches():
            p = esmm_probabilities(model(batch.to(ranks.device)).logits.double()).cpu().numpy()
            per_request = (batch.offsets[1:] - batch.offsets[:-1]).numpy()
            request = np.repeat(np.arange(batch.requests) + requests, per_request)
            requests += batch.requests
            labels, oracles = batch.labels.numpy(), batch.oracles.numpy().astype(np.float64)
            parts.append(
                Predictions(
                    user=np.repeat(batch.user.numpy(), per_request),
                    item=batch.item.numpy(),
                    history_length=np.repeat(batch.history_length.numpy(), per_request),
                    request=request * ranks.world + ranks.rank,
                    click=labels[:, 0],
                    conversion=labels[:, 1] * labels[:, 0] if two else None,
                    p_ctr=p[:, 0],
                    p_ctcvr=p[:, 1] if two else None,
                    p_cvr=p[:, 2] if two else None,
                    oracle_click=oracles[:, 0] if oracles.shape[1] else None,
                    oracle_conversion=oracles[:, 1] if oracles.shape[1] > 1 else None,
                )
            )
            progress.advance()
    return gather_predictions(Predictions.concat(parts))
