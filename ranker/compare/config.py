"""Typed configuration of a comparison: which methods, at which lengths, for which seeds, with what budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from features.schema import Split, Strict

Length = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class MethodConfig(Strict):
    """One method: a run's config, whose blocks read the length of the row they stand in."""

    config: str | None = Field(default=None, description="file of the run's config in `configs`; default: NAME.yaml")
    lengths: list[Length] | None = Field(
        default=None, min_length=1, description="its own, as of a method too slow for the longest; default: all lengths"
    )
    set: list[str] = Field(
        default_factory=list, description="KEY=VALUE: changes to this method's runs, as a learning rate of its own"
    )


class BudgetConfig(Strict):
    """How long every run trains; default: as the configs say, which must agree."""

    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1, description="instead of epochs")

    @model_validator(mode="after")
    def _one_of_them(self) -> BudgetConfig:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs is {self.epochs} and steps {self.steps}; give one of them")
        return self


class SpeedConfig(Strict):
    """What the methods are timed on: generated histories, by one thread, after all training."""

    lengths: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [100, 1000, 10000], min_length=1, description="events, beside the lengths of the rows"
    )
    candidates: int = Field(default=100, ge=1, description="of the request")
    groups: int = Field(default=20, ge=1, description="distinct codes among the candidates, for methods that probe")
    repeats: int = Field(default=9, ge=1, description="of which the median counts, at least")


class BootstrapConfig(Strict):
    """Draws of users for the intervals of differences."""

    draws: int = Field(default=1000, ge=0, description="0: no intervals")
    seed: int = Field(default=0, ge=0)


class SchedulerConfig(Strict):
    """Where runs go; default: child processes here, one rank each."""

    name: str | None = Field(default=None, description="a scheduler of TorchX: local_cwd, slurm, kubernetes, …")
    cfg: dict[str, str] = Field(default_factory=dict, description="its options, as partition")
    nnodes: int = Field(default=1, ge=1, description="machines of a run")
    nproc: int = Field(default=1, ge=1, description="ranks on each")
    cpu: int = Field(default=2, ge=1, description="cores of each machine")
    gpu: int = Field(default=0, ge=0, description="GPUs of each machine")
    memory_mb: int = Field(default=8192, ge=1, description="memory of each machine")
    image: str = Field(default="", description="container image, where the scheduler takes one")
    mounts: list[str] = Field(
        default_factory=list,
        description="folders for a container, as type=volume,src=CLAIM,dst=/shared: configs, runs, datasets",
    )
    max_retries: int = Field(default=0, ge=0, description="how often the scheduler may start a failed run again")


class CompareConfig(Strict):
    """Everything ``ranker compare`` needs."""

    name: Name = Field(description="of the comparison; marks its place in a README")
    configs: Path = Field(default=Path("."), description="folder of the runs' configs, from this file's own")
    dataset: Path | None = Field(default=None, description="made by `ranker prepare`; default: as the configs say")
    split: Split = Field(default="test", description="that is measured")
    methods: dict[Name, MethodConfig] = Field(min_length=1, description="rows of the table, in order")
    lengths: list[Length] = Field(
        min_length=1,
        description="latest events that every long-sequence block reads, or DIN where there is no block; 0: all",
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0], min_length=1)
    baseline: str = Field(
        description="METHOD, which each row is compared with at its own length (or at the one length that METHOD has), "
        "or METHOD@LENGTH"
    )
    set: list[str] = Field(default_factory=list, description="KEY=VALUE: changes to every run's config")
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict, description="by key of a run's config, values to try in the methods that have the key"
    )
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    parallel: int = Field(default=1, ge=1, description="runs at a time")
    threads: int | None = Field(default=1, ge=1, description="CPU threads of each run; null: as the configs say")
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    speed: SpeedConfig = Field(default_factory=SpeedConfig)
    bootstrap: BootstrapConfig = Field(default_factory=BootstrapConfig)

    @model_validator(mode="after")
    def _nothing_twice(self) -> CompareConfig:
        for key, values in (("lengths", self.lengths), ("seeds", self.seeds), *self.sweep.items()):
            shown = [str(value) for value in values]
            if len(set(shown)) < len(shown) or not shown:
                raise ValueError(f"{key}: got {values}; give each value once, and at least one")
        return self
