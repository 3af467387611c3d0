"""Config of the memories that a build keeps: which groups of a user, how exactly, as of when."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from features.errors import UserError
from features.instants import instant_ms
from features.schema import Split, Strict
from ranker.memory.record import Dtype

Policy = Literal["seen", "frequent", "nearest"]


class CodesConfig(Strict):
    """Which groups of each user get a record, for blocks with probes (``uxsid``)."""

    policy: Policy = Field(
        default="seen",
        description="seen: the groups of the history, latest first; frequent: the same, those with most events first; "
        "nearest: frequent ones, then their nearest codes by the codewords' distance, in turn, until there are `most`: "
        "where probes are semantic IDs",
    )
    most: int = Field(default=100, ge=0, description="groups of a user, at most; 0: all of her history's")
    without_code: bool = Field(
        default=True,
        description="one record more, of group 0, which candidates without a code ask about: items that no code was "
        "made for yet",
    )

    @model_validator(mode="after")
    def _nearest_ends_somewhere(self) -> CodesConfig:
        if self.policy == "nearest" and self.most == 0:
            raise ValueError("most: 0 would be every code for every user with policy nearest; set it to 1 or more")
        return self


class MemoryConfig(Strict):
    """Everything ``ranker memory build`` needs beside a run and a store."""

    codes: CodesConfig = Field(default_factory=CodesConfig)
    dtype: Dtype = Field(
        default="float16",
        description="of what a record holds; int8 has a scale for every 32 values. Logarithms of weights stay float32",
    )
    as_of: str | None = Field(
        default=None,
        description="ISO instant (UTC): events from it on are not known yet; default: after the dataset's last event "
        "and request",
    )
    before: Split | None = Field(
        default=None,
        description="a user's memory is of just before her first request of this split: to measure on it what memories "
        "made before would give; none in service",
    )
    users: int = Field(default=256, ge=1, description="users of a batch, at most")
    events: int = Field(
        default=65_536, ge=1, description="events of a batch, at most; a user with more is a batch of her own"
    )
    workers: int = Field(default=0, ge=0, description="processes of each rank that read; 0 reads between batches")
    prefetch: int = Field(default=4, ge=1, description="batches that each of them keeps ready")
    keep: int = Field(
        default=1,
        ge=0,
        description="finished generations of the same model left beside the current one: the one it takes over from, "
        "which stays even with 0, and the newest",
    )
    coverage: Split | None = Field(
        default=None,
        description="split of whose requests and candidates the share that finds a record is measured; default: the "
        "last that has requests",
    )

    @field_validator("as_of")
    @classmethod
    def _an_instant(cls, as_of: str | None) -> str | None:
        if as_of is not None:
            try:
                instant_ms(as_of, "as_of")
            except UserError as error:
                raise ValueError(str(error).removeprefix("as_of: ")) from error
        return as_of
