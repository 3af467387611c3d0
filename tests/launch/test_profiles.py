"""TorchX's settings: what the repository's files say is what is submitted."""

from __future__ import annotations

import configparser
import inspect
import re
from pathlib import Path

import pytest
from torchx.schedulers import get_scheduler_factories

from launch import components
from tests.launch.golden_runs import GOLDEN, ROOT, RUNS, dry_run, text_of

SETTINGS = (".torchxconfig", "launch/profiles/slurm.ini", "launch/profiles/kubernetes.ini")
TRAIN = ("launch/components.py:train", "--config", "c.yaml", "--out", "r")


@pytest.mark.parametrize("name", RUNS)
def test_two_machines_of_eight_ranks(name: str):
    """The request is, line by line, the one kept; `python -m tests.launch.golden_runs` keeps another."""
    assert text_of(name).splitlines() == (GOLDEN / name).read_text().splitlines()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_key_is_one_that_is_read(name: str):
    """TorchX passes over what it does not know; the keys that are commented out count too."""
    read = configparser.ConfigParser()
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read_string(re.sub(r"^# ([a-z_-]+ = )", r"\1", (ROOT / name).read_text(), flags=re.MULTILINE))
    schedulers = get_scheduler_factories()
    for section in read.sections():
        if section == "cli:run":
            known = {"scheduler", "workspace", "component"}
        elif section.startswith("component:launch/components.py:"):
            known = set(inspect.signature(getattr(components, section.rpartition(":")[2])).parameters)
        else:
            known = {key for key, _ in schedulers[section](session_name="").run_opts()}
        assert set(read[section]) <= known, section


def test_the_repositorys_settings_hold_from_its_root():
    assert "'log_dir': 'runs/logs/torchx/ranker-train-" in dry_run(*TRAIN)[1]
    assert "sbatch --parsable --comment=ranker " in dry_run("-s", "slurm", *TRAIN)[1]
    assert "queue: default" in dry_run("-s", "kubernetes", "--workspace", "", *TRAIN, "--image", "i:1")[1]


def test_the_command_line_comes_first():
    profile = "launch/profiles/slurm.ini"
    script = dry_run("-cfg", "partition=night", *TRAIN, "--nproc", "4", profile=profile)[1]
    assert "--partition=night --time=2-00:00:00" in script
    assert "--nnodes 2 --nproc_per_node 4" in script


def test_a_jobs_copy_of_the_repository_is_code(tmp_path: Path):
    """`job_dir` would take environments, datasets and runs along."""
    job = tmp_path / "job"
    dry_run("-s", "slurm", "-cfg", f"job_dir={job}", *TRAIN)
    assert (job / "ranker" / "train.py").read_bytes() == (ROOT / "ranker" / "train.py").read_bytes()
    ignored = (ROOT / ".torchxignore").read_text().splitlines()
    assert {".git", ".venv", "runs", "datasets"} <= set(ignored)
    assert not {path.name for path in job.rglob("*")} & {*ignored, "__pycache__"}


def test_images_leave_out_the_same():
    def listed(name: str) -> list[str]:
        return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]

    assert listed(".dockerignore") == listed(".torchxignore")
