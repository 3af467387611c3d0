"""Learning rates rise, hold and fall as their schedules say, those of tables too."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ranker.config import ScheduleConfig, TrainConfig
from ranker.run import Run
from ranker.training.learning_rates import LearningRates, share
from ranker.training.trainer import train

ConfigOf = Callable[..., TrainConfig]


@given(
    warmup=st.integers(0, 20),
    rest=st.integers(1, 50),
    decay=st.sampled_from(["none", "linear", "cosine"]),
    final=st.floats(0, 1),
)
def test_shares_rise_to_the_whole_and_fall_to_the_final(
    warmup: int, rest: int, decay: Literal["none", "linear", "cosine"], final: float
):
    config = ScheduleConfig(warmup_steps=warmup, decay=decay, final=final)
    total = warmup + rest
    shares = [share(config, step, total) for step in range(total + 1)]
    rise, fall = shares[:warmup], shares[warmup:]
    assert rise == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert fall[0] == 1
    assert fall == sorted(fall, reverse=True)
    assert fall[-1] == pytest.approx(1 if decay == "none" else final)
    if decay != "none":  # both are at the middle half-way
        middle = share(config, warmup + rest, warmup + 2 * rest)
        assert middle == pytest.approx((1 + final) / 2)


def test_each_group_is_scheduled_in_its_own_rate():
    """What is frozen, at a rate of 0, stays so."""
    dense, tables, frozen = {"lr": 0.5}, {"lr": 8.0}, {"lr": 0.0}
    rates = LearningRates(([dense], ScheduleConfig(warmup_steps=2)), ([tables, frozen], ScheduleConfig(decay="linear")))
    seen = []
    for step in range(4):
        rates.set(step, 4)
        seen.append((dense["lr"], tables["lr"], frozen["lr"]))
    assert seen == [(0.25, 8.0, 0.0), (0.5, 6.0, 0.0), (0.5, 4.0, 0.0), (0.5, 2.0, 0.0)]


def test_tables_are_trained_at_their_schedule(
    config_of: ConfigOf, tmp_path: Path, read_checkpoint: Callable[[Path], dict[str, Tensor]]
):
    """Rates reach the kernels that step tables in the backward pass, at the step that they are for."""
    options = ("training.validation_split=null", "training.checkpoint_every=1", "training.max_steps=3")

    def steps(name: str, *schedule: str) -> list[float]:
        train(config_of(*options, "training.keep_checkpoints=3", *schedule), tmp_path / name)
        tables = [read_checkpoint(path) for path in Run(tmp_path / name).checkpoints()]
        key = next(key for key in tables[0] if key.endswith("item.weight"))
        return [float((b[key] - a[key]).abs().sum()) for a, b in pairwise(tables)]

    plain = steps("plain")
    slow = steps("slow", "tables.schedule.warmup_steps=3000")
    # at a thousandth of the rate, in proportion to the step's number: 2 and 3 of 3,000
    assert slow[0] == pytest.approx(plain[0] * 2 / 3000, rel=0.3)
    assert slow[1] / slow[0] == pytest.approx(plain[1] / plain[0] * 3 / 2, rel=0.3)
