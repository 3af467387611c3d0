"""A run's folder: its config, what it was made with, its checkpoints.

Layout::

    config.yaml      the resolved config
    run.json         dataset hash, codebooks of semantic IDs, versions, git commit, command, ranks, warm start
    moments.json     mean and deviation of each dense feature
    checkpoints/     step-00000100/ …; the position.json of each names the best so far by the monitored metric
    tensorboard/     scalars
    lock             held by the process that trains
    training.json    at the end of training: its speed, memory and parameters
    metrics.json     written by `ranker evaluate`; predictions.parquet too where asked for
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch

from features import provenance
from features.config_file import dump_config, load_config
from features.dataset import Dataset
from features.errors import UserError
from ranker.blocks import Codewords
from ranker.config import TrainConfig
from ranker.model import Moments
from ranker.ranks import Ranks
from ranker.training import checkpoint

_ENDING_S = 3.0
"""that a killed process may take to end"""
PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow", "duckdb")


# what a resumed run may not change, and what of it it may
_FIXED = (
    "seed", "features", "tables", "model", "tasks", "loader",
    "training.splits", "training.validation_split", "training.monitor", "warm_start",
)  # fmt: skip
_FREE = (
    "tables.replicas", "tables.pooled_sharding", "tables.sequence_sharding", "tables.sharding", "tables.reserve",
    "loader.workers", "loader.prefetch",
)  # fmt: skip


class RunError(UserError):
    """A run folder that cannot be used."""


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    return provenance.versions(PACKAGES)


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def write_json(path: Path, value: object) -> None:
    """The same for a value as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def leaves(value: object, path: str = "") -> dict[str, object]:
    """The values of a config by their dotted key; a list is one value."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    inner = cast("dict[str, object]", value)
    below = (leaves(inner[name], f"{path}.{name}" if path else name) for name in inner)
    return {key: leaf for part in below for key, leaf in part.items()}


def codebooks_of(config: TrainConfig, dataset: Dataset) -> dict[str, dict[str, str]]:
    """Version and content hash of each codebook whose codes the features read, by name."""
    features = config.features
    used = dataset.manifest.codebooks_behind(
        [*features.candidate, *features.sequence, *features.codes, *features.content, *features.dense]
    )
    return {name: {"version": info.version, "content_hash": info.content_hash} for name, info in used.items()}


def codewords_of(config: TrainConfig, dataset: Dataset) -> Codewords:
    """Codewords of the codebooks that blocks name, with the zero row of items without a code.

    Raises:
        DatasetError: the dataset has no such semantic IDs.
    """
    return {
        name: [torch.nn.functional.pad(torch.from_numpy(words), [0, 0, 1, 0]) for words in dataset.codewords(name)]
        for name in config.codebooks
    }


def _version(codebook: dict[str, str]) -> str:
    return f"{codebook['version']} ({codebook['content_hash'][:12]}…)"


class Run:
    """An existing run folder.

    Raises:
        RunError: not a run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        if not (self.root / "run.json").is_file():
            raise RunError(f"{self.root}: no run.json; not a run folder (`ranker train CONFIG --out …` makes one)")
        self.config = load_config(self.root / "config.yaml", TrainConfig)
        self.info: dict[str, object] = json.loads((self.root / "run.json").read_text())

    @classmethod
    def create(
        cls,
        root: Path,
        config: TrainConfig,
        dataset: Dataset,
        moments: Moments,
        world: int,
        warm_start: dict[str, object] | None = None,
    ) -> Run:
        """Make the folder, aside first: it is whole or absent.

        Args:
            warm_start: what it starts from, as :mod:`ranker.training.warm_start` records it.

        Raises:
            RunError: it exists and is not empty.
        """
        refuse_existing(root)
        aside = root.absolute().with_name(f".{root.name}.new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_text(aside / "config.yaml", dump_config(config))
        write_json(aside / "moments.json", moments)
        info = {
            "dataset": {"name": dataset.manifest.name, "content_hash": dataset.manifest.content_hash},
            "codebooks": codebooks_of(config, dataset),
            "seed": config.seed,
            "ranks": world,
            "git_commit": provenance.git_commit(),
            "versions": versions(),
            "command": sys.argv,
        } | ({"warm_start": warm_start} if warm_start else {})
        write_json(aside / "run.json", info)
        aside.rename(root)
        return cls(root)

    def go_on_with(self, config: TrainConfig) -> None:
        """Take another config from here on: a run may be trained longer, not differently.

        Raises:
            RunError: the config makes another model, or teaches or judges it by other examples.
        """
        old, new = leaves(self.config.model_dump(mode="json")), leaves(config.model_dump(mode="json"))
        for key in old | new:
            if old.get(key) != new.get(key) and key.startswith(_FIXED) and not key.startswith(_FREE):
                raise RunError(
                    f"{key}: {new.get(key)!r}, but {self.root} was trained with {old.get(key)!r}; resume with the "
                    "run's own config.yaml, or start a new run"
                )
        self.config = config

    def save_config(self) -> None:
        """Write ``config.yaml``."""
        write_text(self.root / "config.yaml", dump_config(self.config))

    def prepared(self) -> Dataset:
        """The run's dataset as it was prepared, whatever semantic IDs it has by now.

        Raises:
            RunError: the folder now holds another content.
        """
        dataset = Dataset(self.config.dataset)
        trained_on = self.info["dataset"]
        assert isinstance(trained_on, dict)
        if dataset.manifest.content_hash != trained_on["content_hash"]:
            raise RunError(
                f"{self.config.dataset}: content hash {dataset.manifest.content_hash[:12]}…, but {self.root} was "
                f"trained on {trained_on['content_hash'][:12]}… ({trained_on['name']}); prepare that one again or "
                "train a new run"
            )
        return dataset

    def dataset(self) -> Dataset:
        """The run's dataset.

        Raises:
            RunError: the folder now holds another content, or semantic IDs of another codebook.
        """
        dataset = self.prepared()
        now = codebooks_of(self.config, dataset)
        for name, trained_with in cast("dict[str, dict[str, str]]", self.info.get("codebooks", {})).items():
            if name not in now or now[name]["content_hash"] != trained_with["content_hash"]:
                has = f"has version {_version(now[name])}" if name in now else "has none"
                raise RunError(
                    f"{self.config.dataset}: semantic IDs {name!r}: {self.root} was trained with version "
                    f"{_version(trained_with)}, the dataset {has}; apply that codebook again (`ranker sids apply`), or "
                    "train a new run"
                )
        return dataset

    def moments(self) -> Moments:
        """Mean and deviation of each dense feature."""
        raw: dict[str, list[float]] = json.loads((self.root / "moments.json").read_text())
        return {name: (mean, deviation) for name, (mean, deviation) in raw.items()}

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return checkpoint.all_of(self.root)

    def checkpoint_named(self, name: str) -> Path:
        """A checkpoint by its folder's name.

        Raises:
            RunError: it is gone.
        """
        path = self.root / "checkpoints" / name
        if not path.is_dir():
            raise RunError(f"{path}: that checkpoint is gone; start a new run from one that is there")
        return path

    def best(self) -> Path:
        """The checkpoint to use: the best validated, else the last.

        Raises:
            RunError: there is none, or no longer.
        """
        if not (checkpoints := self.checkpoints()):
            raise RunError(f"{self.root}: no checkpoint yet; go on with `ranker train … --out {self.root} --resume`")
        best = checkpoint.position_of(checkpoints[-1]).best_step
        path = checkpoints[-1] if best is None else checkpoint.path_of(self.root, best)
        if not path.is_dir():
            raise RunError(f"{path}: the best checkpoint is gone; train the run again")
        return path


def refuse_existing(root: Path) -> None:
    """Raise RunError where a new run would overwrite something."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RunError(f"{root}: exists; choose another --out, or go on with that run by --resume")


@contextmanager
def training_alone(root: Path, ranks: Ranks) -> Generator[None]:
    """Keep other processes from training the same run meanwhile: they would overwrite its checkpoints.

    A record lock: it ends with the process that has it, however that ends, and worker processes do not inherit it.

    A process that was killed may take a moment to end, and whoever starts the run again may be quicker: that is waited
    for.

    Raises:
        RunError: another process trains the run.
    """
    with ExitStack() as held:

        def take() -> None:
            lock = held.enter_context((root / "lock").open("a"))
            until = time.monotonic() + _ENDING_S
            while True:
                try:
                    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > until:
                        told = f"{root}: another process is training this run; wait for it, or stop it"
                        raise RunError(told) from None
                time.sleep(0.05)

        ranks.agree(take)
        yield
