"""Processes that train as the ranks of one run, without an agent over them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

from tests.free_ports import free_port

ROOT = Path(__file__).parents[2]


def start_ranks(count: int, module: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """`python -m module` as each of `count` ranks; what they say on stderr is to be read."""
    port, size = str(free_port()), str(count)
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    command, environment = [sys.executable, "-m", module, *arguments], os.environ | group | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stderr=subprocess.PIPE,
            cwd=ROOT,
        )
        for rank in range(count)
    ]


def run_ranks_to_the_end(count: int, module: str, *arguments: str) -> None:
    """Start ranks, wait, and fail with what they said where one does not end well."""
    ranks = start_ranks(count, module, *arguments)
    try:
        told = [process.communicate(timeout=400)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0] * count, "\n".join(text[-3000:] for text in told)


def keep_one_process_group() -> None:
    """To be called by a rank that trains more than once: all in one process group, since the port to meet at is one,
    and without the toolchain's check."""
    from ranker import ranks
    from ranker.training import trainer

    trainer.ensure_healthy = lambda device: None
    dist.init_process_group("gloo")
    ranks.dist.init_process_group = lambda *_, **__: None  # type: ignore[assignment]
    ranks.dist.destroy_process_group = lambda *_: None  # type: ignore[assignment]
