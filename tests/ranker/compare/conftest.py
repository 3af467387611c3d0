"""A folder of small configs to compare, and a launcher that trains and evaluates in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from features.config_file import load_config
from features.errors import UserError
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.training.trainer import train

BASE = """
name: small
dataset: DATASET
features: {request: [user], candidate: [item], sequence: [item, item.category]}
tables: {dim: 4, init_scale: 0.1, lr: 0.1}
model:
  short: {length: 3, hidden: [4]}
  tower: {hidden: [8]}
tasks: {conversion: conversion}
loader: {requests: 32, workers: 0, group: 2}
optimizer: {lr: 0.01}
training: {threads: 1, device: cpu, validation_split: null}
"""
METHODS = {
    "din": "extends: base.yaml",
    "mean": "extends: base.yaml\nmodel: {long: [{type: mean}]}",
    "attention": "extends: base.yaml\nmodel: {long: [{type: target_attention, heads: 1, head_dim: 4}]}",
    "both": "extends: base.yaml\nmodel: {long: [{type: mean}, {type: target_attention, heads: 1, head_dim: 4}]}",
    "blind": "extends: base.yaml\nmodel: {short: null}",
    "wide": "extends: base.yaml\ntables: {dim: 8}\nloader: {requests: 16}",
    "bad": "extends: base.yaml\nfeatures: {request: [user, user.shoe_size]}",
}
COMPARE = """
name: small
methods: {din: {}, mean: {}}
lengths: [5, 40]
seeds: [0, 1]
baseline: din@5
budget: {steps: 3}
speed: {lengths: [10, 40], candidates: 4, groups: 2, repeats: 2}
bootstrap: {draws: 40}
"""


class InThisProcess:
    """Runs commands one after the other where the test runs: what a child process would do, without its start.

    ran: the names of the run folders, with what was done.
    """

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []

    def train(self, config: Path, run: Path, resume: bool, log: Path) -> int:
        self.ran.append((run.name, "resume" if resume else "train"))
        return self._tell(lambda: train(load_config(config, TrainConfig), run, resume), log)

    def evaluate(self, run: Path, split: str, log: Path) -> int:
        self.ran.append((run.name, "evaluate"))
        return self._tell(lambda: evaluate(run, split, keep_predictions=True), log)  # type: ignore[arg-type]

    def stop(self) -> None:
        pass

    def _tell(self, run: object, log: Path) -> int:
        try:
            run()  # type: ignore[operator]
        except UserError as error:
            log.write_text(f"error: {error}\n")
            return 2
        return 0


@pytest.fixture(scope="session")
def configs(once, dataset: Path) -> Path:
    """Folder of the configs above."""

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "base.yaml").write_text(BASE.replace("DATASET", str(dataset)))
        (folder / "compare.yaml").write_text(COMPARE)
        for name, text in METHODS.items():
            (folder / f"{name}.yaml").write_text(text)

    return once("compare_configs", make)


@pytest.fixture
def here() -> InThisProcess:
    return InThisProcess()
