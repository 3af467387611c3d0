"""From logs without vocabularies of users and items to an export that a server can feed from raw ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.dataset import Dataset, read_arrow
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.evaluation.diagnostics import diagnose
from ranker.evaluation.predict import selection_of
from ranker.evaluation.stored_predictions import read_predictions
from ranker.export import export
from ranker.model import Ranker
from ranker.ranks import Ranks
from ranker.run import Run
from ranker.training.trainer import train
from tests.ranker.block_configs import NEXT
from tests.ranker.conftest import LOGS, prepared

ConfigOf = Callable[..., TrainConfig]
HASHED = LOGS.replace("item: {category: {}", "item: {category: {hash_buckets: 9}").replace(
    "user: {device: {}}", "user: {device: {}, name: {source: '\"user\"'}}"
)
BUCKETS = {"user": 97, "item": 23, "item.category": 9}
SMALLER = "tables.buckets={item: 11, user: {rows: 31, hashes: 2}}"


@pytest.fixture(scope="module")
def hashed(once: Callable[..., Path]) -> Path:
    """The small logs with hashed users, items and categories. 300 users share 97 rows."""
    ids = f"user_hash_buckets: {BUCKETS['user']}\nitem_hash_buckets: {BUCKETS['item']}\n"
    return once("hashed", lambda out: prepared(HASHED + ids, out, out))


@pytest.fixture(scope="module", params=["whole", "smaller"])
def run(request: pytest.FixtureRequest, once: Callable[..., Path], hashed: Path, config_of: ConfigOf) -> Path:
    """A run of two steps, evaluated with its predictions kept."""

    def make(out: Path) -> None:
        train(
            config_of(f"dataset={hashed}", "training.max_steps=2", *([SMALLER] if request.param == "smaller" else [])),
            out,
        )
        evaluate(out, keep_predictions=True)

    return once(f"hashed.{request.param}", make)


def test_tables_have_a_row_for_each_bucket(run: Path, read_checkpoint: Callable[[Path], dict[str, torch.Tensor]]):
    tables = Run(run).config.tables
    shapes = {n.split(".")[-2]: tuple(x.shape) for n, x in read_checkpoint(Run(run).best()).items() if x.dim() == 2}
    for table, feature in (("request_user", "user"), ("candidate_item", "item"), ("sequence_item", "item")):
        asked = tables.buckets_of(feature)
        assert shapes[table] == (1 + (BUCKETS[feature] if asked is None else asked.rows), 8)


def test_users_are_measured_one_by_one_though_they_share_rows(run: Path, hashed: Path):
    predictions = read_predictions(run / "predictions.parquet")
    users = Dataset(hashed).manifest.splits["test"].users
    assert len(np.unique(predictions.user)) == users == 300 > BUCKETS["user"]
    assert json.loads((run / "metrics.json").read_text())["users"] == users


def test_next_items_are_not_looked_for_by_hashes(hashed: Path, config_of: ConfigOf):
    """A hash does not tell which item it is of: the figures are over nothing, and say so."""
    block = NEXT.replace("key: item.sid_1, slots: [item.sid_1], ", "")  # the dataset has no codes
    config = config_of(f"dataset={hashed}", f"model.long=[{block}]", "model.short=null")
    data = Dataset(hashed)
    spec = resolve(config.features, data.manifest)
    model = Ranker(spec, config, {}, device=torch.device("cpu"))
    alone = Ranks(0, 1, 1, torch.device("cpu"))
    (found,) = diagnose(model, data, "test", selection_of(config, data, spec), config, alone, sample=20)
    assert found.requests >= 20
    assert {(figure.value, figure.over) for figure in found.figures} == {(None, 0)}


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    assert export(run, tmp_path / "export", requests=300) <= 1e-5
    return tmp_path / "export"


def test_the_exports_manifest_tells_how_to_hash_a_raw_id(exported: Path, hashed: Path):
    """By its words alone: the rows that a server makes of raw ids are those of the dataset."""
    told: dict[str, Any] = json.loads((exported / "manifest.json").read_text())["hashed"]
    assert told["function"] == "md5_64"
    assert told["rule"] == (
        "row = 1 + h mod buckets, h = first 8 bytes, little-endian, of MD5('#' + text); text: the id in UTF-8, "
        "integers in decimal, true and false as 1 and 0, a bag's values one by one, trimmed, empty ones left out; a "
        "missing id is row 0"
    )
    assert told["buckets"] == BUCKETS

    def row(raw: object, feature: str) -> int:
        h = int.from_bytes(hashlib.md5(f"#{raw}".encode()).digest()[:8], "little")
        return 1 + h % told["buckets"][feature]

    dataset = Dataset(hashed)
    items = dataset.items().to_pylist()
    assert [item["bucket"] for item in items] == [0, *(row(item["id"], "item") for item in items[1:])]
    names = read_arrow(dataset.root / "vocabularies" / "user.name.arrow")
    raw = dict(zip(names["index"].to_pylist(), names["value"].to_pylist(), strict=True))
    for partition in range(len(dataset.manifest.partitions)):
        for user in dataset.histories(partition).to_pylist():
            assert user["bucket"] == row(raw[user["user.name"]], "user")


def test_a_dataset_with_vocabularies_has_nothing_to_hash(once: Callable[..., Path], trained: Path):
    exported = once("exported", lambda out: export(trained, out))
    assert json.loads((exported / "manifest.json").read_text())["hashed"] == {}
