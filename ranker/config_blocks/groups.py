"""Config of the methods that keep a constant number of vectors of a history."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from features.schema import Strict
from ranker.config_blocks.fields import dividing_width


class SdimConfig(Strict):
    """SDIM: a candidate reads the sums of the events that SimHash puts into its own buckets."""

    type: Literal["sdim"] = "sdim"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    hashes: int = Field(default=16, ge=1)
    bits: int = Field(default=3, ge=1, le=10, description="of each hash: 2^bits buckets")
    age_buckets: int = Field(default=32, ge=0, description="of the events' weights by age; 0: all alike, as published")


class VqlConfig(Strict):
    """VQL: target attention with quantised keys and exact values, from caches by code."""

    type: Literal["vql"] = "vql"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    codes: int = Field(default=32, ge=1, description="M, of each head's codebook")
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    periods_s: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: [86400.0, 7 * 86400.0, 30 * 86400.0],
        description="in which kernels of time fall to 1/e, seconds; one that does not decay is added",
    )
    codebook_weight: float = Field(default=0.1, ge=0, description="λ of the quantisation loss; 0: off")
    commitment: float = Field(default=0.0, ge=0, description="μ, the keys' part in it; large ones collapse the keys")
    straight_through: bool = Field(default=True, description="keys learn from the task; false: from their part alone")


class CFormerConfig(Strict):
    """C-Former: learned queries become interests over layers of cross-attention to the history."""

    type: Literal["cformer"] = "cformer"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    width: int = Field(default=32, ge=2, description="of slots")
    queries: int = Field(default=32, ge=1, description="K, at most width")
    layers: int = Field(default=2, ge=1)
    feed_forward: int = Field(default=2, ge=1, description="hidden width of the feed-forward nets, in widths")
    heads: int = Field(default=2, ge=1, description="of the layers and of the candidate's attention")
    head_dim: int = Field(default=16, ge=2, description="of the candidate's attention")
    age_buckets: int = Field(default=32, ge=0)
    reconstruction_weight: float = Field(default=0.1, ge=0, description="of the reconstruction loss; 0: off")
    orthogonality_weight: float = Field(default=0.1, ge=0, description="of the orthogonality loss; 0: off")
    reconstructed: int = Field(default=64, ge=1, description="events of a history that the former looks at")

    _heads = field_validator("heads")(dividing_width)

    @field_validator("queries")
    @classmethod
    def _can_be_orthogonal(cls, queries: int, info: ValidationInfo) -> int:
        width: int | None = info.data.get("width")
        if width is not None and queries > width:
            raise ValueError(f"must be at most width ({width}), or no slots could be orthogonal")
        return queries


class KMeansConfig(Strict):
    """K-Means: attention to the means of clusters, found anew for each request."""

    type: Literal["kmeans"] = "kmeans"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    clusters: int = Field(default=32, ge=1)
    steps: int = Field(default=3, ge=0, description="of Lloyd's")
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    sizes: bool = Field(default=True, description="clusters weigh by their events")
    age_buckets: int = Field(default=32, ge=0)


class LshConfig(Strict):
    """LSH: attention to the means of events whose SimHash is the same."""

    type: Literal["lsh"] = "lsh"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    bits: int = Field(default=5, ge=1, le=10, description="of the hash: 2^bits groups")
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    sizes: bool = Field(default=True, description="groups weigh by their events")
    age_buckets: int = Field(default=32, ge=0)


class PatchingConfig(Strict):
    """Patching: attention to the means of equal pieces of the history, in the order of time."""

    type: Literal["patching"] = "patching"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    patches: int = Field(default=32, ge=1)
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    sizes: bool = Field(default=True, description="pieces weigh by their events")
    age_buckets: int = Field(default=32, ge=0)


class AggregatorConfig(Strict):
    """Aggregator: attention to what learned queries gather of the history."""

    type: Literal["aggregator"] = "aggregator"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    queries: int = Field(default=32, ge=1)
    width: int = Field(default=32, ge=2, description="in which queries and events are compared")
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    age_buckets: int = Field(default=32, ge=0)


class PolyEncoderConfig(Strict):
    """Poly-encoder: learned codes attend to the history, the candidate to what they find, in one space."""

    type: Literal["poly_encoder"] = "poly_encoder"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    codes: int = Field(default=32, ge=1, description="m")
    width: int = Field(default=32, ge=2, description="of everything inside and of the output")
    age_buckets: int = Field(default=32, ge=0)
