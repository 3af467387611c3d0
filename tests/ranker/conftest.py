"""Small prepared datasets and trained runs that many tests read; made once for all of pytest's worker processes."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from features.config_file import load_config
from features.dataset import Dataset
from features.prepare import prepare
from features.schema import PrepareConfig
from features.semantic_ids.apply import apply
from features.semantic_ids.config import SidsConfig
from features.semantic_ids.fit import fit
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.training import trainer as training

Once = Callable[[str, Callable[[Path], object]], Path]
ConfigOf = Callable[..., TrainConfig]

LOGS = """
name: small
source:
  type: synthetic
  seed: 3
  users: 300
  items: 40
  events_per_user: 60
  max_events_per_user: 300
  requests_per_user: 8
  candidates_per_request: 8
  topics: 4
  content_dim: 4
  interests_per_user: 1
  old_interest_share: 0
  click_rate: 0.3
  conversion_rate: 0.4
columns:
  user: {device: {}}
  item: {category: {}, price: {kind: dense, transform: log1p}}
  event: {action: {}}
  candidate: {position: {}}
labels: {click: click, conversion: conversion}
partitions: 4
threads: 1
"""

MODEL = """
name: small
dataset: ${SMALL_DATASET}
features:
  request: [user, user.device]
  candidate: [item, item.category, candidate.position]
  dense: [item.price]
  sequence: [item, item.category]
  event: [event.action]
tables: {dim: 8, init_scale: 0.1, lr: 0.1}
model:
  short: {length: 20, hidden: [8]}
  long: [{type: mean}]
  tower: {hidden: [16]}
tasks: {conversion: conversion}
loader: {requests: 32, workers: 0, group: 2}
optimizer: {lr: 0.01}
training: {epochs: 2, threads: 1, device: cpu, log_every: 5}
"""


@pytest.fixture(autouse=True, scope="session")
def _a_healthy_toolchain() -> object:
    """The toolchain's check has tests of its own; it takes seconds at each start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ensure_healthy", lambda device: None)
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a folder by its name unless another test or worker process has made it."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (root / f"{name}.made").exists():
                make(folder)
                (root / f"{name}.made").touch()
        return folder

    return once


def prepared(text: str, folder: Path, out: Path) -> None:
    """Prepare the dataset of a config's text."""
    config = folder.with_suffix(".yaml")
    config.write_text(text)
    prepare(load_config(config, PrepareConfig), out)


@pytest.fixture(scope="session")
def dataset(once: Once) -> Path:
    """Generated logs: 300 users, 40 items, every probability known."""
    return once("dataset", lambda out: prepared(LOGS, out, out))


@pytest.fixture(scope="session")
def open_ids(once: Once) -> Path:
    """The same, with users, items, categories, positions and actions hashed so that none share a bucket."""
    columns = {"item: {category: {}": "1000000", "candidate: {position: {}": "1000", "event: {action: {}": "1000"}
    text = LOGS + "user_hash_buckets: 2000000000\nitem_hash_buckets: 2000000000\n"
    for column, buckets in columns.items():
        text = text.replace(column, column.replace("{}", f"{{hash_buckets: {buckets}}}"))
    return once("open_ids", lambda out: prepared(text, out, out))


def sids_config(**changes: object) -> SidsConfig:
    """Codes from behaviour: the small logs have nothing else."""
    base = {
        "content": [{"type": "behaviour", "dim": 8, "min_count": 1}],
        "levels": [4, 4],
        "version": "monday",
        "report": {"pictures": False},
    }
    return SidsConfig.model_validate(base | changes)


@pytest.fixture(scope="session")
def coded(once: Once, dataset: Path) -> Path:
    """The same with semantic IDs of two levels; their codebook lies beside it."""

    def make(out: Path) -> None:
        copy = Dataset(shutil.copytree(dataset, out / "dataset"))
        codebook, _ = fit(sids_config(), copy, out / "codebook", lambda line: None)
        apply(codebook, copy)

    return once("coded", make) / "dataset"


