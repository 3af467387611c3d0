"""How a comparison was made, in lines that let others repeat it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from features import provenance
from features.dataset import Dataset
from features.schema import Split
from ranker.compare.config import CompareConfig
from ranker.compare.folder import CompareFolder
from ranker.compare.plan import Cell
from ranker.config import TrainConfig
from ranker.machine import machine

Protocol = dict[str, str]
"""What was fixed: its name and how."""

_LOAD = re.compile(r", load [0-9.]+")


def protocol_of(config: CompareConfig, cells: Sequence[Cell], folder: CompareFolder) -> Protocol:
    """What all rows share: data, budget, batch, widths, seeds, machine, code."""
    run, dataset = cells[0].config, Dataset(cells[0].config.dataset)
    manifest = dataset.manifest
    found = {
        "dataset": f"{manifest.name}, content hash {manifest.content_hash[:12]}",
        "training": "; ".join(_samples(dataset, split) for split in run.training.splits),
        "measured": _samples(dataset, config.split),
        "budget": _budget(run),
        "batch": _batch(run),
        "widths": f"embeddings {run.tables.dim}, tower {run.model.tower.type} {run.model.tower.hidden}",
        "seeds": ", ".join(map(str, config.seeds)),
        "lengths": ", ".join(f"{length:,}" if length else "all" for length in config.lengths)
        + " latest events, of every long-sequence block, or of DIN where there is none",
        "common settings": ", ".join(config.set) or "none",
        "methods": "; ".join(_method(config, name) for name in config.methods),
        "cost": f"generated histories, one request of {config.speed.candidates} candidates with {config.speed.groups} "
        f"distinct groups, one thread, median of at least {config.speed.repeats}; DIN on the short history included in "
        "read; memory of the blocks, for those groups, or of DIN's events, embedded, where there is no block",
        "difference": f"from {config.baseline}, mean over the seeds that both have; 95 % interval of "
        f"{config.bootstrap.draws:,} draws of users (seed {config.bootstrap.seed}), the same for both, metrics "
        "averaged over the seeds within a draw: "
        "the interval is that of other users, ± and the t-test that of other seeds",
    }
    if missing := _missing(cells, folder, config.split):
        found["not finished"] = missing
    where = config.scheduler.name or "child processes"
    found["runs"] = f"{config.threads or 'default'} CPU threads each, {config.parallel} at a time, {where}"
    return found | {"machine": _machines(cells, folder), "code": _commits(cells, folder)}


def cost_machines(folder: CompareFolder) -> dict[str, str]:
    """The machine that each method was timed on, with its load, by the name of its measurement."""
    files = sorted((folder.root / "speed").glob("*.json"))
    return {path.name.removesuffix(".json"): json.loads(path.read_text())["machine"] for path in files}


def _samples(dataset: Dataset, split: Split) -> str:
    info = dataset.manifest.splits.get(split)
    if info is None:
        return f"{split}: nothing"
    positives = ", ".join(f"{info.positives[label]:,} {label}" for label in info.positives)
    return f"{split}: {info.requests:,} requests, {info.impressions:,} impressions ({positives}), {info.users:,} users"


def _budget(run: TrainConfig) -> str:
    training = run.training
    budget = f"{training.max_steps:,} steps" if training.max_steps is not None else f"{training.epochs} epochs"
    if training.patience is not None:
        budget += f", less after {training.patience} validations without gain in {training.monitor}"
    return budget + ", the best validated checkpoint, the last without a validation split"


def _batch(run: TrainConfig) -> str:
    return f"{run.loader.requests} requests, up to {run.loader.group} of a user together"


def _method(config: CompareConfig, name: str) -> str:
    method = config.methods[name]
    own = f" with {', '.join(method.set)}" if method.set else ""
    return f"{name}: {method.config or f'{name}.yaml'}{own}"


def _missing(cells: Sequence[Cell], folder: CompareFolder, split: Split) -> str:
    """Rows that no seed of has been finished: tables do not show them."""
    finished = {cell.row for cell in cells if folder.state(cell, split) == "finished"}
    return ", ".join(dict.fromkeys(cell.row.name for cell in cells if cell.row not in finished))


def _machines(cells: Sequence[Cell], folder: CompareFolder) -> str:
    """That trained the cells, each told once, whatever its load then; this one, where none has told."""
    files = [folder.run(cell) / "training.json" for cell in cells]
    told = [json.loads(file.read_text()).get("machine") for file in files if file.is_file()]
    known = dict.fromkeys(_LOAD.sub("", one) for one in told if one)
    return "; ".join(known) or _LOAD.sub("", machine("torch", "torchrec"))


def _commits(cells: Sequence[Cell], folder: CompareFolder) -> str:
    """Of the code that trained the cells; of this one, where none has told."""
    files = [folder.run(cell) / "run.json" for cell in cells]
    trained = {json.loads(file.read_text()).get("git_commit") for file in files if file.is_file()}
    known = sorted(commit for commit in trained if commit) or [provenance.git_commit() or "unknown"]
    return "commit " + ", ".join(known) + (" (cells differ)" if len(known) > 1 else "")
