"""Typed configuration of the long-sequence blocks, one class a block; `type` names it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ranker.config_blocks.compressors import HiSacConfig, HyTrecConfig, UxSidConfig
from ranker.config_blocks.exact import MeanConfig, TargetAttentionConfig

LongConfig = Annotated[
    MeanConfig | TargetAttentionConfig | UxSidConfig | HiSacConfig | HyTrecConfig, Field(discriminator="type")
]

__all__ = ["HiSacConfig", "HyTrecConfig", "LongConfig", "MeanConfig", "TargetAttentionConfig", "UxSidConfig"]
