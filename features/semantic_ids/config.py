"""Typed configuration of a codebook: what an item's content vector is made of, and how it is quantised."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from features.schema import Strict


class VectorPart(Strict):
    """A vector column of the item table."""

    type: Literal["vector"] = "vector"
    column: str = Field(description="`item.NAME` of kind vector")
    weight: float = Field(default=1.0, gt=0, description="length of this part in the content vector")


class TextPart(Strict):
    """Words: text columns, and the values of categorical and bag columns as one word each."""

    type: Literal["text"] = "text"
    columns: list[str] = Field(min_length=1, description="`item.NAME` of kind text, categorical or bag")
    weight: float = Field(default=1.0, gt=0, description="length of this part in the content vector")
    encoder: Literal["tfidf", "sentence_transformers"] = Field(
        default="tfidf",
        description="tfidf: hashed word n-grams, TF-IDF, truncated SVD, offline; sentence_transformers: the optional "
        "extra `text`, reads text columns only",
    )
    model: str | None = Field(default=None, description="sentence_transformers: name or folder of the model")
    dim: int = Field(default=64, ge=2, description="tfidf: width of the reduced vector")
    ngrams: int = Field(default=2, ge=1, le=5, description="tfidf: longest run of words that counts as a term")
    buckets: int = Field(default=1 << 16, ge=16, description="tfidf: terms are hashed to so many")

    @model_validator(mode="after")
    def _model_fits_encoder(self) -> TextPart:
        if (self.model is None) == (self.encoder == "sentence_transformers"):
            raise ValueError(
                f"model: needed by encoder sentence_transformers and by it alone, got {self.model!r} for {self.encoder}"
            )
        return self


class BehaviourPart(Strict):
    """Which items occur together in training histories: PPMI reduced by truncated SVD (Levy & Goldberg 2014)."""

    type: Literal["behaviour"] = "behaviour"
    weight: float = Field(default=1.0, gt=0, description="length of this part in the content vector")
    dim: int = Field(default=64, ge=2, description="width of the reduced vector")
    window: int = Field(default=5, ge=1, description="two events of a user occur together at most so many apart")
    min_count: int = Field(default=5, ge=1, description="items with fewer training events have no behaviour")
    contexts: int = Field(default=50_000, ge=2, description="only the most frequent so many items count as company")
    smoothing: float = Field(default=0.75, gt=0, le=1, description="power of the context counts")
    shift: float = Field(default=1.0, ge=1, description="log of it is taken from the mutual information")
    events: int = Field(default=5_000_000, ge=1, description="users are sampled so that about so many events are read")


ContentPart = Annotated[VectorPart | TextPart | BehaviourPart, Field(discriminator="type")]


class ResidualKMeansConfig(Strict):
    """Residual K-means (faiss): each level clusters what the levels before left over."""

    type: Literal["residual_kmeans"] = "residual_kmeans"
    iterations: int = Field(default=25, ge=1)
    restarts: int = Field(default=1, ge=1, description="the best of so many starts, by error, is kept")


class LetterConfig(Strict):
    """LETTER's two losses on top of RQ-VAE's (Wang et al. 2024); off at weight 0."""

    collaborative: float = Field(
        default=0.0, ge=0, description="weight: codes agree with behaviour, in-batch contrast; needs a `behaviour` part"
    )
    diversity: float = Field(default=0.0, ge=0, description="weight: codewords of one level spread evenly")
    clusters: int = Field(default=10, ge=2, description="diversity: groups of codewords that attract one another")
    temperature: float = Field(default=0.1, gt=0, description="of both contrasts")


class RqVaeConfig(Strict):
    """RQ-VAE: an autoencoder with residual quantisation in between (Lee et al. 2022; Rajput et al. 2023)."""

    type: Literal["rqvae"] = "rqvae"
    hidden: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [128, 64], description="widths of the encoder's layers, mirrored"
    )
    latent: int = Field(default=32, ge=2, description="width of latent vectors and codewords")
    steps: int = Field(default=3_000, ge=1)
    batch: int = Field(default=1_024, ge=8)
    lr: float = Field(default=1e-3, gt=0)
    commitment: float = Field(default=0.25, ge=0)
    codewords: Literal["ema", "loss"] = Field(default="ema", description="how codewords learn")
    dead_below: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="a code used less often than this share of an even use starts anew from an item; 0: never",
    )
    letter: LetterConfig = Field(default_factory=LetterConfig)

    @model_validator(mode="after")
    def _diversity_can_move_codewords(self) -> RqVaeConfig:
        if self.letter.diversity > 0 and self.codewords != "loss":
            raise ValueError(
                f"letter.diversity: {self.letter.diversity:g} moves codewords by gradient, but codewords is "
                f"{self.codewords!r}; set codewords: loss"
            )
        return self


class KMeansFsqConfig(Strict):
    """Residual K-means, and finite scalar quantisation (Mentzer et al. 2023) of the last level's residual."""

    type: Literal["kmeans_fsq"] = "kmeans_fsq"
    iterations: int = Field(default=25, ge=1)
    restarts: int = Field(default=1, ge=1)
    fsq_levels: list[Annotated[int, Field(ge=2)]] | None = Field(
        default=None,
        min_length=1,
        description="steps of each scalar; their product is the last level's codes; default: fours",
    )
    steps: int = Field(default=1_500, ge=1, description="of learning the projection of the last residual")
    batch: int = Field(default=1_024, ge=8)
    lr: float = Field(default=3e-3, gt=0)


