"""Commands run as child processes that can be stopped, or as TorchX jobs whose end and log are known."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from features.errors import UserError
from ranker.compare.config import SchedulerConfig
from ranker.compare.launching import ChildProcesses, TorchXJobs, launcher_of


def test_a_child_is_no_rank_of_its_parents_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANKER_DATA", "kept")
    (tmp_path / "told.py").write_text("import os; print(*(os.environ.get(k) for k in ('WORLD_SIZE', 'RANKER_DATA')))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    log.write_text("before\n")
    assert ChildProcesses(1).module("told", [], log) == 0
    assert log.read_text() == "before\nNone kept\n"


def test_stopping_ends_what_runs_and_starts_nothing_more(tmp_path: Path):
    launcher, log = ChildProcesses(1), tmp_path / "log"
    codes: list[int] = []
    sleep = ["-n", "1", "-s", "import time; print('on', flush=True)", "time.sleep(600)"]
    thread = threading.Thread(target=lambda: codes.append(launcher.module("timeit", sleep, log)))
    thread.start()
    while not (log.is_file() and "on" in log.read_text()):
        time.sleep(0.01)
    launcher.stop()
    thread.join(60)
    assert codes == [-15]
    assert launcher.module("timeit", ["-n", "1", "pass"], log) != 0
    assert log.read_text().strip() == "on"


def test_a_job_of_torchx_tells_how_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`ranker.train` without a config, by a real scheduler of this machine, with TorchX's own settings."""
    (tmp_path / "cluster.ini").write_text(f"[local_cwd]\nlog_dir = {tmp_path}/jobs\n")
    monkeypatch.setenv("TORCHXCONFIG", str(tmp_path / "cluster.ini"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    launcher = launcher_of(SchedulerConfig(name="local_cwd"), None)
    assert isinstance(launcher, TorchXJobs)
    assert launcher.train(tmp_path / "none.yaml", tmp_path / "run", False, tmp_path / "log") == 1
    ended, *said = (tmp_path / "log").read_text().splitlines()
    assert ended.endswith(": FAILED")
    assert f"[0]:error: {tmp_path / 'none.yaml'}: cannot read the config: No such file or directory" in said
    assert (tmp_path / "jobs" / "torchx").is_dir()
    assert all(line.startswith("[0]:") for line in said)  # and nothing of torchrun's own
    launcher.stop()
    assert launcher.train(tmp_path / "none.yaml", tmp_path / "run", False, tmp_path / "later") == 1
    assert not (tmp_path / "later").exists()


def test_an_unknown_scheduler():
    with pytest.raises(UserError, match=r"no scheduler 'sulrm'; it has .*slurm"):
        launcher_of(SchedulerConfig(name="sulrm"), None)


def test_torchxs_settings_must_exist(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHXCONFIG", "no-such-file.ini")
    with pytest.raises(UserError, match=r"TORCHXCONFIG=no-such-file.ini"):
        launcher_of(SchedulerConfig(name="local_cwd"), None)
