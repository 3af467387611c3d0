"""From a comparison's config to its cells: the runs to make, each with its whole config.

A cell's length goes to every long-sequence block of its method; a method without one has it as the length of DIN, and
one that reads no history at all has a single row. A swept key changes the methods that have it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

from features.config_file import load_config, parse_path
from features.errors import UserError
from ranker.compare.config import CompareConfig, MethodConfig
from ranker.config import TrainConfig
from ranker.run import leaves

Sweep = tuple[tuple[str, str], ...]
"""(key, value as JSON) of each swept key that a method has"""

_SAME = ("dataset", "tasks", "loader", "tables.dim", "tables.dims", "model.tower", "training")
"""what may not differ between methods: the examples, the batch, the widths, the budget"""
_ENDLESS = 1_000_000
"""epochs, where steps are what ends training"""


@dataclass(frozen=True)
class Row:
    """What the seeds of a row share. length: None for a method that reads no history."""

    method: str
    length: int | None
    sweep: Sweep = ()

    @property
    def name(self) -> str:
        """As in names of files."""
        parts = [self.method, *([] if self.length is None else [f"L{self.length or 'all'}"])]
        return "-".join(parts + [f"{_short(key)}{_safe(value)}" for key, value in self.sweep])

    @property
    def shown_length(self) -> str:
        """As in tables."""
        return "–" if self.length is None else f"{self.length:,}" if self.length else "all"


@dataclass(frozen=True)
class Cell:
    """One run."""

    row: Row
    seed: int
    config: TrainConfig

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.row.name}-s{self.seed}"


def _short(key: str) -> str:
    """The last part of a key; of two keys with the same one the cells' names would be told apart by order alone."""
    return _safe(key.rsplit(".", 1)[-1])


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "_", text).strip("_")


def plan(config: CompareConfig, folder: Path) -> list[Cell]:
    """Every cell, seed by seed, so that the first seed's table is whole first. `folder` is that of the config's file.

    Raises:
        UserError: a method's config is wrong, methods differ in what must be the same, or a key or baseline is unknown.
    """
    rows = [row for name, method in config.methods.items() for row in _rows(config, folder, name, method)]
    for key in config.sweep:
        if not any(key == swept for row in rows for swept, _ in row.sweep):
            raise UserError(f"sweep: no method has the key {key}; the methods are {', '.join(config.methods)}")
    cells = [Cell(row, seed, _cell_config(config, folder, row, seed)) for seed in config.seeds for row in rows]
    names = [cell.name for cell in cells]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two cells would be named {twice[0]}; sweep keys and values whose names differ")
    _check_same(cells)
    baseline_of(rows[0], rows, config.baseline)
    return cells


def baseline_of(row: Row, rows: list[Row], baseline: str) -> Row | None:
    """The row that `row` is compared with; None where the baseline has no such length, or is the row itself.

    Raises:
        UserError: there is no such method, or it has no row of the length named.
    """
    method, at, length = baseline.partition("@")
    candidates = [r for r in rows if r.method == method]
    if not candidates:
        known = ", ".join(dict.fromkeys(r.method for r in rows))
        raise UserError(f"baseline: {baseline!r} is not among the methods ({known}); name one of them, or add it")
    if at:
        candidates = [r for r in candidates if r.shown_length.replace(",", "") == length or str(r.length) == length]
        if not candidates:
            lengths = ", ".join(dict.fromkeys(r.shown_length for r in rows if r.method == method))
            raise UserError(f"baseline: {method} has no row of length {length!r}; it has {lengths}")
    elif len({r.length for r in candidates}) > 1:
        candidates = [r for r in candidates if r.length == row.length]
    swept = dict(row.sweep)
    # a baseline that is swept too stands for the same values
    candidates = [r for r in candidates if all(swept.get(key, value) == value for key, value in r.sweep)]
    return candidates[0] if candidates and candidates[0] != row else None


