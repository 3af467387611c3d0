"""Learning rates over a run: warm-up, then decay to its last step, for dense parameters and tables alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ranker.config import ScheduleConfig


def share(config: ScheduleConfig, step: int, total: int) -> float:
    """The part of the configured learning rate that step `step` (from 0) of `total` trains at.

    It rises linearly over the warm-up's steps, is whole at its last one, and falls from there to ``final`` after the
    run's last step: with ``decay: linear`` in a straight line, with ``cosine`` along half a period.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay == "none":
        return 1.0
    done = min((step - config.warmup_steps) / max(total - config.warmup_steps, 1), 1.0)
    left = 1.0 - done if config.decay == "linear" else (1.0 + math.cos(math.pi * done)) / 2
    return config.final + (1.0 - config.final) * left


class LearningRates:
    """The rates of optimizers' parameter groups, each a share of what it is when this is made."""

    def __init__(self, *scheduled: tuple[Iterable[Any], ScheduleConfig]) -> None:
        self._groups: list[tuple[dict[str, Any], float, ScheduleConfig]] = [
            (group, float(group["lr"]), config) for groups, config in scheduled for group in groups
        ]

    def set(self, step: int, total: int) -> None:
        """Before step `step` (from 0) of `total`."""
        for group, rate, config in self._groups:
            group["lr"] = rate * share(config, step, total)