@pytest.fixture(scope="session")
def gaps(once: Once) -> Path:
    """Logs with gaps: users without events, items and users that training never saw, partitions of unlike
    sizes."""

    def make(out: Path) -> None:
        logs = out.with_name("gaps.logs")
        logs.mkdir(exist_ok=True)
        events = [(u, u % 5 + i, 1_600_000_000 + i) for u in range(0, 9, 2) for i in range(6)]
        shown = [(u, (u + k) % 12, 1_600_001_000 + 10 * r, r, k) for u in range(9) for r in range(5) for k in range(3)]
        new = [(u, 90 + k, 1_600_002_000, 9, k) for u in (1, 2, 77) for k in range(3)]
        write(logs / "events.parquet", ("user", "item", "time"), events)
        rows = [(*row, int((row[0] + row[1]) % 3 == 0), int(row[1] % 6 == 0)) for row in shown + new]
        write(logs / "impressions.parquet", ("user", "item", "time", "request", "k", "click", "conversion"), rows)
        text = f"""
name: gaps
source:
  type: logs
  events: {{path: {logs}/events.parquet, time_unit: s}}
  impressions: {{path: {logs}/impressions.parquet, time_unit: s}}
split: {{by: time, valid_from: "2020-09-13T12:43:50", test_from: "2020-09-13T12:44:00"}}
labels: {{click: click, conversion: conversion, never: click * 0}}
partitions: 4
threads: 1
"""
        prepared(text, out, out)

    return once("gaps", make)


def write(path: Path, names: tuple[str, ...], rows: list[tuple[int, ...]]) -> None:
    """A Parquet file of integers."""
    columns = zip(*rows, strict=True)
    pq.write_table(pa.table({n: pa.array(c, pa.int64()) for n, c in zip(names, columns, strict=True)}), path)


@pytest.fixture(scope="session")
def config_file(once: Once, dataset: Path) -> Path:
    """YAML of the small model."""

    def make(path: Path) -> None:
        path.write_text(MODEL.replace("${SMALL_DATASET}", str(dataset)))

    return once("small_model.yaml", make)


@pytest.fixture(scope="session")
def config_of(config_file: Path) -> ConfigOf:
    """The small model's config, with overrides as on the command line."""
    return lambda *overrides: load_config(config_file, TrainConfig, overrides)


@pytest.fixture(scope="session")
def trained(once: Once, config_of: ConfigOf) -> Path:
    """A run of four epochs, evaluated on its test split."""

    def make(out: Path) -> None:
        training.train(config_of("training.epochs=4"), out)
        evaluate(out)

    return once("trained", make)


def state_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its dotted name, whole, whatever the ranks that wrote it."""
    file = checkpoint.with_name(f".{checkpoint.name}.whole")
    dcp_to_torch_save(checkpoint, file)
    state = torch.load(file, weights_only=False)
    file.unlink()

    def leaves(value: Any, path: str) -> dict[str, Tensor]:
        if isinstance(value, dict):
            return {name: leaf for key, inner in value.items() for name, leaf in leaves(inner, f"{path}.{key}").items()}
        return {path: value} if isinstance(value, Tensor) else {}

    return leaves(state, "")


@pytest.fixture(scope="session")
def read_checkpoint() -> Callable[[Path], dict[str, Tensor]]:
    """Every tensor of a checkpoint by name."""
    return state_of


@pytest.fixture(scope="session")
def scalars(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], dict[str, dict[int, float]]]:
    """TensorBoard's scalars of a run: by tag, then step.

    TensorBoard reads files in the order of their names, which end in process and counter. Two writers of one process in
    one second, as only tests have them, may be named …9 and …10: the links put them in the order they were opened.
    """

    def scalars(run: Path) -> dict[str, dict[int, float]]:
        links = tmp_path_factory.mktemp("tensorboard")
        files = list((run / "tensorboard").iterdir())
        files.sort(key=lambda file: [int(digits) for digits in re.findall(r"\d+", file.name)])
        for number, file in enumerate(files):
            (links / f"events.out.tfevents.{number:06}").symlink_to(file.resolve())
        events = EventAccumulator(str(links)).Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    return scalars
