"""Config of the compressors: UxSID, HiSAC and HyTRec."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from features.schema import Strict
from ranker.config_blocks.fields import dividing_width


class UxSidConfig(Strict):
    """UxSID: semantic groups probe the history."""

    type: Literal["uxsid"] = "uxsid"
    probe: str = Field(
        default="item.sid_1",
        description="the candidate's group: a feature that stands in features.sequence and in features.codes",
    )
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    global_probe: bool = Field(default=True, description="false: no e_global")
    local_probe: bool = Field(default=True, description="false: no anchors and no e_local")
    gate: bool = True
    width: int = Field(default=32, ge=1, description="d, of everything inside and of the output")
    anchors: int = Field(default=16, ge=1, description="K, at most width")
    anchor_hidden: int = Field(default=32, ge=1, description="m, of each anchor's feed-forward net")
    gate_hidden: int = Field(default=32, ge=1)
    heads: int = Field(default=2, ge=1, description="of the candidate's attention to its group's two rows")
    age_buckets: int = Field(default=32, ge=0)
    ortho: Literal["frobenius", "row"] = Field(default="frobenius", description="how anchors' interests are normalised")
    ortho_weight: float = Field(default=0.1, ge=0, description="λ of the orthogonality loss; 0: off")

    _heads = field_validator("heads")(dividing_width)

    @field_validator("local_probe")
    @classmethod
    def _something_to_read(cls, local_probe: bool, info: ValidationInfo) -> bool:
        if not (local_probe or info.data.get("global_probe", True)):
            raise ValueError("global_probe is off too, and nothing would be left to read; turn one on")
        return local_probe

    @field_validator("anchors")
    @classmethod
    def _can_be_orthogonal(cls, anchors: int, info: ValidationInfo) -> int:
        width: int | None = info.data.get("width")
        if width is not None and anchors > width and info.data.get("local_probe", True):
            raise ValueError(f"must be at most width ({width}), or no anchors' interests could be orthogonal")
        return anchors


class HiSacConfig(Strict):
    """HiSAC: votes on the tree of semantic IDs make interest agents."""

    type: Literal["hisac"] = "hisac"
    codebook: str = Field(
        default="sid", description="semantic IDs of the dataset; all their levels stand in features.codes"
    )
    keep: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [20, 3], min_length=1, description="k_l: children kept under each node, level by level"
    )
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    heads: int = Field(default=2, ge=1)
    head_dim: int = Field(default=16, ge=2)
    gamma: float = Field(default=1.0, ge=0, description="agents weigh their votes to this power; 0: all the same")
    temperature: float = Field(default=1.0, gt=0, description="of the routing, in mean squared norms of last codewords")
    routing: Literal["items", "agents", "hard"] = Field(
        default="items", description="softmax over a history's items, over the agents, or the nearest agent"
    )
    z: Literal["content", "codewords", "embedding"] = Field(
        default="codewords",
        description="events' place: their item's content vector, `item.CODEBOOK_vector` in features.content; their "
        "codewords' sum; or (ablation) their ranking embedding",
    )
    voting: bool = Field(default=True, description="false: every leaf is an agent")
    most_leaves: int = Field(default=1000, ge=1, description="without voting, at most so many")
    age_buckets: int = Field(default=32, ge=0)


class HyTrecConfig(Strict):
    """HyTRec: softmax attention on the latest events, linear attention with a temporal gate on the rest."""

    type: Literal["hytrec"] = "hytrec"
    length: int = Field(default=0, ge=0, description="latest events; 0: all")
    width: int = Field(default=32, ge=1)
    heads: int = Field(default=2, ge=1)
    layers: int = Field(default=4, ge=1, description="of the long branch; up to `ratio` there is no softmax layer")
    ratio: int = Field(default=3, ge=1, description="linear layers before each softmax layer")
    short_length: int = Field(default=50, ge=1, description="events of the short branch")
    period_s: float = Field(
        default=7 * 86400.0, gt=0, allow_inf_nan=False, description="time in which the gate falls to 1/e, seconds"
    )
    decay: Literal["now", "state"] = Field(
        default="now", description="now: gates by age at the request; state: the state decays between events"
    )
    deviation: Literal["mean", "previous"] = Field(
        default="mean", description="of an event, from the mean so far or from the event before"
    )
    feed_forward: int = Field(default=2, ge=1, description="hidden width of the feed-forward nets, in widths")
    window: int = Field(default=256, ge=0, description="events that a softmax layer sees; 0: all, at a cost of Σ L²")
    gate_bias: float = Field(
        default=-4.0,
        ge=-7,
        le=7,
        allow_inf_nan=False,
        description="of the gates at first; -4: a memory of thousands of events, within period_s; 0: of some tens",
    )
    agreement: bool = Field(default=True, description="what is read of a state, also times the candidate's own value")
    key: str | None = Field(
        default=None,
        description="a feature of features.sequence that keys and queries are made of at first, such as item.sid_1; "
        "none: of all features",
    )
    slots: list[str] = Field(
        default=[],
        description="features of features.codes and features.sequence, such as item.sid_1 or item, by which events "
        "fall into the slots of one head each in every linear layer (modulo key_dim); the other heads learn theirs",
    )
    key_dim: int = Field(default=32, ge=0, description="d_k, slots of a head's state; 0: width / heads")
    sharpness: float = Field(
        default=4.0, ge=0, allow_inf_nan=False, description="of the softmax over slots in queries and keys; 0: none"
    )
    next_item_weight: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="of the loss of predicting the next event; 0: off"
    )
    next_items: int = Field(default=8, ge=1, description="positions of a history that it is computed for, the latest")

    _heads = field_validator("heads")(dividing_width)
