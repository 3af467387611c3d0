"""Training under torchrun in which a rank is killed (SIGKILL): at the begin of a step, or in the midst of a checkpoint.

As a program it is one such rank: ``CONFIG OUT --kill RANK STEP PLACE``, once in the run's life.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from launch.components import RESTARTED
from tests.free_ports import free_port

ROOT = Path(__file__).parents[3]


class Kill(NamedTuple):
    """Who is killed, when; place: ``step``, or ``checkpoint`` (the first at or after the step)."""

    rank: int
    step: int
    place: str


def run_ranks(
    config: Path, out: Path, options: Sequence[str], kill: Kill | None = None, ranks: int = 2, agents: int = 1
) -> str:
    """Train on some ranks, started again once if one dies; what they said.

    Args:
        agents: elastic agents that share the ranks, as on so many machines.

    Raises:
        RuntimeError: they did not end well.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(agents), "--nproc-per-node",
        str(ranks // agents), "--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-id", out.name,
        "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "-m", "tests.ranker.training.killed_ranks", str(config),
        str(out), "--set", *options,
    ]  # fmt: skip
    if kill:
        command += ["--kill", *map(str, kill)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", **RESTARTED}
    logs = [out.with_name(f"{out.name}.{agent}.log") for agent in range(agents)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for log in logs:
            with log.open("wb") as file:
                started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file))
        codes = [agent.wait(timeout=300) for agent in started]
    finally:
        for agent in started:
            agent.kill()
    said = "\n".join(log.read_text() for log in logs)
    if any(codes):
        raise RuntimeError(f"exit codes {codes}:\n{said[-6000:]}")
    return said


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same to the last bit."""
    same = {name for name in found.keys() & wanted.keys() if torch.equal(found[name], wanted[name])}
    return sorted((found.keys() | wanted.keys()) - same)


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--kill", nargs=3)
    given = parser.parse_args(arguments)

    from features.config_file import load_config
    from ranker.config import TrainConfig
    from ranker.training import checkpoint, trainer

    trainer.ensure_healthy = lambda device: None
    killed = given.out.with_name(f"{given.out.name}.killed")
    if given.kill and not killed.exists():
        kill = Kill(int(given.kill[0]), int(given.kill[1]), given.kill[2])
        step, save = trainer.Trainer.step, checkpoint.dcp.save

        def die() -> None:
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        def dying_save(*rest: object, **named: object) -> None:
            save(*rest, **named)  # type: ignore[arg-type]
            die()

        def dying_step(self: trainer.Trainer, *rest: object) -> None:
            if self.position.step == kill.step:
                if kill.place == "step":
                    die()
                checkpoint.dcp.save = dying_save  # type: ignore[assignment]
            step(self, *rest)  # type: ignore[arg-type]

        if int(os.environ["RANK"]) == kill.rank:
            trainer.Trainer.step = dying_step  # type: ignore[method-assign]
    trainer.train(load_config(given.config, TrainConfig, given.set), given.out, resume=True)


if __name__ == "__main__":
    main()
