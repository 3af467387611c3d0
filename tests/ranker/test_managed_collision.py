"""Rows of ids without end: who has one, who loses it, and that evaluation and export read what training taught.

Training is for GPUs. TorchRec trains these tables on CPUs too, so that our own refusal is all that these tests lift.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.export import export
from ranker.planning import constraints
from ranker.training.trainer import train
from tests.ranker.conftest import LOGS, prepared

ConfigOf = Callable[..., TrainConfig]
HASHED = LOGS.replace("item: {category: {}", "item: {category: {hash_buckets: 1000000}")
MANAGED = "tables.managed_collision={user: 150, item: {rows: 30, every: 3}, item.category: {rows: 4, eviction: lru, every: 2}}"
OPTIONS = (
    MANAGED,
    "training.epochs=1",
    "training.max_steps=12",
    "training.validation_split=null",
    "training.log_every=1",
)


@pytest.fixture(scope="module")
def hashed(once: Callable[..., Path]) -> Path:
    """The small logs with users, items and categories hashed so that none share a hash."""
    ids = "user_hash_buckets: 2000000000\nitem_hash_buckets: 2000000000\n"
    return once("open", lambda out: prepared(HASHED + ids, out, out))


@pytest.fixture
def on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraints, "refuse_managed_on_cpus", lambda table, device: None)


@pytest.fixture(scope="module")
def run(once: Callable[..., Path], hashed: Path, config_of: ConfigOf) -> Path:
    def make(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constraints, "refuse_managed_on_cpus", lambda table, device: None)
            train(config_of(f"dataset={hashed}", *OPTIONS), out)

    return once("managed", make)


def test_it_trains(run: Path, tmp_path: Path):
    evaluate(run)
    assert export(run, tmp_path / "export", requests=100) < 1e-5
