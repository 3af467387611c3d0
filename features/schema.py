"""Typed configuration of a dataset: where the logs are, what their columns mean, how they are split.

This is what the YAML file given to ``ranker prepare`` holds. The result on disk is described by
:mod:`features.dataset`. Times are milliseconds since 1970 (UTC) everywhere inside; a source says in
which unit it brings them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from features.hashing import MOST_BUCKETS

Scope = Literal["user", "item", "event", "request", "candidate"]
Kind = Literal["categorical", "bag", "dense", "vector", "text"]
TimeUnit = Literal["s", "ms", "us", "ns"]
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


class Strict(BaseModel):
    """Base of every config: unknown keys are errors, values are not coerced between kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ColumnConfig(Strict):
    """One input column (or SQL expression over input columns) and how it becomes numbers."""

    kind: Kind = Field(
        default="categorical",
        description="categorical: one id; bag: list of ids; dense: float; vector: list of floats; "
        "text: words that semantic IDs are made from, items only",
    )
    source: str | None = Field(
        default=None, description="input column or SQL expression over input columns; default: the column's own name"
    )
    separator: str | None = Field(
        default=None, description="bag only: splits a string into its values, e.g. ' ' or ','"
    )
    edges: list[float] | None = Field(
        default=None, description="categorical only: ascending bucket edges for a numeric source"
    )
    min_count: int = Field(default=1, ge=1, description="values seen less often in training go to the reserved row 0")
    hash_buckets: int | None = Field(
        default=None,
        ge=1,
        le=MOST_BUCKETS,
        description="categorical and bag only: no vocabulary, values are hashed to so many rows; for ids without end",
    )
    transform: Literal["none", "log1p"] = Field(default="none", description="dense only: applied before storing")
    default: float | None = Field(default=None, description="dense only: replaces null; without it null is an error")

    @model_validator(mode="after")
    def _options_fit_kind(self) -> ColumnConfig:
        if self.edges is not None and self.kind != "categorical":
            raise ValueError(f"edges: only a categorical column has edges, this one is {self.kind}")
        if self.edges is not None and sorted(set(self.edges)) != self.edges:
            raise ValueError(f"edges: must ascend strictly, got {self.edges}")
        if self.separator is not None and self.kind != "bag":
            raise ValueError(f"separator: only a bag column has a separator, this one is {self.kind}")
        if self.hash_buckets is not None:
            self._can_be_hashed()
        return self

    def _can_be_hashed(self) -> None:
        if self.kind not in ("categorical", "bag"):
            raise ValueError(f"hash_buckets: only a categorical or bag column can be hashed, this one is {self.kind}")
        if self.edges is not None:
            raise ValueError("hash_buckets: a column with edges has few values and needs no hash; remove one of both")
        if self.min_count > 1:
            raise ValueError(
                f"hash_buckets: a hashed column has no vocabulary to keep rare values out of; remove min_count "
                f"({self.min_count}), or hash_buckets"
            )


class ColumnsConfig(Strict):
    """Columns by what they belong to. Names are free; they are what model configs refer to."""

    user: dict[str, ColumnConfig] = Field(default_factory=dict, description="attributes of users")
    item: dict[str, ColumnConfig] = Field(default_factory=dict, description="attributes of items")
    event: dict[str, ColumnConfig] = Field(default_factory=dict, description="side columns of history events")
    request: dict[str, ColumnConfig] = Field(default_factory=dict, description="context of a request")
    candidate: dict[str, ColumnConfig] = Field(
        default_factory=dict,
        description="columns of one impression; may use `time` and `first_seen` (when the item first occurs in a log)",
    )

    @model_validator(mode="after")
    def _flat_lists(self) -> ColumnsConfig:
        for scope, columns in (("event", self.event), ("candidate", self.candidate)):
            for name, column in columns.items():
                if column.kind not in ("categorical", "dense"):
                    raise ValueError(
                        f"{scope}.{name}: a {column.kind} cannot belong to each {scope}; make it an item column"
                    )
        for scope, columns in (("user", self.user), ("request", self.request)):
            for name, column in columns.items():
                if column.kind == "vector":
                    raise ValueError(f"{scope}.{name}: vectors can belong to items only; use dense columns")
                if column.kind == "text":
                    raise ValueError(f"{scope}.{name}: text can belong to items only; make it a bag of its words")
        return self


class TableSource(Strict):
    """A Parquet file, a folder of them, or a glob, and the names of its key columns."""

    path: Path = Field(description="Parquet file, folder or glob")
    columns: dict[str, str] = Field(
        default_factory=dict, description="our name: column name in the file (user, item, time, request, split)"
    )
    time_unit: TimeUnit = Field(default="ms", description="unit of an integer time column; timestamp columns need none")


