"""Whether exported files score as the trainer does, on held-out requests, and what it costs where they do not quite.

A *way* goes from a batch to scores: through one file, or through the pair. Each is compared with the trainer or with
another way, and the AUC of clicks is measured for all on the same candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from features.batch import RequestBatch
from features.progress import Progress, log
from features.schema import Split
from ranker.evaluation.metrics import binary_metrics
from ranker.export.inputs import File
from ranker.export.restored import ExportError

Score = Callable[[RequestBatch], Tensor]
"""a batch to probabilities `[N, 1]` or `[N, 3]`, as the exported ranker's"""
TRAINER = "trainer"
TOLERANCE = 1e-5
"""greatest difference of a score where arithmetic is the same but for its order"""


@dataclass(frozen=True)
class Way:
    """One way to score.

    Args:
        name: in log and manifest; score: the way itself; files: those that it goes through, in their order.
        against: the way that it must equal: the trainer, or one named before it.
        allowed: greatest difference of a score from that way's; 1: any.
        allowed_rms: greatest root mean square of the scores' differences, and
        allowed_auc: greatest change of the clicks' AUC from the trainer's, for ways that are not meant to be exact;
            None: any.
    """

    name: str
    score: Score
    files: tuple[File, ...]
    against: str = TRAINER
    allowed: float = TOLERANCE
    allowed_rms: float | None = None
    allowed_auc: float | None = None


@dataclass(frozen=True)
class Compared:
    """What was found of one way. `auc`: of clicks; `auc_change`: from the trainer's; None where clicks are of one class
    alone."""

    files: list[str]
    against: str
    greatest_difference: float
    allowed: float
    rms_difference: float
    allowed_rms: float | None
    auc: float | None
    auc_change: float | None
    allowed_auc: float | None


@dataclass(frozen=True)
class Parity:
    """Of all ways. `requests`: compared, of each split; `trainer_auc`: of clicks."""

    requests: dict[Split, int]
    candidates: int
    trainer_auc: float | None
    ways: dict[str, Compared]

    def as_json(self) -> dict[str, object]:
        """For the manifest."""
        return {
            "requests": sum(self.requests.values()),
            "splits": self.requests,
            "candidates": self.candidates,
            TRAINER: {"auc": self.trainer_auc},
            "ways": {name: asdict(found) for name, found in self.ways.items()},
        }


@dataclass
class _Scored:
    """Of one way so far: its greatest difference, the sum of their squares, how many, and every candidate's click."""

    difference: Tensor = field(default_factory=lambda: torch.zeros(1))
    squares: float = 0.0
    count: int = 0
    clicks: list[Tensor] = field(default_factory=list[Tensor])

    def add(self, scores: Tensor, expected: Tensor) -> None:
        # torch's maximum keeps a NaN, where Python's may lose it
        differences = (scores - expected).abs().flatten()
        self.difference = torch.cat([self.difference, differences]).max().view(1)
        self.squares += float(differences.double().square().sum())
        self.count += differences.numel()
        self.clicks.append(scores[:, 0])


@torch.no_grad()
def compare(
    trainer: Score, ways: Sequence[Way], splits: Iterable[tuple[Split, Iterable[RequestBatch]]], requests: int
) -> Parity:
    """Score batches in every way until there were enough requests.

    Args:
        splits: batches by split, in the order in which they are used.
        requests: how many to compare at least, where there are as many.
    """
    scored = {name: _Scored() for name in (TRAINER, *(way.name for way in ways))}
    used: dict[Split, int] = {}
    labels: list[Tensor] = []
    with Progress("compare scores", requests) as progress:
        for split, batches in splits:
            if sum(used.values()) >= requests:
                break
            for batch in batches:
                scores = {TRAINER: trainer(batch)}
                scored[TRAINER].add(scores[TRAINER], scores[TRAINER])
                for way in ways:
                    scores[way.name] = way.score(batch)
                    scored[way.name].add(scores[way.name], scores[way.against])
                labels.append(batch.labels[:, 0])
                progress.advance(min(batch.requests, requests - sum(used.values())))
                used[split] = used.get(split, 0) + batch.requests
                if sum(used.values()) >= requests:
                    break
    clicked = torch.cat([torch.zeros(0), *labels]).numpy()
    auc = {name: _auc(clicked, of.clicks) for name, of in scored.items()}
    found: dict[str, Compared] = {}
    for way in ways:
        files = [file.name for file in way.files]
        mine, trainers = auc[way.name], auc[TRAINER]
        change = None if mine is None or trainers is None else mine - trainers
        of = scored[way.name]
        rms = math.sqrt(of.squares / max(of.count, 1))
        bounds = float(of.difference), way.allowed, rms, way.allowed_rms
        found[way.name] = Compared(files, way.against, *bounds, mine, change, way.allowed_auc)
    return Parity(used, len(clicked), auc[TRAINER], found)


def refuse_differences(parity: Parity) -> None:
    """Log every way's, and raise ExportError where one is beyond what is allowed, NaN included."""
    of = ", ".join(f"{n:,} {split}" for split, n in parity.requests.items()) or "no"
    log(f"scores on {of} requests, {parity.candidates:,} candidates; the trainer's AUC {_shown(parity.trainer_auc)}")
    wrong: list[str] = []
    for name, found in parity.ways.items():
        than = "the trainer" if found.against == TRAINER else found.against
        difference = f"{found.greatest_difference:.2e} (allowed {found.allowed:.0e})"
        rms = f"{found.rms_difference:.1e}"
        if found.allowed_rms is not None:
            rms += f" (allowed {found.allowed_rms:.0e})"
        log(
            f"{name}: greatest score difference from {than} {difference}, root mean square {rms}, "
            f"AUC {_shown(found.auc_change, '+.5f')}"
        )
        if not found.greatest_difference <= found.allowed:
            wrong.append(f"{name}: scores differ from {than}'s by {difference}")
        elif found.allowed_rms is not None and not found.rms_difference <= found.allowed_rms:
            wrong.append(f"{name}: scores differ from {than}'s by a root mean square of {rms}")
        elif found.allowed_auc is not None and not abs(found.auc_change or 0.0) <= found.allowed_auc:
            change = f"{_shown(found.auc_change, '+.5f')} (allowed ±{found.allowed_auc})"
            wrong.append(f"{name}: the AUC of clicks differs from the trainer's by {change}")
    if wrong:
        raise ExportError(f"{'; '.join(wrong)}: not exported")


def _auc(clicked: npt.NDArray[Any], scores: list[Tensor]) -> float | None:
    """AUC of clicks; None where it is not defined, by the labels or by scores that are no numbers."""
    score = torch.cat([torch.zeros(0), *scores]).double().cpu().numpy()
    if not np.isfinite(score).all():
        return None
    return binary_metrics(np.zeros(len(score), np.int64), clicked, score).auc


def _shown(x: float | None, how: str = ".5f") -> str:
    return "–" if x is None else format(x, how)
