"""A Slurm cluster of two nodes for one test: submit TorchX's components, lose a node, get it back."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.free_ports import free_port

ROOT = Path(__file__).parents[2]
COMPONENTS = ROOT / "launch" / "components.py"
WANTED = ("munged", "slurmctld", "slurmd", "sbatch")
UNDER_WAY = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
JOB_S = 300
"""a test's job ends within this time, or hangs"""


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if missing := [name for name in WANTED if shutil.which(name) is None]:
        return f"no Slurm here ({', '.join(missing)} not found): apt install slurm-wlm munge"
    if os.geteuid() != 0:
        return "Slurm's daemons are started by root only"
    return None


class SlurmCluster:
    """Two nodes that obey.

    Args:
        folder: where jobs are submitted, and where their logs are.
        environment: of the clients.
        orders: the process of :mod:`tests.launch.slurm_daemons`.
    """

    def __init__(self, folder: Path, environment: dict[str, str], orders: subprocess.Popen[str]) -> None:
        self.folder, self.environment, self._orders = folder, environment, orders

    def submit(self, component: str, *arguments: str) -> str:
        """`torchx run -s slurm` of a component on two nodes; the job's id."""
        command = [
            sys.executable, "-m", "torchx.cli.main", "run", "-s", "slurm", "-cfg", "partition=cpu",
            f"{COMPONENTS}:{component}", "--nnodes", "2", "--nproc", "1", "--cpu", "1", "--rdzv_port",
            str(free_port()), *arguments,
        ]  # fmt: skip
        said = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        handle = re.search(r"^slurm://torchx/(\d+)$", said.stdout, re.MULTILINE)
        assert handle, said.stderr
        return handle[1]

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, by name, of its first part."""
        shown = self._asked("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job: str) -> str:
        """A job's last state."""
        deadline = time.monotonic() + JOB_S
        while (state := self.job(job)["JobState"]) in UNDER_WAY:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state} after {JOB_S} s; {self.said(job)}")
            time.sleep(0.3)
        return state

    def nodes_of(self, job: str) -> list[str]:
        """The node of each part of a job."""
        return self._asked("squeue", "--noheader", "--sort=i", "--jobs", job, "--format", "%N").split()

    def said(self, job: str) -> str:
        """All that a job wrote."""
        logs = sorted(self.folder.glob(f"slurm-{job}*"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def lose(self, node: str) -> None:
        """Kill a node and all that runs there."""
        self._order(f"lose {node}")

    def wait_for_loss(self, node: str) -> None:
        """Wait until Slurm has noticed."""
        deadline = time.monotonic() + JOB_S
        while "down" not in self._asked("sinfo", "--noheader", "--nodes", node, "--format", "%T"):
            assert time.monotonic() < deadline, f"{node} is not down"
            time.sleep(0.1)

    def bring_back(self, node: str) -> None:
        """Start a lost node."""
        self._order(f"return {node}")

    def _order(self, line: str) -> None:
        assert self._orders.stdin is not None
        assert self._orders.stdout is not None
        self._orders.stdin.write(f"{line}\n")
        self._orders.stdin.flush()
        assert self._orders.stdout.readline() == "done\n"

    def _asked(self, *command: str) -> str:
        """What a client says; a busy controller is asked again."""
        deadline = time.monotonic() + 60
        while True:
            asked = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
            if asked.returncode == 0 or time.monotonic() > deadline:
                asked.check_returncode()
                return asked.stdout
            time.sleep(1)


@contextmanager
def slurm_cluster(folder: Path) -> Generator[SlurmCluster]:
    """A cluster that lives in here."""
    # munged's socket has room for a path of 107 characters, which pytest's own folders can exceed
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as daemons:
        command = [sys.executable, "-m", "tests.launch.slurm_daemons", daemons]
        started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "ready\n", "the cluster did not start"
            yield SlurmCluster(folder, _environment(Path(daemons) / "slurm.conf"), started)
        finally:
            assert started.stdin is not None
            started.stdin.close()
            started.wait(60)


def _environment(config: Path) -> dict[str, str]:
    """Of `torchx run` and the jobs: this Python's programs and our packages first; logs go on where a requeued job's
    first start ended."""
    paths = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    return kept | {
        **{name: os.pathsep.join(part for part in (first, kept.get(name)) if part) for name, first in paths.items()},
        "SLURM_CONF": str(config),
        "SBATCH_OPEN_MODE": "append",
        "SLURM_OPEN_MODE": "append",
        "OMP_NUM_THREADS": "1",
    }