QuantizerConfig = Annotated[ResidualKMeansConfig | RqVaeConfig | KMeansFsqConfig, Field(discriminator="type")]


class SidsReportConfig(Strict):
    """What the codes are judged by."""

    columns: list[str] = Field(
        default_factory=list, description="categorical item columns that codes should agree with: `item.NAME`"
    )
    neighbours: int = Field(default=10, ge=1, description="nearest neighbours that should share codes")
    sample: int = Field(default=5_000, ge=10, description="items whose neighbours are sought and that are drawn")
    events: int = Field(default=1_000_000, ge=0, description="training events in which co-occurrence is counted")
    window: int = Field(default=5, ge=1, description="two events of a user occur together at most so many apart")
    pictures: bool = Field(default=True, description="draw plots, and write files for TensorBoard's projector")


class SidsConfig(Strict):
    """Everything ``ranker sids fit`` needs."""

    name: str = Field(
        default="sid",
        pattern=r"^[a-z][a-z0-9_]*$",
        description="names the item columns: NAME_1 … NAME_M, NAME_path, NAME_vector",
    )
    version: str | None = Field(
        default=None, min_length=1, description="label of this fit, e.g. a date; default: the time of the fit, UTC"
    )
    seed: int = Field(default=0, description="of samples, starts and training: the same one gives the same codes")
    content: list[ContentPart] = Field(
        min_length=1, description="parts of the content vector, each scaled to its weight"
    )
    levels: list[Annotated[int, Field(ge=2, le=1 << 20)]] = Field(
        min_length=1, max_length=8, description="codes of each level"
    )
    quantizer: QuantizerConfig = Field(default_factory=ResidualKMeansConfig)
    sample: int = Field(default=200_000, ge=2, description="items that the quantiser is fitted to, at most")
    chunk: int = Field(default=65_536, ge=1, description="items coded at a time")
    path_buckets: int = Field(
        default=100_000, ge=2, description="rows of a table of SID prefixes; hashed where there are more prefixes"
    )
    threads: int = Field(
        default=2,
        ge=1,
        description="of fitting K-means; RQ-VAE and FSQ learn on one, and items are coded on OMP_NUM_THREADS, or all",
    )
    report: SidsReportConfig = Field(default_factory=SidsReportConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> SidsConfig:
        quantizer = self.quantizer
        contrast = isinstance(quantizer, RqVaeConfig) and quantizer.letter.collaborative > 0
        if contrast and not any(isinstance(part, BehaviourPart) for part in self.content):
            raise ValueError("quantizer.letter.collaborative: needs a part of type behaviour in content")
        steps = quantizer.fsq_levels if isinstance(quantizer, KMeansFsqConfig) else None
        if steps is not None and math.prod(steps) != self.levels[-1]:
            raise ValueError(
                f"quantizer.fsq_levels: {steps} makes {math.prod(steps)} codes, the last level has {self.levels[-1]}"
            )
        return self
