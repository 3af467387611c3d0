"""A comparison's config with the command line's options on top."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from features.config_file import load_config
from features.config_yaml import read_yaml
from features.errors import UserError
from ranker.compare.config import CompareConfig


@dataclass(frozen=True)
class Options:
    """What the command line changes; lists are joined by commas, and None or nothing leaves the config as it is."""

    methods: str | None = None
    lengths: str | None = None
    seeds: str | None = None
    baseline: str | None = None
    dataset: Path | None = None
    epochs: int | None = None
    steps: int | None = None
    sweep: Sequence[str] = ()
    set: Sequence[str] = field(default_factory=tuple)
    parallel: int | None = None
    scheduler: str | None = None
    cfg: str | None = None


def load_compare(path: Path, options: Options) -> CompareConfig:
    """The config of `path`, changed by the options.

    Raises:
        UserError: what is wrong with either.
    """
    config = load_config(path, CompareConfig)
    changes: list[str] = []

    def change(key: str, value: Any) -> None:
        changes.append(f"{key}={json.dumps(value)}")

    if options.methods is not None:
        known = config.model_dump(mode="json")["methods"]
        change("methods", {name: known.get(name, {}) for name in _names(options.methods)})
    for key, text in (("lengths", options.lengths), ("seeds", options.seeds)):
        if text is not None:
            change(key, _values(f"--{key}", text))
    for key in ("baseline", "parallel"):
        if (value := getattr(options, key)) is not None:
            change(key, value)
    if options.dataset is not None:
        change("dataset", str(options.dataset))
    if options.epochs is not None or options.steps is not None:
        change("budget", {"epochs": options.epochs, "steps": options.steps})
    if options.set:
        change("set", [*config.set, *options.set])
    if options.sweep:
        change("sweep", dict(_sweep(text) for text in options.sweep))
    if options.scheduler is not None:
        change("scheduler.name", options.scheduler)
    if options.cfg is not None:
        change("scheduler.cfg", dict(_pair(part) for part in _names(options.cfg)))
    return load_config(path, CompareConfig, changes)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _values(option: str, text: str) -> list[Any]:
    """Values of YAML between commas.

    >>> _values("--sweep", "4, 8, [1, 2]")
    [4, 8, [1, 2]]
    """
    problems: list[Any] = []
    value = read_yaml(f"[{text}]", option, problems).value
    if problems:
        raise UserError(f"{option} {text}: not values of YAML between commas ({problems[0].message})")
    return value


def _sweep(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not equals:
        raise UserError(f"--sweep {text}: must have the form KEY=VALUE,VALUE,…")
    return key.strip(), _values("--sweep", values)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--cfg {text}: must have the form KEY=VALUE,KEY=VALUE")
    return key, value