class LogsSource(Strict):
    """The contract itself: events, impressions, items, users from Parquet."""

    type: Literal["logs"] = "logs"
    events: TableSource | None = None
    impressions: TableSource | None = None
    items: TableSource | None = None
    users: TableSource | None = None


class RecBoleSource(Strict):
    """RecBole's atomic files: tab separated, ``name:type`` headers."""

    type: Literal["recbole"] = "recbole"
    path: Path = Field(description="folder with NAME.inter and optionally NAME.item, NAME.user")
    name: str | None = Field(default=None, description="file stem; default: the folder's name")
    time: str = Field(default="timestamp", description="field of .inter with the event's time")
    time_unit: TimeUnit = "s"


class EbnerdSource(Strict):
    """EB-NeRD: behaviours (in-view articles, clicks) and histories of Ekstra Bladet readers."""

    type: Literal["ebnerd"] = "ebnerd"
    path: Path = Field(
        description="folder as published (articles.parquet, {train,validation}/{behaviors,history}.parquet), or with "
        "behaviors_{train,val}.parquet and history_{train,val}.parquet"
    )
    conversion_read_s: float = Field(
        default=30.0, gt=0, description="a click converts when the article is read at least so long, seconds"
    )
    train_users: str | None = Field(
        default=None, description="SQL condition on user_id that keeps training impressions, e.g. 'user_id % 10 < 6'"
    )


class KuaiRandSource(Strict):
    """KuaiRand exposures: original ``log_standard*.csv`` and/or Parquet parts with the same columns."""

    type: Literal["kuairand"] = "kuairand"
    path: Path = Field(description="folder with the logs, user_features*.csv and video_features_basic*.csv")
    train: list[str] = Field(description="file names (globs) of the training logs")
    test: list[str] = Field(description="file names (globs) of the test logs")


