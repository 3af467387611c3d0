"""Typed configuration of a run: features, tables, blocks, tower, optimisers, training. Each part is read by the code
it names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from features.loader import LoaderConfig
from features.schema import Split, Strict
from features.selection import FeaturesConfig
from ranker.config_blocks import HiSacConfig, LongConfig, SimSoftConfig


class ScheduleConfig(Strict):
    """A learning rate over the run."""

    warmup_steps: int = Field(default=0, ge=0, description="steps over which the rate rises linearly to its whole")
    decay: Literal["none", "linear", "cosine"] = Field(default="none", description="how it falls from there on")
    final: float = Field(default=0.0, ge=0, le=1, description="share of it that is left after the run's last step")


def _stepped_by_its_own_optimizer(value: object) -> object:
    """Refuse what TorchRec would step by the dense parameters' Adam: a replicated table, and the dense kernel."""
    for name in ("data_parallel", "dense"):
        if isinstance(value, list) and name in value:
            raise ValueError(
                f"{name!r} is not offered: TorchRec leaves out tables.optimizer for such a table and steps it with the "
                "dense parameters; a small table is best left table_wise, with kernel fused"
            )
    return value


_NoAdam = BeforeValidator(_stepped_by_its_own_optimizer)
_PooledSharding = Literal["table_wise", "column_wise", "row_wise", "table_row_wise"]
_AnySharding = Literal[_PooledSharding, "table_column_wise", "grid_shard"]
_Kernel = Literal["fused", "fused_uvm", "fused_uvm_caching"]


class TableShardingConfig(Strict):
    """What TorchRec may do with one table; its ParameterConstraints."""

    types: Annotated[list[_AnySharding], _NoAdam] | None = Field(
        default=None, min_length=1, description="sharding types to choose from; default: those of the table's kind"
    )
    kernels: Annotated[list[_Kernel], _NoAdam] = Field(
        default_factory=lambda: ["fused"],
        min_length=1,
        description="compute kernels to choose from: `fused` in the ranks' own memory; `fused_uvm`, in the host's, and "
        "`fused_uvm_caching`, there with a cache in HBM, need a GPU",
    )
    min_partition: int | None = Field(
        default=None, ge=4, multiple_of=4, description="narrowest shard of column_wise; default: TorchRec's, 128"
    )
    pooling_factors: list[Annotated[float, Field(gt=0)]] | None = Field(
        default=None,
        min_length=1,
        description="mean ids of a request (of a candidate, for candidate_*) for each feature of the table; default: "
        "estimated from the dataset",
    )
    cache_load_factor: float | None = Field(
        default=None, gt=0, lt=1, description="fused_uvm_caching: share of the rows in HBM; default: TorchRec's, 0.2"
    )
    cache_algorithm: Literal["lru", "lfu"] | None = Field(
        default=None, description="fused_uvm_caching: which rows stay; default: FBGEMM's, lru"
    )

    @model_validator(mode="after")
    def _only_caching_has_a_cache(self) -> TableShardingConfig:
        cached = self.cache_load_factor is not None or self.cache_algorithm is not None
        if cached and "fused_uvm_caching" not in self.kernels:
            raise ValueError(
                f"cache_load_factor and cache_algorithm are of fused_uvm_caching, and kernels are {self.kernels}; add "
                "it there"
            )
        return self


class BucketsConfig(Strict):
    """A table with fewer rows than ids."""

    rows: int = Field(ge=1, description="at most so many, beside that of missing and unknown ids")
    hashes: Literal[1, 2] = Field(
        default=1,
        description="rows that an id reads and adds up (a bag's mean is over them all); two ids that share one seldom "
        "share both",
    )


class ManagedCollisionConfig(Strict):
    """A table whose rows belong to the ids that training meets."""

    rows: int = Field(ge=2, description="of which each rank keeps one for ids without a row")
    eviction: Literal["lfu", "lru", "distance_lfu"] = Field(
        default="distance_lfu",
        description="whose rows are taken: ids met least often (lfu), longest ago (lru), or least often for how long "
        "ago (distance_lfu)",
    )
    every: int = Field(default=100, ge=1, description="batches between two times that ids are let in")


