"""Typed configuration of the long-sequence blocks, one class a block; `type` names it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ranker.config_blocks.compressors import HiSacConfig, HyTrecConfig, UxSidConfig
from ranker.config_blocks.encoders import ElasticConfig, HstuConfig, LongerConfig, SasRecConfig
from ranker.config_blocks.exact import MeanConfig, TargetAttentionConfig
from ranker.config_blocks.groups import (
    AggregatorConfig,
    CFormerConfig,
    KMeansConfig,
    LshConfig,
    PatchingConfig,
    PolyEncoderConfig,
    SdimConfig,
    VqlConfig,
)
from ranker.config_blocks.search import EtaConfig, MirrnConfig, SimHardConfig, SimSoftConfig, TwinConfig

LongConfig = Annotated[
    MeanConfig
    | TargetAttentionConfig
    | UxSidConfig
    | HiSacConfig
    | HyTrecConfig
    | SimHardConfig
    | SimSoftConfig
    | EtaConfig
    | TwinConfig
    | MirrnConfig
    | SdimConfig
    | VqlConfig
    | CFormerConfig
    | KMeansConfig
    | LshConfig
    | PatchingConfig
    | AggregatorConfig
    | PolyEncoderConfig
    | LongerConfig
    | ElasticConfig
    | SasRecConfig
    | HstuConfig,
    Field(discriminator="type"),
]

__all__ = [
    "ElasticConfig",
    "EtaConfig",
    "HiSacConfig",
    "HstuConfig",
    "HyTrecConfig",
    "LongConfig",
    "LongerConfig",
    "MeanConfig",
    "MirrnConfig",
    "SasRecConfig",
    "SimHardConfig",
    "SimSoftConfig",
    "TargetAttentionConfig",
    "TwinConfig",
    "UxSidConfig",
]
