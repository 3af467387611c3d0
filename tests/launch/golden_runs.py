"""What `torchx run` would submit with the profiles of ``launch/profiles/``, as text that is the same each time.

``python -m tests.launch.golden_runs`` writes the files in ``golden/`` anew; their diff then shows what changed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torchx
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
TRAIN = ("launch/components.py:train", "--config", "/shared/c.yaml", "--out", "/shared/run")
STORE = "redis://store:6379/0?namespace=ranker"
MEMORY = ("launch/components.py:memory", "--run", "/shared/run", "--store", STORE)
RUNS = {
    "train.slurm.sh": ("launch/profiles/slurm.ini", *TRAIN),
    "train.kubernetes.yaml": ("launch/profiles/kubernetes.ini", *TRAIN),
    "memory.slurm.sh": ("launch/profiles/slurm.ini", *MEMORY),
    "memory.kubernetes.yaml": ("launch/profiles/kubernetes.ini", *MEMORY),
}
"""by file: TorchX's settings, and the component with its arguments"""


def dry_run(*arguments: str, profile: str | None = None) -> tuple[str, str]:
    """The application and the scheduler's request that `torchx run` would make, from the repository's root."""
    command = [sys.executable, "-m", "torchx.cli.main", "run", "--dryrun", *arguments]
    # neither the user's settings nor a cluster that this machine belongs to
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCHXCONFIG", "LOGLEVEL")}
    environment |= {"HOME": "/nonexistent", "SLURM_CONF": os.devnull}
    environment |= {} if profile is None else {"TORCHXCONFIG": profile}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    application, _, request = done.stdout.partition("=== SCHEDULER REQUEST ===\n")
    return application, request


def text_of(name: str) -> str:
    """What is submitted, with the job's name, which TorchX draws, and TorchX's version as words."""
    profile, *arguments = RUNS[name]
    request = dry_run(*arguments, profile=profile)[1].strip() + "\n"
    request = re.sub(r"ranker-(train|memory)-[a-z0-9]{10,}", r"ranker-\1-ID", request).replace(
        torchx.__version__, "VERSION"
    )
    # a line of its own for each text: where TorchX breaks lines depends on the name's length
    return yaml.safe_dump(yaml.safe_load(request), width=10_000) if name.endswith(".yaml") else request


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in RUNS:
        (GOLDEN / name).write_text(text_of(name))
