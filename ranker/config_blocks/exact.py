"""Config of what keeps every event: mean pooling and full-length target attention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from features.schema import Strict


class MeanConfig(Strict):
    """Mean pooling."""

    type: Literal["mean"] = "mean"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")


class TargetAttentionConfig(Strict):
    """Full-length multi-head target attention."""

    type: Literal["target_attention"] = "target_attention"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    age_buckets: int = Field(default=32, ge=0)
