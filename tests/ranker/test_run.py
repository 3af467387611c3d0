"""A run folder says what made it, and is used with nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from features.config_file import load_config
from features.dataset import Dataset, DatasetError
from features.provenance import git_commit
from ranker.config import TrainConfig
from ranker.evaluate import evaluate
from ranker.export import export
from ranker.run import Run, RunError, versions
from ranker.training.trainer import train

ConfigOf = Callable[..., TrainConfig]


def test_config_is_the_resolved_one(trained: Path, config_of: ConfigOf):
    saved = load_config(trained / "config.yaml", TrainConfig)
    assert saved == config_of("training.epochs=4")
    text = (trained / "config.yaml").read_text()
    assert "epochs: 4" in text
    assert "clip_norm: 10.0" in text  # defaults too


def test_run_json_says_what_made_it(trained: Path, dataset: Path):
    info = json.loads((trained / "run.json").read_text())
    assert info["dataset"] == {"name": "small", "content_hash": Dataset(dataset).manifest.content_hash}
    assert (info["seed"], info["ranks"]) == (0, 1)
    assert info["versions"] == versions()
    assert info["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"torchrec", "numpy", "pyarrow", "python"} <= info["versions"].keys()
    assert info["git_commit"] == git_commit()
    assert info["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", info["git_commit"])
    assert isinstance(info["command"], list)


def test_another_dataset_is_refused(trained: Path, gaps: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = Run(run).config.model_copy(update={"dataset": gaps})
    changed = Run(run)
    changed.config = config
    changed.save_config()
    message = r"content hash [0-9a-f]{12}…, but .* was trained on [0-9a-f]{12}… \(small\); prepare that one again"
    with pytest.raises(RunError, match=message):
        evaluate(run)
    with pytest.raises(RunError, match=message):
        export(run, tmp_path / "export")
    with pytest.raises(RunError, match=message):
        train(config, run, resume=True)
    assert not (tmp_path / "export").exists()


def test_a_dataset_that_is_gone_is_named(trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    changed = Run(run)
    changed.config = changed.config.model_copy(update={"dataset": Path("gone")})
    changed.save_config()
    with pytest.raises(DatasetError, match=r"gone: no manifest.json"):
        evaluate(run)


_HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_is_trained_by_one_process_at_a_time(trained: Path, config_of: ConfigOf, tmp_path: Path):
    """Even where the one that has it is killed, the next can go on."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = Run(run).checkpoints()
    command = [sys.executable, "-c", _HOLDER, str(run / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="another process is training this run; wait for it, or stop it"):
            train(config_of("training.epochs=5"), run, resume=True)
        assert Run(run).checkpoints() == before
        assert Run(run).config.training.epochs == 4
        # it takes a moment to end, and the next waits for that
        threading.Timer(0.5, holder.kill).start()
        began = time.monotonic()
        train(config_of("training.epochs=4"), run, resume=True)
        assert time.monotonic() - began > 0.4


def test_a_folder_that_is_no_run(tmp_path: Path):
    for command in (evaluate, lambda root: export(root, tmp_path / "export")):
        with pytest.raises(RunError, match=r"no run.json; not a run folder"):
            command(tmp_path / "nothing")


def test_a_run_without_checkpoint_names_the_way_on(trained: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(RunError, match=r"no checkpoint yet; go on with `ranker train … --out .* --resume`"):
        evaluate(run)
