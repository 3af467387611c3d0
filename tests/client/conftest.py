"""The client, exported models and requests for them; the small dataset and model are those of `tests.ranker`."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ranker.export import export
from ranker.requests_file import write_requests
from ranker.training.trainer import train
from tests.client.building import OPERATORS, build, operator_options, why_not
from tests.ranker.block_configs import ALL
from tests.ranker.conftest import ConfigOf, Once, coded, config_file, config_of, dataset, once, trained
from tests.ranker.export.conftest import with_packages

__all__ = ["coded", "config_file", "config_of", "dataset", "once", "trained", "with_packages"]

Client = Callable[..., "subprocess.CompletedProcess[str]"]
Change = Callable[[dict[str, Tensor]], object]
Changed = Callable[..., Path]


@pytest.fixture(scope="session")
def program(once: Once) -> Path:
    """Built once."""
    if reason := why_not():
        pytest.skip(reason)
    return once("client", build) / "ranker_client"


@pytest.fixture(scope="session")
def client(program: Path) -> Client:
    """Run the client on some arguments, with the operators of some of FBGEMM's libraries."""

    def client(*arguments: str | Path, libraries: Sequence[str] = OPERATORS) -> subprocess.CompletedProcess[str]:
        command = [program, *arguments, *operator_options(libraries)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    return client


@pytest.fixture(scope="session")
def runs(once: Once, trained: Path, coded: Path, config_of: ConfigOf) -> dict[str, Path]:
    """The small run, and one with UxSID, HiSAC and HyTRec, hardly trained."""
    options = (
        f"dataset={coded}",
        "features.sequence=[item, item.sid_1]",
        "features.codes=[item.sid_1, item.sid_2]",
        f"model.long=[{ALL}]",
        "tasks.conversion=null",
        "training.max_steps=3",
        "training.validation_split=null",
    )
    return {"small": trained, "three blocks": once("three_blocks", lambda out: train(config_of(*options), out))}


@pytest.fixture(scope="session")
def exports(once: Once, runs: dict[str, Path]) -> dict[str, Path]:
    """Folders of `ranker export`."""
    of = {"small": "exported", "three blocks": "three_blocks_exported"}
    return {name: once(of[name], lambda out, run=run: export(run, out)) for name, run in runs.items()}


@pytest.fixture(scope="session")
def requests(once: Once, runs: dict[str, Path]) -> dict[str, Path]:
    """Request files of the test split."""
    of = {"small": "small.requests", "three blocks": "three_blocks.requests"}
    return {
        name: once(of[name], lambda out, run=run: write_requests(run, "test", 12, out)) for name, run in runs.items()
    }


@pytest.fixture
def changed(requests: dict[str, Path], tmp_path: Path) -> Changed:
    """A model's request file after a change of its tensors."""

    def changed(change: Change, model: str = "small") -> Path:
        tensors = load_file(requests[model])
        change(tensors)
        with safe_open(requests[model], "pt") as file:
            save_file(tensors, tmp_path / "requests", file.metadata())
        return tmp_path / "requests"

    return changed