class SyntheticSource(Strict):
    """Generated logs with known probabilities; see :mod:`features.prepare.synthetic` for the model."""

    type: Literal["synthetic"] = "synthetic"
    seed: int = 0
    users: int = Field(default=2_000, ge=1)
    items: int = Field(default=5_000, ge=10)
    events_per_user: int = Field(default=500, ge=0, description="mean length of a user's history")
    max_events_per_user: int = Field(default=20_000, ge=1)
    requests_per_user: int = Field(
        default=10, ge=3, description="requests of a user: one or more to train, validate, test"
    )
    candidates_per_request: int = Field(default=10, ge=1)
    topics: int = Field(default=64, ge=2, description="clusters of the content space")
    content_dim: int = Field(default=16, ge=2)
    interests_per_user: int = Field(default=6, ge=1)
    old_interest_share: float = Field(
        default=0.5, ge=0, le=1, description="share of interests visible only in the oldest events"
    )
    old_interest_age: int = Field(
        default=300, ge=0, description="old interests leave no event among the newest so many"
    )
    click_rate: float = Field(default=0.15, gt=0, lt=1, description="mean click probability aimed at")
    conversion_rate: float = Field(
        default=0.3, gt=0, lt=1, description="mean conversion probability given a click aimed at"
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> SyntheticSource:
        if self.topics > self.items:
            raise ValueError(f"topics: at most one an item, got {self.topics} topics of {self.items} items")
        if self.interests_per_user >= self.topics:
            raise ValueError(f"interests_per_user: less than topics ({self.topics}), got {self.interests_per_user}")
        if self.candidates_per_request > self.items:
            raise ValueError(f"candidates_per_request: at most items ({self.items}), got {self.candidates_per_request}")
        return self


Source = Annotated[
    LogsSource | RecBoleSource | EbnerdSource | KuaiRandSource | SyntheticSource, Field(discriminator="type")
]


class DeriveConfig(Strict):
    """Impressions from events, for datasets that have none: every chosen event is a request with one candidate."""

    samples: str = Field(default="true", description="SQL condition over event columns: which events become samples")
    min_history: int = Field(
        default=0, ge=0, description="a sample needs so many events of its user before it (in the order time, file)"
    )
    last: int | None = Field(default=None, ge=1, description="only each user's last so many events become samples")


class SplitConfig(Strict):
    """How impressions are divided into train, valid and test."""

    by: Literal["column", "time", "last"] = Field(
        default="column",
        description="column: the source names the split; time: by instants; last: by each user's last requests",
    )
    train_from: str | None = Field(
        default=None,
        description="by time: ISO instant (UTC) at which training starts; requests before it are left out, but count "
        "for vocabularies and counters' sums: their users and items are known; priors are of the training split",
    )
    valid_from: str | None = Field(default=None, description="by time: ISO instant (UTC) at which validation starts")
    test_from: str | None = Field(default=None, description="by time: ISO instant (UTC) at which test starts")
    valid_last: int = Field(
        default=0, ge=0, description="by last: so many of a user's requests before the test ones validate"
    )
    test_last: int = Field(default=0, ge=0, description="by last: so many of a user's last requests test")
    valid_users: float = Field(
        default=0.0, ge=0, lt=1, description="share of users (by hash) whose training requests validate"
    )
    valid_time: float = Field(
        default=0.0, ge=0, lt=1, description="share of training requests, the latest, that validate"
    )

    @model_validator(mode="after")
    def _complete(self) -> SplitConfig:
        if self.by == "time" and self.train_from is None and self.test_from is None and self.valid_from is None:
            raise ValueError("split by time needs test_from, valid_from or train_from")
        if self.by != "time" and self.train_from is not None:
            raise ValueError(f"train_from: only a split by time has it, this one is by {self.by}")
        if self.by == "last" and self.test_last + self.valid_last == 0:
            raise ValueError("split by last needs test_last or valid_last")
        return self


class HistoryConfig(Strict):
    """What a history may contain."""

    label_delay_s: float = Field(
        default=0.0, ge=0, description="an event enters histories so many seconds after it happened"
    )
    freeze: Literal["none", "day", "split"] = Field(
        default="none",
        description="day: histories end at the last midnight (UTC) before the request, a daily snapshot; "
        "split: where the split's first request begins",
    )


class CounterConfig(Strict):
    """Count and smoothed mean, up to just before each impression, of the rows that share its key.

    Makes candidate columns ``NAME_count`` (log1p of the count) and ``NAME_rate``
    ((sum + smoothing · prior) / (count + smoothing), prior = mean of the value over training rows).
    """

    name: str
    key: list[Literal["user", "item"]] = Field(min_length=1)
    of: Literal["impressions", "events"]
    value: str = Field(description="SQL expression over the rows counted, e.g. 'click' or 'rating >= 4'")
    window_s: float | None = Field(default=None, gt=0, description="only rows of the last so many seconds")
    delay_s: float = Field(default=0.0, ge=0, description="rows count only so many seconds after they happened")
    smoothing: float = Field(default=20.0, ge=0)


class PrepareConfig(Strict):
    """Everything ``ranker prepare`` needs to turn logs into a dataset folder."""

    name: str = Field(description="name of the dataset")
    source: Source
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    labels: dict[str, str] = Field(
        default_factory=lambda: {"click": "click"},
        description="label name: SQL expression over impression (or, derived, event) columns; must give 0 or 1",
    )
    derive: DeriveConfig | None = Field(default=None, description="make impressions from events")
    split: SplitConfig = Field(default_factory=SplitConfig)
    history: HistoryConfig = Field(default_factory=HistoryConfig)
    counters: list[CounterConfig] = Field(default_factory=list)
    item_min_count: int = Field(
        default=1, ge=1, description="items seen less often before the end of training share the reserved row 0"
    )
    item_hash_buckets: int | None = Field(
        default=None,
        ge=1,
        le=MOST_BUCKETS,
        description="the feature `item` reads one of so many rows, by hash of the id, and new items do too; default: a "
        "row for each item that training has seen",
    )
    user_hash_buckets: int | None = Field(
        default=None,
        ge=1,
        le=MOST_BUCKETS,
        description="the same for `user`; the users' ids are then not written",
    )
    time_range: tuple[str, str] = Field(
        default=("1995-01-01", "2100-01-01"),
        description="ISO dates between which every time must lie: catches wrong units",
    )
    partitions: int | None = Field(
        default=None, ge=1, description="number of user-hash partitions; default: from the logs' size"
    )
    rows_per_partition: int = Field(
        default=1_000_000,
        ge=1_000,
        description="default partitions are sized to hold about so many rows; one is in memory",
    )
    memory_limit_gb: float = Field(
        default=0.5, gt=0.1, description="memory of the out-of-core engine, GiB; one partition comes on top"
    )
    threads: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _hashed_items_have_no_vocabulary(self) -> PrepareConfig:
        if self.item_hash_buckets is not None and self.item_min_count > 1:
            raise ValueError(
                f"item_hash_buckets: hashed items share rows whatever their count; remove item_min_count "
                f"({self.item_min_count}), or item_hash_buckets"
            )
        return self

    def hash_buckets_of(self, kind: Literal["user", "item"]) -> int | None:
        """Buckets of the users' or items' ids, None where they have a vocabulary."""
        return self.item_hash_buckets if kind == "item" else self.user_hash_buckets
