"""Where a cell's commands run: as child processes here, or as jobs of a TorchX scheduler."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Protocol

from features.errors import UserError
from ranker.compare.config import SchedulerConfig

_RANK = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""environment of a rank: with it, a child would take itself for one"""
_OF_A_RANK = re.compile(r"\[\d+\]:")
"""how torchrun begins a line of a rank; its own traceback of a rank's end says less"""


class Launcher(Protocol):
    """Runs commands, several at a time, until it is stopped."""

    def train(self, config: Path, run: Path, resume: bool, log: Path) -> int:
        """`ranker.train`; its exit code."""
        ...

    def evaluate(self, run: Path, split: str, log: Path) -> int:
        """`ranker.evaluate`, with predictions; its exit code."""
        ...

    def stop(self) -> None:
        """End what runs, start nothing more."""
        ...


class ChildProcesses:
    """One process a command.

    Args:
        threads: for the libraries that read OMP_NUM_THREADS; None leaves it as it is.
    """

    def __init__(self, threads: int | None) -> None:
        self._environment = {k: v for k, v in os.environ.items() if k not in _RANK}
        if threads is not None:
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def train(self, config: Path, run: Path, resume: bool, log: Path) -> int:
        """As :class:`Launcher` has it."""
        return self.module("ranker.train", [str(config), "--out", str(run), *(["--resume"] if resume else [])], log)

    def evaluate(self, run: Path, split: str, log: Path) -> int:
        """As :class:`Launcher` has it."""
        return self.module("ranker.evaluate", [str(run), "--split", split, "--predictions"], log)

    def module(self, name: str, arguments: list[str], log: Path) -> int:
        """`python -m NAME`; its exit code."""
        with log.open("ab") as file:
            with self._lock:
                if self._stopped:
                    return 1
                child = subprocess.Popen(
                    [sys.executable, "-m", name, *arguments], stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, env=self._environment,
                )  # fmt: skip
                self._running.add(child)
            try:
                return child.wait()
            finally:
                with self._lock:
                    self._running.discard(child)

    def stop(self) -> None:
        """As :class:`Launcher` has it."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()


def component_arguments(config: SchedulerConfig) -> list[str]:
    """What a config says of each job, as arguments of `launch`'s components."""
    said = config.model_dump(exclude={"name", "cfg", "mounts"}) | {"mounts": ",".join(config.mounts)}
    return [part for key, value in said.items() if value != "" for part in (f"--{key}", str(value))]


class TorchXJobs:
    """One job a command, by the components of `launch`. Their files must be seen by every machine.

    Raises:
        UserError: the components are not installed.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._config, self._handles, self._lock, self._stopped = config, set[str](), threading.Lock(), False
        found = importlib.util.find_spec("launch.components")
        if found is None or found.origin is None:
            raise UserError("scheduler: the package `launch` with TorchX's components is not installed")
        self._components = found.origin
        from torchx.runner import Runner
        from torchx.runner.config import apply
        from torchx.schedulers import get_scheduler_factories
        from torchx.specs import CfgVal

        from ranker.compare import slurm

        self._runner = Runner("torchx", {**get_scheduler_factories(), "slurm": slurm.create_scheduler})
        if config.name not in (known := self._runner.scheduler_backends()):
            raise UserError(f"scheduler: TorchX has no scheduler {config.name!r}; it has {', '.join(known)}")
        self._options = dict[str, CfgVal](config.cfg)
        try:
            apply(config.name, self._options)  # the rest, as `torchx run` does, from .torchxconfig or TORCHXCONFIG
        except FileNotFoundError as error:
            raise UserError(str(error)) from None

    def train(self, config: Path, run: Path, resume: bool, log: Path) -> int:
        """As :class:`Launcher` has it."""
        options = ["--config", str(config.absolute()), "--out", str(run.absolute())]
        return self._job("train", options, ["--resume"] if resume else [], log)

    def evaluate(self, run: Path, split: str, log: Path) -> int:
        """As :class:`Launcher` has it."""
        return self._job("evaluate", ["--run", str(run.absolute()), "--split", split], ["--predictions"], log)

    def _job(self, component: str, options: list[str], further: list[str], log: Path) -> int:
        arguments = component_arguments(self._config)
        with self._lock:
            if self._stopped:
                return 1
            handle = self._runner.run_component(
                f"{self._components}:{component}",
                [*arguments, *options, *(["--", *further] if further else [])],
                str(self._config.name),
                self._options,
            )
            self._handles.add(handle)
        try:
            status = self._runner.wait(handle, wait_interval=1)
        finally:
            with self._lock:
                self._handles.discard(handle)
        with log.open("a") as file:
            file.write(f"{handle}: {status.state.name if status else 'unknown'}\n")
            file.writelines(self._said(handle))
        return 0 if status is not None and status.state.name == "SUCCEEDED" else 1

    def _said(self, handle: str) -> list[str]:
        """What the first machine's ranks said, where the scheduler keeps it; all that was said if they said nothing."""
        try:
            app = self._runner.describe(handle)
            lines = [
                line for role in (app.roles if app else ()) for line in self._runner.log_lines(handle, role.name, 0)
            ]
        except Exception as error:  # each scheduler raises its own; the job's end is known without its log
            return [f"its log cannot be read: {error}\n"]
        lines = [line.rstrip("\n") + "\n" for line in lines]
        return [line for line in lines if _OF_A_RANK.match(line)] or lines

    def stop(self) -> None:
        """As :class:`Launcher` has it."""
        with self._lock:
            self._stopped = True
            for handle in self._handles:
                self._runner.cancel(handle)


def launcher_of(config: SchedulerConfig, threads: int | None) -> Launcher:
    """What a comparison's config asks for."""
    return ChildProcesses(threads) if config.name is None else TorchXJobs(config)
