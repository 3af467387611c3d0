"""A run's draws beside its predictions: a comparison that is shown again, or has a cell more, does not draw for every
run anew, which takes seconds a run."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np

from ranker.compare.bootstrap import COMPARED, Measured, measure_draws
from ranker.evaluation.metrics import TASKS, Task
from ranker.evaluation.stored_predictions import read_predictions

FILE, FORMAT = "bootstrap.npz", 1
"""beside ``predictions.parquet``; raise the number where a metric or the draws of users change"""


def draws_of(run: Path, draws: int, seed: int) -> Measured:
    """:func:`~ranker.compare.bootstrap.measure_draws` of a run's predictions: read, where it was stored for the same
    number of draws, the same seed and this very file of predictions, else measured and stored."""
    predictions, stored = run / "predictions.parquet", run / FILE
    if not predictions.is_file():
        return measure_draws(read_predictions(predictions), draws, seed)  # says what to do
    of = predictions.stat()
    made_for = {"format": FORMAT, "draws": draws, "seed": seed, "bytes": of.st_size, "written_ns": of.st_mtime_ns}
    found = _read(stored, made_for)
    if found is None:
        found = measure_draws(read_predictions(predictions), draws, seed)
        _write(stored, found, made_for)
    return found


def _read(path: Path, made_for: dict[str, int]) -> Measured | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if json.loads(str(file["made_for"])) != made_for:
                return None
            keys: list[tuple[Task, str]] = [(task, name) for task in TASKS for name in COMPARED]
            return {(task, name): file[f"{task}.{name}"] for task, name in keys if f"{task}.{name}" in file}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):  # none, or of another kind
        return None


def _write(path: Path, found: Measured, made_for: dict[str, int]) -> None:
    """Aside, then renamed."""
    arrays = {f"{task}.{name}": values for (task, name), values in found.items()}
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with aside.open("wb") as file:
        np.savez(file, made_for=np.array(json.dumps(made_for)), **arrays)  # type: ignore[arg-type]
    os.replace(aside, path)
