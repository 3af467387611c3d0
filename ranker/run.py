"""A run's folder: its config, what it was made with, its checkpoints.

Layout::

    config.yaml      the resolved config
    run.json         dataset hash, versions, git commit, command, ranks
    moments.json     mean and deviation of each dense feature
    checkpoints/     step-00000100/ …; best.json names the best by the monitored metric
    tensorboard/     scalars
    metrics.json     written by `ranker evaluate`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from features.config_file import dump_config, load_config
from features.dataset import Dataset
from features.errors import UserError
from ranker.config import TrainConfig
from ranker.model import Moments

PACKAGES = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "numpy", "pyarrow", "duckdb")


class RunError(UserError):
    """A run folder that cannot be used."""


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the code that runs, with ``+changes`` if the work tree differs; none outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, value: object) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(aside, path)


class Run:
    """An existing run folder.

    Raises:
        RunError: not a run folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        if not (self.root / "run.json").is_file():
            raise RunError(f"{self.root}: no run.json; not a run folder (`ranker train CONFIG --out {self.root}` makes one)")
        self.config = load_config(self.root / "config.yaml", TrainConfig)
        self.info: dict[str, object] = json.loads((self.root / "run.json").read_text())

    @classmethod
    def create(cls, root: Path, config: TrainConfig, dataset: Dataset, moments: Moments, world: int) -> Run:
        """Make the folder.

        Raises:
            RunError: it exists and is not empty.
        """
        refuse_existing(root)
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(dump_config(config))
        write_json(root / "moments.json", moments)
        info = {
            "dataset": {"name": dataset.manifest.name, "content_hash": dataset.manifest.content_hash},
            "seed": config.seed,
            "ranks": world,
            "git_commit": git_commit(),
            "versions": versions(),
            "command": sys.argv,
        }
        write_json(root / "run.json", info)
        return cls(root)

    def dataset(self) -> Dataset:
        """The run's dataset.

        Raises:
            RunError: the folder now holds another content.
        """
        dataset = Dataset(self.config.dataset)
        trained_on = self.info["dataset"]
        assert isinstance(trained_on, dict)
        if dataset.manifest.content_hash != trained_on["content_hash"]:
            raise RunError(
                f"{self.config.dataset}: content hash {dataset.manifest.content_hash[:12]}…, but {self.root} was trained on "
                f"{trained_on['content_hash'][:12]}… ({trained_on['name']}); prepare that dataset again or train a new run"
            )
        return dataset

    def moments(self) -> Moments:
        """Mean and deviation of each dense feature."""
        raw: dict[str, list[float]] = json.loads((self.root / "moments.json").read_text())
        return {name: (mean, deviation) for name, (mean, deviation) in raw.items()}

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.root / "checkpoints").glob("step-*"))

    def best(self) -> Path:
        """The checkpoint to use: the best validated, else the last.

        Raises:
            RunError: there is none.
        """
        best = self.root / "checkpoints" / "best.json"
        if best.is_file():
            return self.root / "checkpoints" / json.loads(best.read_text())["checkpoint"]
        if not (checkpoints := self.checkpoints()):
            raise RunError(f"{self.root}: no checkpoint yet; train it, or go on with `ranker train … --out {self.root} --resume`")
        return checkpoints[-1]


def refuse_existing(root: Path) -> None:
    """Raise RunError where a new run would overwrite something."""
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise RunError(f"{root}: exists; choose another --out, or go on with that run by --resume")