class TablesConfig(Strict):
    """Embedding tables and how TorchRec may shard them."""

    dim: int = Field(default=16, ge=4, multiple_of=4, description="embedding width")
    dims: dict[str, int] = Field(default_factory=dict, description="other widths by feature, pooled features only")
    buckets: dict[str, int | BucketsConfig] = Field(
        default_factory=dict,
        description="tables with fewer rows than ids, by feature: so many rows, or a block; where there are more ids, "
        "index i reads row 1 + (i − 1) mod rows",
    )
    managed_collision: dict[str, int | ManagedCollisionConfig] = Field(
        default_factory=dict,
        description="tables for ids without end, on GPUs, by feature (one with hash_buckets): so many rows, or a "
        "block; ids that are met come to rows of their own, and lose them to others (zero-collision hashing)",
    )
    init_scale: float = Field(default=0.01, gt=0, description="tables start uniform in ± this")
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    lr: float = Field(default=0.05, gt=0)
    eps: float = Field(default=1e-8, gt=0)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    pooled_sharding: Annotated[list[_PooledSharding], _NoAdam] = Field(
        default_factory=lambda: ["table_wise", "column_wise"], description="allowed for pooled tables"
    )
    sequence_sharding: Annotated[list[Literal["table_wise", "column_wise", "row_wise"]], _NoAdam] = Field(
        default_factory=lambda: ["table_wise", "row_wise"], description="allowed for sequence tables"
    )
    sharding: dict[str, TableShardingConfig] = Field(
        default_factory=dict,
        description="by table, as `ranker plan` and training's log name it (`sequence_item`): what goes for it alone",
    )
    replicas: int = Field(
        default=1,
        ge=1,
        description="2-D parallelism, on GPUs: so many groups of neighbouring ranks hold all tables, sharded within "
        "the group, so that look-ups stay in it; 1: one group of all ranks",
    )
    replicas_every: int = Field(
        default=1, ge=1, description="steps between two averagings of the replicas' rows and their optimizer's states"
    )
    reserve: float = Field(
        default=0.15,
        ge=0,
        lt=1,
        description="share of a GPU's memory that the planner keeps free, for activations, which it does not know",
    )

    @field_validator("buckets")
    @classmethod
    def _at_least_one_bucket(cls, buckets: dict[str, int | BucketsConfig]) -> dict[str, int | BucketsConfig]:
        for name, asked in buckets.items():
            if isinstance(asked, int) and asked < 1:
                raise ValueError(f"{name}: {asked} rows; must be at least 1")
        return buckets

    @field_validator("managed_collision")
    @classmethod
    def _at_least_two_rows(
        cls, tables: dict[str, int | ManagedCollisionConfig]
    ) -> dict[str, int | ManagedCollisionConfig]:
        for name, asked in tables.items():
            if isinstance(asked, int) and asked < 2:
                raise ValueError(f"{name}: {asked} rows; must be at least 2, one of them for ids without a row")
        # as blocks, so that a run's config says the same however it was written
        return {
            name: ManagedCollisionConfig(rows=asked) if isinstance(asked, int) else asked
            for name, asked in tables.items()
        }

    @model_validator(mode="after")
    def _managed_alone(self) -> TablesConfig:
        if both := sorted(self.buckets.keys() & self.managed_collision.keys()):
            raise ValueError(
                f"managed_collision: {', '.join(both)} in buckets too, where ids share rows by their numbers; leave "
                "one out"
            )
        if self.managed_collision and self.replicas > 1:
            raise ValueError(
                "managed_collision: replicas of a table would give its rows to ids of their own, and cannot be "
                "averaged; set replicas: 1"
            )
        return self

    def buckets_of(self, feature: str) -> BucketsConfig | None:
        """What `buckets` says of a feature."""
        asked = self.buckets.get(feature)
        return BucketsConfig(rows=asked) if isinstance(asked, int) else asked

    def managed_of(self, feature: str) -> ManagedCollisionConfig | None:
        """What `managed_collision` says of a feature."""
        asked = self.managed_collision.get(feature)
        assert not isinstance(asked, int)
        return asked


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
    max_steps: int | None = Field(default=None, ge=0, description="0: no more than a warm start")
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
    asynchronous_checkpoints: bool = Field(
        default=False, description="train on while a copy of the state, in the hosts' memory, is written"
    )
    accumulate: int = Field(
        default=1,
        ge=1,
        description="batches of a step: dense parameters learn from all of them at once, tables from each as it comes",
    )
    read_ahead: bool = Field(
        default=False,
        description="send the next batch's ids between ranks while this one is trained on (TorchRec's sparse "
        "distribution pipeline); the numbers stay the same",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of products in the forward pass of training (autocast); parameters, tables, losses and "
        "evaluation stay float32",
    )
    log_every: int = Field(default=50, ge=1)
    trace_after: int | None = Field(
        default=None, ge=0, description="trace the steps after this one into RUN/traces; SIGUSR1 asks for a trace too"
    )
    trace_steps: int = Field(default=5, ge=1, description="steps of a trace")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of each rank; default: cores / ranks on the machine − loader workers",
    )
    collective_timeout_s: float = Field(
        default=1800.0, gt=0, description="how long ranks wait for a late one; more than a checkpoint takes to write"
    )

    @model_validator(mode="after")
    def _early_stopping_needs_validation(self) -> TrainingConfig:
        if self.patience is not None and self.validation_split in self.splits:
            raise ValueError(
                f"patience: the validation split {self.validation_split!r} is trained on; remove it from splits"
            )
        return self


