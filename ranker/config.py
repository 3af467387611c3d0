"""Typed configuration of a run: features, tables, blocks, tower, optimisers, training. Each part is read by the code
it names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from features.loader import LoaderConfig
from features.schema import Split, Strict
from features.selection import FeaturesConfig
from ranker.config_blocks import HiSacConfig, LongConfig, SimSoftConfig


class ScheduleConfig(Strict):
    """A learning rate over the run."""

    warmup_steps: int = Field(default=0, ge=0, description="steps over which the rate rises linearly to its whole")
    decay: Literal["none", "linear", "cosine"] = Field(default="none", description="how it falls from there on")
    final: float = Field(default=0.0, ge=0, le=1, description="share of it that is left after the run's last step")


class TablesConfig(Strict):
    """Embedding tables and how TorchRec may shard them."""

    dim: int = Field(default=16, ge=4, multiple_of=4, description="embedding width")
    dims: dict[str, int] = Field(default_factory=dict, description="other widths by feature, pooled features only")
    init_scale: float = Field(default=0.01, gt=0, description="tables start uniform in ± this")
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    lr: float = Field(default=0.05, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    pooled_sharding: list[Literal["table_wise", "column_wise", "row_wise", "table_row_wise"]] = Field(
        default_factory=lambda: ["table_wise", "column_wise"], description="allowed for pooled tables"
    )
    sequence_sharding: list[Literal["table_wise", "column_wise", "row_wise"]] = Field(
        default_factory=lambda: ["table_wise", "row_wise"], description="allowed for sequence tables"
    )


class DinConfig(Strict):
    """DIN on the short history."""

    length: int = Field(default=50, ge=0, description="latest events; 0: all")
    hidden: list[int] = Field(default_factory=lambda: [64], min_length=1)
    softmax: bool = False
    age_buckets: int = Field(default=0, ge=0)
    normalise: bool = Field(default=True, description="the activation unit sees normalised events and candidates")


class TowerConfig(Strict):
    """From features to logits."""

    type: Literal["mlp", "mmoe"] = "mlp"
    hidden: list[int] = Field(default_factory=lambda: [128, 64], min_length=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    experts: int = Field(default=4, ge=2, description="mmoe only")
    target: bool = Field(default=True, description="feed the candidate's sequence embedding too")
    cross: bool = Field(default=True, description="feed products of the candidate and what it found in each sequence")


class ModelConfig(Strict):
    """The ranker: DIN on the short history and any number of long-sequence blocks beside it."""

    short: DinConfig | None = Field(default_factory=DinConfig)
    long: list[LongConfig] = Field(default_factory=list)
    tower: TowerConfig = Field(default_factory=TowerConfig)


class TasksConfig(Strict):
    """Which labels of the dataset are learned."""

    click: str = Field(default="click", description="label of CTR")
    conversion: str | None = Field(default=None, description="label of CVR, counted on clicks; none: CTR only")
    conversion_weight: float = Field(default=1.0, ge=0, description="weight of the CTCVR loss")


class OptimizerConfig(Strict):
    """Adam for dense parameters."""

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=10.0, gt=0, description="gradient norm of the dense parameters")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)


class DivergenceConfig(Strict):
    """What becomes of a batch whose loss is not finite or beyond a limit. It updates nothing, and is kept in the run's
    folder."""

    policy: Literal["stop", "skip"] = Field(default="stop", description="end the run, or go on with the next batch")
    max_loss: float | None = Field(default=None, gt=0, description="greatest loss of a step, all tasks; none: any")
    max_skipped: int = Field(default=10, ge=1, description="batches of a run that may be skipped; then it ends")


class TrainingConfig(Strict):
    """How long, how often, when to stop."""

    epochs: int = Field(default=1, ge=1)
    max_steps: int | None = Field(default=None, ge=1)
    splits: list[Split] = Field(default_factory=lambda: ["train"], min_length=1, description="splits that train")
    validate_every: int | None = Field(
        default=None, ge=1, description="steps between validations; default: each epoch's end"
    )
    validation_split: Split | None = Field(default="valid", description="none: no validation, no early stopping")
    monitor: Literal["auc", "uauc", "logloss", "ne"] = Field(
        default="auc", description="CTR metric that early stopping watches"
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many validations without gain; none: never"
    )
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; default: each epoch's end"
    )
    keep_checkpoints: int = Field(default=2, ge=1)
    divergence: DivergenceConfig = Field(default_factory=DivergenceConfig)
    log_every: int = Field(default=50, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of each rank; default: cores / ranks on the machine − loader workers",
    )

    collective_timeout_s: float = Field(
        default=600.0, gt=0, description="how long ranks wait for one that is late, as in a collective"
    )

    @model_validator(mode="after")
    def _early_stopping_needs_validation(self) -> TrainingConfig:
        if self.patience is not None and self.validation_split in self.splits:
            raise ValueError(
                f"patience: the validation split {self.validation_split!r} is trained on; remove it from splits"
            )
        return self


class TrainConfig(Strict):
    """Everything ``ranker train`` needs."""

    name: str
    dataset: Path = Field(description="folder made by `ranker prepare`")
    seed: int = 0
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    tables: TablesConfig = Field(default_factory=TablesConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    tasks: TasksConfig = Field(default_factory=TasksConfig)
    loader: LoaderConfig = Field(default_factory=LoaderConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)

    @property
    def history_length(self) -> int:
        """Events of a history that some block reads; 0: all."""
        lengths = [block.length for block in self.model.long]
        if self.model.short is not None:
            lengths.append(self.model.short.length)
        return 0 if 0 in lengths else max(lengths, default=1)

    @property
    def codebooks(self) -> list[str]:
        """Codebooks whose codewords some block reads."""
        return sorted({block.codebook for block in self.model.long if isinstance(block, HiSacConfig)})

    @property
    def search_weights(self) -> list[float]:
        """Of the click losses of blocks that have one of their own, in their order."""
        return [block.search_weight for block in self.model.long if isinstance(block, SimSoftConfig)]
