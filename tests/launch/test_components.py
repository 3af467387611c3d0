"""The TorchX components make the commands they should, on a machine and on a cluster."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ranker.compare.config import SchedulerConfig
from ranker.compare.launching import component_arguments
from tests.launch import golden_runs
from tests.launch.golden_runs import ROOT


def dry_run(*arguments: str) -> str:
    """What `torchx run` would submit, spaces and line breaks joined."""
    text = "".join(golden_runs.dry_run(*arguments))
    return " ".join(text.replace('"', "'").replace("' '", "").split()).replace("' '", "")


def test_train_on_this_machine():
    out = dry_run(
        *("-s", "local_cwd", "launch/components.py:train", "--config", "c.yaml", "--out", "runs/a", "--nproc", "2"),
        *("--", "--set", "model.width=[1, 2]", "--resume"),
    )
    assert "--nnodes 1" in out
    assert "--nproc_per_node 2" in out
    assert "-m ranker.train c.yaml --out runs/a --set" in out.replace("' '", "")
    assert "model.width=[1, 2]" in out
    assert "--resume" in out


def test_train_on_a_cluster():
    out = dry_run(
        *("-s", "slurm", "-cfg", "partition=gpu", "launch/components.py:train", "--config", "c.yaml", "--out", "r"),
        *("--nnodes", "2", "--nproc", "8", "--gpu", "8", "--memory_mb", "64000"),
    )
    assert out.count("#SBATCH --job-name") == 2
    assert "--gpus-per-task=8" in out
    assert "ranker.train" in out


def test_restarts_and_retries_go_on_from_checkpoints():
    where = ("-s", "local_cwd", "launch/components.py:train", "--config", "c.yaml", "--out", "r")
    restarts = dry_run(*where, "--max_restarts", "3", "--env", "A=1")
    assert "-m ranker.train c.yaml --out r --resume" in restarts
    assert "'PET_MAX_RESTARTS': '3'" in restarts
    assert "'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'" in restarts
    assert "'A': '1'" in restarts
    assert "--resume" in dry_run(*where, "--max_retries", "2")
    assert "--resume" not in dry_run(*where)


def test_evaluate():
    out = dry_run("-s", "local_cwd", "launch/components.py:evaluate", "--run", "runs/a", "--split", "valid")
    assert "-m ranker.evaluate runs/a --split valid" in out


def test_memory():
    out = dry_run(
        *("-s", "local_cwd", "launch/components.py:memory", "--run", "runs/a", "--store", "lmdb:store", "--nproc", "2"),
        *("--max_restarts", "1", "--", "--set", "codes.most=50"),
    )
    assert "--nproc_per_node 2" in out
    assert "-m ranker.memory.build runs/a --store lmdb:store --set codes.most=50" in out
    assert "'PET_MAX_RESTARTS': '1'" in out


def test_a_store_of_one_machine_is_not_for_many():
    with pytest.raises(RuntimeError, match=r"LMDB is of one machine, and --nnodes is 2"):
        dry_run(
            *("-s", "slurm", "launch/components.py:memory", "--run", "r", "--store", "lmdb:store", "--nnodes", "2"),
        )


def test_machines_find_one_another_at_the_port_that_is_asked_for():
    out = dry_run(
        *("-s", "slurm", "launch/components.py:evaluate", "--run", "runs/a", "--nnodes", "2", "--rdzv_port", "4242"),
    )
    assert out.count("--rdzv_endpoint ${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:4242") == 2


def test_folders_of_a_container():
    mounts = "type=volume,src=claim,dst=/shared,type=bind,src=/data,dst=/logs,readonly"
    for component in (("export", "--run", "r", "--out", "o"), ("evaluate", "--run", "r")):
        name, *arguments = component
        out = dry_run(
            *("-s", "kubernetes", "--workspace", "", f"launch/components.py:{name}", *arguments),
            *("--image", "i:1", "--mounts", mounts),
        )
        assert "mountPath: /shared name: mount-0 readOnly: false" in out
        assert "mountPath: /logs name: mount-1 readOnly: true" in out
        assert "claimName: claim" in out


def test_a_comparisons_runs_find_their_data_in_a_container():
    config = SchedulerConfig(
        name="kubernetes", image="i:1", mounts=["type=volume,src=claim,dst=/shared"], gpu=1, max_retries=2
    )
    out = dry_run(
        *("-s", "kubernetes", "--workspace", "", "launch/components.py:train", *component_arguments(config)),
        *("--config", "/shared/c.yaml", "--out", "/shared/run"),
    )
    assert "mountPath: /shared name: mount-0 readOnly: false" in out
    assert "claimName: claim" in out
    assert "maxRetry: 2" in out
    assert "nvidia.com/gpu: '1'" in out


def test_export_is_one_process():
    out = dry_run("-s", "slurm", "launch/components.py:export", "--run", "runs/a", "--out", "o", "--memory_mb", "64000")
    assert "python -m ranker.cli export runs/a --out o" in out
    assert "--mem=64000" in out
    assert "torchrun" not in out


def test_compare_is_one_process_that_starts_its_own():
    out = dry_run(
        *("-s", "local_cwd", "launch/components.py:compare", "--config", "c.yaml", "--out", "o", "--parallel", "3"),
        *("--env", "A=1", "--", "--methods", "din,uxsid", "--lengths", "50,1000"),
    )
    arguments = "-m ranker.cli compare c.yaml --out o --parallel 3 --methods din,uxsid --lengths 50,1000"
    assert arguments in out.replace("', '", " ")
    assert "'A': '1'" in out
    assert "torchrun" not in out


def test_plain_ddp_needs_no_component():
    out = dry_run("-s", "local_cwd", "dist.ddp", "-j", "1x2", "-m", "ranker.train", "--", "c.yaml", "--out", "r")
    assert "-m ranker.train c.yaml --out r" in out


@pytest.mark.parametrize("module", ["ranker.train", "ranker.evaluate", "ranker.memory.build"])
def test_the_modules_they_start_take_these_arguments(module: str):
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    option = {"ranker.train": "--out", "ranker.evaluate": "--split", "ranker.memory.build": "--store"}[module]
    assert option in result.stdout