def _rows(config: CompareConfig, folder: Path, name: str, method: MethodConfig) -> Iterator[Row]:
    base = _load(config, folder, name, method, [])
    swept = {key: values for key, values in config.sweep.items() if _has(base, key)}
    for key in swept:
        if (option := _set_by(base, key)) is not None:
            raise UserError(f"sweep: {key} is what {option} sets; give its values there")
    lengths: list[int] | list[None] = method.lengths or config.lengths
    if not _length_keys(base):
        lengths = [None]
    for length in lengths:
        for values in itertools.product(*swept.values()):
            yield Row(name, length, tuple((k, json.dumps(v)) for k, v in zip(swept, values, strict=True)))


def _length_keys(config: TrainConfig) -> list[str]:
    """Where a length is put."""
    if config.model.long:
        return [f"model.long[{i}].length" for i in range(len(config.model.long))]
    return ["model.short.length"] if config.model.short is not None else []


def _set_by(config: TrainConfig, key: str) -> str | None:
    """The option whose values would go to the same key."""
    if parse_path(key) == ("seed",):
        return "--seeds"
    return "--lengths" if parse_path(key) in [parse_path(one) for one in _length_keys(config)] else None


def _cell_config(config: CompareConfig, folder: Path, row: Row, seed: int) -> TrainConfig:
    method = config.methods[row.method]
    settings = [f"{key}={value}" for key, value in row.sweep]
    if row.length is not None:  # a swept list of blocks has its lengths too
        swept = _load(config, folder, row.method, method, settings)
        settings += [f"{key}={row.length}" for key in _length_keys(swept)]
    return _load(config, folder, row.method, method, [*settings, f"seed={seed}"])


def _load(config: CompareConfig, folder: Path, name: str, method: MethodConfig, settings: list[str]) -> TrainConfig:
    common = list(config.set)
    if config.dataset is not None:
        common.append(f"dataset={json.dumps(str(config.dataset))}")
    if config.threads is not None:
        common.append(f"training.threads={config.threads}")
    if config.budget.epochs is not None:
        common += [f"training.epochs={config.budget.epochs}", "training.max_steps=null"]
    if config.budget.steps is not None:
        common += [f"training.epochs={_ENDLESS}", f"training.max_steps={config.budget.steps}"]
    path = folder / config.configs / (method.config or f"{name}.yaml")
    try:
        return load_config(path, TrainConfig, [*common, *method.set, *settings])
    except UserError as error:
        raise UserError(f"method {name}: {error}") from error


def _has(config: TrainConfig, key: str) -> bool:
    """Whether a config has the key; a mapping whose keys are the user's own, as `tables.dims`, has any.

    Raises:
        UserError: it is no path of keys.
    """
    path = parse_path(key)
    if path is None:
        raise UserError(f"sweep: {key!r} is no key; write it as in --set, model.long[0].anchors")
    tree: object = config
    for part in path:
        if isinstance(tree, BaseModel) and part in type(tree).model_fields:
            tree = getattr(tree, str(part))
        elif isinstance(tree, dict):
            found = cast("dict[Any, Any]", tree)
            if part not in found:
                return True  # whether it may be there, and with this value, is told by loading it
            tree = found[part]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(cast("list[Any]", tree)):
            tree = cast("list[Any]", tree)[part]
        else:
            return False
    return True


def _check_same(cells: list[Cell]) -> None:
    """Refuse methods that differ in what must be the same."""
    configs = {cell.row: leaves(cell.config.model_dump(mode="json")) for cell in cells}
    problems: list[str] = []
    for key in dict.fromkeys(key for config in configs.values() for key in config if key.startswith(_SAME)):
        found: dict[str, list[str]] = {}
        for row, config in configs.items():
            if not any(key.startswith(_dotted(swept)) for swept, _ in row.sweep):
                found.setdefault(json.dumps(config.get(key)), []).append(row.method)
        if len(found) > 1:
            told = "; ".join(f"{value}: {', '.join(dict.fromkeys(methods))}" for value, methods in found.items())
            problems.append(f"{key} differs ({told})")
    if problems:
        raise UserError(
            "methods can only be compared with the same examples, batch, widths and budget:\n  "
            + "\n  ".join(problems)
            + "\n  set one value for all, as --set KEY=VALUE or under `set` and `budget`"
        )


def _dotted(key: str) -> str:
    return ".".join(str(part) for part in parse_path(key) or ())