class WarmStartConfig(Strict):
    """Start from another run of the same model on an older dataset, its tables row by raw id."""

    run: Path | None = Field(default=None, description="run folder to start from (`--from RUN`); none: from scratch")
    checkpoint: Literal["best", "newest"] = "best"
    new_rows: Literal["unknown", "random", "mean"] = Field(
        default="unknown",
        description="what ids that the run does not know start from: its row of unknown ids, which loader.drop_item "
        "and drop_user train; a random row; the mean of its rows",
    )
    dense_optimizer: Literal["keep", "reset"] = Field(default="keep", description="Adam's moments of dense parameters")
    table_optimizer: Literal["keep", "reset"] = Field(
        default="keep", description="the tables' state (Adagrad's sums), row by row; 0 for new rows"
    )
    moments: Literal["keep", "measure"] = Field(
        default="keep",
        description="mean and deviation of dense features: the run's, with which its parameters were trained, or those "
        "of the new dataset",
    )
    codebooks: Literal["keep", "reset"] = Field(
        default="keep",
        description="where semantic IDs are of another codebook: refuse, or start the tables of their codes anew",
    )


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
    warm_start: WarmStartConfig = Field(default_factory=WarmStartConfig)

    @model_validator(mode="after")
    def _steps_or_a_start(self) -> TrainConfig:
        if self.training.max_steps == 0 and self.warm_start.run is None:
            raise ValueError("training.max_steps: 0 leaves nothing to keep without warm_start.run (--from RUN)")
        return self

    @model_validator(mode="after")
    def _ids_that_are_sent_ahead_stay_as_they_are(self) -> TrainConfig:
        if self.training.read_ahead and self.tables.buckets:
            raise ValueError(
                "training.read_ahead: tables.buckets makes rows of ids within the model, where they cannot be sent "
                "ahead; leave one of them out"
            )
        if self.training.read_ahead and self.tables.managed_collision:
            raise ValueError(
                "training.read_ahead: the rows of tables.managed_collision change hands between batches, and cannot be "
                "read ahead; leave one of them out"
            )
        return self

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


def with_start(overrides: Sequence[str], run: Path | None) -> list[str]:
    """Overrides of a config with the run that ``--from`` names."""
    return [*overrides, *([f"warm_start.run={json.dumps(str(run), ensure_ascii=False)}"] if run else [])]
