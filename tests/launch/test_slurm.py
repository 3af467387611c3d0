"""Jobs on a real Slurm cluster of two nodes: they train as anywhere else, and a node that is lost costs only time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch import Tensor

from ranker.compare.config import SchedulerConfig
from ranker.compare.launching import TorchXJobs
from ranker.run import Run
from ranker.training import checkpoint
from tests.launch.slurm_cluster import COMPONENTS, JOB_S, ROOT, UNDER_WAY, SlurmCluster, why_not
from tests.ranker.training.killed_ranks import differences

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

Read = Callable[[Path], dict[str, Tensor]]

SETTINGS = (
    "loader.drop_item=0.2", "model.tower.dropout=0.3", "training.epochs=4", "training.checkpoint_every=15",
    "training.validate_every=80", "optimizer.schedule={decay: cosine}",
)  # fmt: skip
LOSSES = ((1, 15), (0, 45))
"""which part of the job loses its node, and after the checkpoint of which step"""


@pytest.fixture(scope="module")
def undisturbed(once: Callable[..., Path], config_file: Path) -> Path:
    """The run of the same two ranks on one machine, without Slurm."""

    def make(out: Path) -> None:
        subprocess.run(
            [
                sys.executable, "-m", "torchx.cli.main", "run", "-s", "local_cwd", f"{COMPONENTS}:train", "--config",
                str(config_file), "--out", str(out), "--nproc", "2", "--", "--set", *SETTINGS,
            ],
            cwd=out.parent,
            env=os.environ
            | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            check=True,
            timeout=JOB_S,
        )  # fmt: skip

    return once("undisturbed_by_slurm", make)


def check_whole_and_equal(run: Path, expected: Path, read_checkpoint: Read) -> None:
    """A run folder that has everything, and the last checkpoint of another run, to the last bit."""
    found, wanted = Run(run), Run(expected)
    assert found.info["ranks"] == 2
    assert (run / "training.json").is_file()
    assert list((run / "tensorboard").iterdir())
    last, other = found.checkpoints()[-1], wanted.checkpoints()[-1]
    assert last.name == other.name
    assert differences(read_checkpoint(last), read_checkpoint(other)) == []


def test_a_job_on_two_nodes_is_the_run_of_two_ranks(
    cluster: SlurmCluster, config_file: Path, tmp_path: Path, undisturbed: Path, read_checkpoint: Read
):
    run = tmp_path / "run"
    job = cluster.submit("train", "--config", str(config_file), "--out", str(run), "--", "--set", *SETTINGS)
    assert cluster.wait(job) == "COMPLETED", cluster.said(job)
    check_whole_and_equal(run, undisturbed, read_checkpoint)


def test_lost_nodes_cost_only_time(
    cluster: SlurmCluster, config_file: Path, tmp_path: Path, undisturbed: Path, read_checkpoint: Read
):
    """First the second machine of the job, then the first, where its script, its rendezvous and rank 0's writer are."""
    run = tmp_path / "run"
    job = cluster.submit(
        *("train", "--config", str(config_file), "--out", str(run), "--max_retries", "3", "--", "--set", *SETTINGS)
    )
    for part, step in LOSSES:
        deadline = time.monotonic() + JOB_S
        while not any(path >= checkpoint.path_of(run, step) for path in checkpoint.all_of(run)):
            assert cluster.job(job)["JobState"] in UNDER_WAY, cluster.said(job)
            assert time.monotonic() < deadline, f"no checkpoint of step {step} in {JOB_S} s: {cluster.said(job)}"
            time.sleep(0.05)
        while len(nodes := cluster.nodes_of(job)) < 2 or not all(nodes):  # it waits to be started again
            assert time.monotonic() < deadline, f"job {job} does not start again in {JOB_S} s: {cluster.said(job)}"
            time.sleep(0.1)
        node = nodes[part]
        cluster.lose(node)
        cluster.wait_for_loss(node)
        cluster.bring_back(node)
    assert cluster.wait(job) == "COMPLETED", cluster.said(job)
    # more often, where a machine is so busy that Slurm takes a node for lost
    assert cluster.said(job).count("resumed from") >= len(LOSSES)
    assert int(cluster.job(job)["Restarts"]) >= len(LOSSES)
    check_whole_and_equal(run, undisturbed, read_checkpoint)


def test_a_comparison_knows_how_its_jobs_ended(
    cluster: SlurmCluster, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where Slurm keeps no accounts, too, from which TorchX reads it; and what a job said that failed."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    run, none = Path(shutil.copytree(undisturbed, tmp_path / "run")), tmp_path / "none.yaml"
    launcher = TorchXJobs(SchedulerConfig(name="slurm", cfg={"partition": "cpu"}, cpu=1))
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(launcher.evaluate, run, "test", tmp_path / "good.log")
        bad = pool.submit(launcher.train, none, tmp_path / "other", False, tmp_path / "bad.log")
        try:
            ends = good.result(JOB_S), bad.result(JOB_S)
        finally:
            launcher.stop()
    assert ends == (0, 1)
    assert (run / "metrics.json").is_file()
    assert (run / "predictions.parquet").is_file()
    ended, *said = (tmp_path / "bad.log").read_text().splitlines()
    assert ended.endswith(": FAILED")
    assert f"[0]:error: {none}: cannot read the config: No such file or directory" in said
