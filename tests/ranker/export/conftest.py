"""Exports of small models, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from features.batch import RequestBatch
from features.selection import FeatureSpec, resolve
from ranker.config import TrainConfig
from ranker.evaluation.predict import scoring_loader, selection_of
from ranker.export import export
from ranker.ranks import Ranks
from ranker.run import Run
from ranker.training.trainer import train
from tests.ranker.block_configs import HISAC, HYTREC, UXSID

ALONE = Ranks(0, 1, 1, torch.device("cpu"))
CODED = ("features.sequence=[item, item.sid_1, item.sid_2]", "features.codes=[item.sid_1, item.sid_2, item]")
CONTENT = (*CODED, "features.content=[item.sid_vector]")
SECOND = UXSID.replace("}", ", probe: item.sid_2}")
BY_CODE = HYTREC.replace("}", ", slots: [item.sid_2, item]}")
MODELS: dict[str, tuple[str, ...]] = {
    "uxsid": (*CODED, f"model.long=[{UXSID}]"),
    "hisac": (*CONTENT, f"model.long=[{HISAC.replace('}', ', z: content}')}]"),
    "hytrec": ("model.short=null", f"model.long=[{HYTREC}]"),
    "all": (
        *CONTENT,
        "model.short=null",
        f"model.long=[{{type: mean}}, {UXSID}, {HISAC}, {BY_CODE}, {SECOND}, {{type: vql, codes: 4, head_dim: 4}}]",
        "tables.buckets={item: {rows: 17, hashes: 2}, event.action: 2, user: 9}",
    ),
    "target_attention": ("model.long=[{type: mean}, {type: target_attention, head_dim: 4}]",),
}
PAIRS = ("mean", "uxsid", "hisac", "hytrec", "all")
STEPS = (
    "tables.init_scale=0.5",  # scores far apart
    "loader.requests=16",
    "training.max_steps=10",
    "training.validation_split=null",
)


@cache
def _loaded(file: Path) -> Any:
    """Once: TorchScript takes seconds to optimise what it runs for the second time."""
    return torch.jit.load(str(file))


@dataclass(frozen=True)
class Exported:
    """A run and what was exported of it."""

    run: Run
    folder: Path

    @property
    def spec(self) -> FeatureSpec:
        """Its features."""
        return resolve(self.run.config.features, self.run.dataset().manifest)

    def loaded(self, file: str) -> Any:
        """A file of it."""
        return _loaded(self.folder / file)

    def batch(self, requests: int = 16, group: int = 1) -> RequestBatch:
        """The first requests of the test split."""
        loader = {"requests": requests, "group": group}
        config = self.run.config.model_copy(update={"loader": self.run.config.loader.model_copy(update=loader)})
        selection = selection_of(config, self.run.dataset(), self.spec)
        return next(scoring_loader(config, self.run.dataset(), "test", selection, ALONE).batches())


@pytest.fixture(scope="session")
def exported_of(
    once: Callable[..., Path], trained: Path, config_of: Callable[..., TrainConfig], coded: Path
) -> Callable[[str], Exported]:
    """The export of a model by its name: of MODELS, or "mean", the run that other tests read too."""

    def make(name: str, out: Path) -> None:
        if name != "mean":
            train(config_of(f"dataset={coded}", *MODELS[name], *STEPS), out / "run")
        export(trained if name == "mean" else out / "run", out / "export", requests=400 if name == "mean" else 200)

    def exported_of(name: str) -> Exported:
        folder = once(f"exported_{name}", lambda out: make(name, out))
        return Exported(Run(trained if name == "mean" else folder / "run"), folder / "export")

    return exported_of


@pytest.fixture(scope="session")
def with_packages(once: Callable[..., Path], trained: Path) -> Path:
    """The export of the run that other tests read too, with all its packages."""
    return once("exported_with_packages", lambda out: export(trained, out, requests=200, compiling="require"))
