"""Config of the search methods: SIM hard and soft, ETA, TWIN and MIRRN."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from features.schema import Strict


class SearchConfig(Strict):
    """What all search methods have: how much they find, and the attention to it."""

    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    top: int = Field(default=50, ge=1, description="K, events that a search finds at most")
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    age_buckets: int = Field(default=32, ge=0)


class SimHardConfig(SearchConfig):
    """SIM, hard search: the latest events of the candidate's own category."""

    type: Literal["sim_hard"] = "sim_hard"
    probe: str = Field(description="the category: a feature that stands in features.sequence and in features.codes")


class SimSoftConfig(SearchConfig):
    """SIM, soft search: greatest inner products in a space that a click loss of its own trains."""

    type: Literal["sim_soft"] = "sim_soft"
    search_dim: int = Field(default=16, ge=2, description="width of the search unit")
    search_weight: float = Field(
        default=1.0, gt=0, description="of the search unit's click loss, from which alone it learns"
    )


class EtaConfig(SearchConfig):
    """ETA: fewest other bits of SimHash."""

    type: Literal["eta"] = "eta"
    bits: int = Field(default=32, ge=1, description="of a hash")


class TwinConfig(SearchConfig):
    """TWIN: greatest attention logits, each head its own."""

    type: Literal["twin"] = "twin"


class MirrnConfig(SearchConfig):
    """MIRRN: SimHash searches for candidate, recent events and all, refined in the frequency domain."""

    type: Literal["mirrn"] = "mirrn"
    bits: int = Field(default=32, ge=1, description="of a hash")
    recent: int = Field(default=16, ge=1, description="latest events whose mean is the second query")
    blocks: int = Field(
        default=4,
        ge=1,
        description="of channels that the filter mixes; divides the width of an event, tables.dim × features.sequence",
    )
