"""The folder of a comparison, and what of it is finished.

Layout::

    lock                     held by the process that works on it
    cells/CELL.yaml          the config that a cell was made with: what it is recognised by
    cells/CELL.log           what its training and evaluation said
    cells/CELL/              its run folder, with metrics.json, predictions.parquet, bootstrap.npz and training.json
    speed/METHOD.json        what the method costs alone
    table.json, table.md, report.html
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from features.config_file import ConfigError, dump_config, load_config
from features.dataset import Dataset
from features.errors import UserError
from features.schema import Split
from ranker.compare.plan import Cell
from ranker.config import TrainConfig
from ranker.run import Run, codebooks_of, leaves, write_text

State = Literal["finished", "trained", "begun", "new"]


class CompareFolder:
    """A comparison's folder; it appears when :meth:`alone` is entered."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def run(self, cell: Cell) -> Path:
        """The cell's run folder."""
        return self.root / "cells" / cell.name

    def config(self, cell: Cell) -> Path:
        """The cell's recorded config."""
        return self.root / "cells" / f"{cell.name}.yaml"

    def log(self, cell: Cell) -> Path:
        """What the cell's processes say."""
        return self.root / "cells" / f"{cell.name}.log"

    def cost(self, name: str) -> Path:
        """What was measured of a method's cost."""
        return self.root / "speed" / f"{name}.json"

    def state(self, cell: Cell, split: Split) -> State:
        """How far a cell is."""
        run = self.run(cell)
        if not (run / "run.json").is_file():
            return "new"
        if not (run / "training.json").is_file():
            return "begun"
        metrics = run / "metrics.json"  # written last
        whole = metrics.is_file() and (run / "predictions.parquet").is_file()
        return "finished" if whole and json.loads(metrics.read_text())["split"] == split else "trained"

    def record(self, cell: Cell) -> None:
        """Write the config of a cell that is about to run. A run that was killed as its folder was made starts anew."""
        self.config(cell).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.config(cell), dump_config(cell.config))
        if not (self.run(cell) / "run.json").is_file():
            shutil.rmtree(self.run(cell), ignore_errors=True)

    def forget(self, cell: Cell) -> None:
        """Remove what there is of a cell, its record last."""
        shutil.rmtree(self.run(cell), ignore_errors=True)
        self.log(cell).unlink(missing_ok=True)
        self.config(cell).unlink(missing_ok=True)

    def settle(self, cells: Sequence[Cell], recompute: Sequence[str]) -> None:
        """Forget the cells that `recompute` names (``*`` stands for any text), and refuse others that were made with
        another config or dataset: then nothing is forgotten.

        Raises:
            UserError: a pattern that names no cell, or cells that have changed.
        """
        forgotten: dict[str, Cell] = {}
        for pattern in recompute:
            named = {cell.name: cell for cell in cells if fnmatch(cell.name, pattern)}
            if not named:
                raise UserError(f"--recompute {pattern}: no such cell; there are {', '.join(c.name for c in cells)}")
            forgotten |= named
        others = [cell for cell in cells if cell.name not in forgotten]
        changes = {cell.name: change for cell in others if (change := self._change(cell))}
        if changes:
            told = "\n  ".join(f"{name}: {change}" for name, change in changes.items())
            raise UserError(
                f"{self.root}: {len(changes)} cells were made otherwise:\n  {told}\n  compute them again with "
                f"--recompute {next(iter(changes))} (or '*'), or choose another --out"
            )
        for cell in forgotten.values():
            self.forget(cell)

    def _change(self, cell: Cell) -> str | None:
        """What differs between the cell and what was recorded of it."""
        if not self.config(cell).is_file():
            return f"{self.run(cell)} has no record of its config" if self.run(cell).exists() else None
        try:
            recorded = load_config(self.config(cell), TrainConfig)
        except ConfigError as error:
            return f"its recorded config is no longer valid ({error})"
        old, new = (leaves(config.model_dump(mode="json")) for config in (recorded, cell.config))
        for key in old | new:
            if old.get(key) != new.get(key):
                return f"{key} is {new.get(key)!r}, was {old.get(key)!r}"
        if (self.run(cell) / "run.json").is_file():
            run, dataset = Run(self.run(cell)), Dataset(cell.config.dataset)
            trained_on = run.info["dataset"]
            assert isinstance(trained_on, dict)
            if trained_on["content_hash"] != dataset.manifest.content_hash:
                return f"{cell.config.dataset} has another content than it was trained on"
            if run.info["codebooks"] != codebooks_of(cell.config, dataset):
                return f"{cell.config.dataset} has other semantic IDs than it was trained on"
        return None

    @contextmanager
    def alone(self) -> Generator[None]:
        """Keep a second comparison out of the folder. A record lock: it ends with its process.

        Raises:
            UserError: another process works on it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("a") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.root}: another comparison works on it; wait for it, or stop it") from None
            yield
