"""Config of the encoders: LONGER and ELASTIC, and the quadratic references SASRec and HSTU."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from features.schema import Strict
from ranker.config_blocks.fields import dividing_width


def _two_a_head(heads: int, info: ValidationInfo) -> int:
    """`heads`, which must leave two dimensions or more to each: one has no direction to compare."""
    width: int | None = info.data.get("width")
    if width is not None and width // heads < 2:
        raise ValueError(f"must leave at least 2 of width ({width}) to each")
    return dividing_width(heads, info)


class LongerConfig(Strict):
    """LONGER: merged tokens, of which the latest and a few global ones attend to all."""

    type: Literal["longer"] = "longer"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    width: int = Field(default=32, ge=2)
    heads: int = Field(default=2, ge=1)
    merge: int = Field(default=4, ge=1, description="adjacent events of a token")
    inner: bool = Field(default=False, description="true: self-attention within the events of a token before merging")
    recent: int = Field(default=32, ge=1, description="merged tokens that attend to all, the latest")
    global_tokens: int = Field(default=4, ge=1, description="learned tokens that attend to all")
    layers: int = Field(default=2, ge=1, description="of recent and global tokens among themselves")
    feed_forward: int = Field(default=2, ge=1, description="hidden width of the feed-forward nets, in widths")
    age_buckets: int = Field(default=32, ge=0)

    _heads = field_validator("heads")(_two_a_head)


class ElasticConfig(Strict):
    """ELASTIC: events attend to one another through a few experts, which draw on a learned pool of interests."""

    type: Literal["elastic"] = "elastic"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    width: int = Field(default=32, ge=2)
    heads: int = Field(default=2, ge=1)
    experts: int = Field(default=16, ge=1)
    layers: int = Field(default=2, ge=1, description="of dispatcher attention")
    pool: int = Field(default=256, ge=0, description="learned interests to retrieve from; 0: no retrieval")
    retrieve: int = Field(default=8, ge=1, description="interests that an expert finds, at most pool")
    feed_forward: int = Field(default=2, ge=1, description="hidden width of the feed-forward nets, in widths")
    age_buckets: int = Field(default=32, ge=0)

    _heads = field_validator("heads")(_two_a_head)

    @field_validator("retrieve")
    @classmethod
    def _in_the_pool(cls, retrieve: int, info: ValidationInfo) -> int:
        pool: int | None = info.data.get("pool")
        if pool is not None and 0 < pool < retrieve:
            raise ValueError(f"must be at most pool ({pool})")
        return retrieve


class SasRecConfig(Strict):
    """SASRec: causal softmax self-attention, every event to all before it."""

    type: Literal["sasrec"] = "sasrec"
    length: int = Field(default=1000, ge=0, description="latest events; 0: all, at a cost of Σ L²")
    width: int = Field(default=32, ge=2)
    heads: int = Field(default=2, ge=1)
    layers: int = Field(default=2, ge=1)
    positions: Literal["learned", "sinusoidal"] = Field(
        default="learned", description="of events, from the latest backwards; learned needs a length"
    )
    read: Literal["attention", "last"] = Field(
        default="attention", description="the candidate attends to all outputs, or is multiplied with the last"
    )
    feed_forward: int = Field(default=1, ge=1, description="hidden width of the feed-forward nets, in widths")

    _heads = field_validator("heads")(_two_a_head)

    @field_validator("positions")
    @classmethod
    def _limited(cls, positions: str, info: ValidationInfo) -> str:
        if positions == "learned" and info.data.get("length") == 0:
            raise ValueError("needs a limit on the length; set length, or positions: sinusoidal")
        return positions


class HstuConfig(Strict):
    """HSTU: causal pointwise attention with biases by position and time, every event to all before it."""

    type: Literal["hstu"] = "hstu"
    length: int = Field(default=1000, ge=0, description="latest events; 0: all, at a cost of Σ L²")
    width: int = Field(default=32, ge=2)
    heads: int = Field(default=2, ge=1)
    layers: int = Field(default=2, ge=1)
    read: Literal["attention", "last"] = Field(
        default="attention", description="the candidate attends to all outputs, or is multiplied with the last"
    )
    positions: int = Field(default=1000, ge=1, description="distances in events with a bias of their own")
    time_buckets: int = Field(default=32, ge=1, description="of log2(seconds between two events), for the bias")
    chunk: int = Field(default=128, ge=1, description="events that attend at once; memory follows it, results do not")

    _heads = field_validator("heads")(_two_a_head)
