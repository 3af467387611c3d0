"""Which columns of a dataset a model reads, and where: typed, and checked against the dataset's manifest."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from features.dataset import ColumnInfo, Manifest
from features.errors import UserError, did_you_mean
from features.schema import Kind, Strict


class FeatureError(UserError):
    """A feature that the dataset does not have, or that is of the wrong kind for its place."""


class FeaturesConfig(Strict):
    """Features by their place in the model. Names are the dataset's: `item`, `user` (the ids) or `SCOPE.NAME`."""

    request: list[str] = Field(
        default_factory=list,
        description="pooled once per request: `user`, `user.NAME`, `request.NAME` (categorical or bag)",
    )
    candidate: list[str] = Field(
        default_factory=lambda: ["item"], description="pooled once per candidate: `item`, `item.NAME`, `candidate.NAME`"
    )
    dense: list[str] = Field(
        default_factory=list,
        description="floats, standardised: `user.NAME`, `request.NAME`, `item.NAME`, `candidate.NAME`",
    )
    sequence: list[str] = Field(
        default_factory=lambda: ["item"],
        min_length=1,
        description="ids of history and candidates that share a table: `item`, `item.NAME` (categorical); concatenated",
    )
    event: list[str] = Field(
        default_factory=list, description="ids of history events only: `event.NAME`; added to the event"
    )
    event_dense: list[str] = Field(
        default_factory=list, description="floats of history events: `event.NAME`; projected and added"
    )
    codes: list[str] = Field(
        default_factory=list,
        description="ids of history and candidates that blocks read as they are, through no table: `item.NAME` "
        "(categorical), such as the levels of semantic IDs, or `item`",
    )
    content: list[str] = Field(
        default_factory=list,
        description="frozen vectors of history events' items that blocks read as they are: `item.NAME` (vector), such "
        "as semantic IDs' `item.sid_vector`; each is a table that is not trained",
    )


@dataclass(frozen=True)
class Feature:
    """One resolved feature. `size`: ids including the reserved 0; ids at or above it are unknown and read as 0. `dim`:
    floats of a vector, which every item of the dataset has, known to training or not."""

    name: str
    scope: str
    kind: Kind
    size: int
    dim: int = 0


@dataclass(frozen=True)
class FeatureSpec:
    """Resolved features by place; dense ones divided by the stride at which they are stored."""

    request: tuple[Feature, ...]
    candidate: tuple[Feature, ...]
    request_dense: tuple[Feature, ...]
    candidate_dense: tuple[Feature, ...]
    sequence: tuple[Feature, ...]
    event: tuple[Feature, ...]
    event_dense: tuple[Feature, ...]
    codes: tuple[Feature, ...] = ()
    content: tuple[Feature, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What to read: features, labels, the longest history needed (0: all), and oracles, labels' true probabilities.

    `frozen`: all requests of a history row have the history of the first of them in the splits, as from memories that
    were computed once, before it. Other features stay those of each request.
    """

    spec: FeatureSpec
    labels: tuple[str, ...]
    history_length: int
    oracles: tuple[str, ...] = ()
    frozen: bool = False


def resolve(features: FeaturesConfig, manifest: Manifest) -> FeatureSpec:
    """Look every name up in the manifest.

    Raises:
        FeatureError: a name unknown (the nearest is named), in a place its scope does not allow, or of the wrong kind.
    """
    ids = ("categorical", "bag")
    dense = _look_up("dense", features.dense, manifest, ("user", "request", "item", "candidate"), ("dense",))
    return FeatureSpec(
        request=_look_up("request", features.request, manifest, ("user", "request"), ids),
        candidate=_look_up("candidate", features.candidate, manifest, ("item", "candidate"), ids),
        request_dense=tuple(f for f in dense if f.scope in ("user", "request")),
        candidate_dense=tuple(f for f in dense if f.scope in ("item", "candidate")),
        sequence=_look_up("sequence", features.sequence, manifest, ("item",), ("categorical",)),
        event=_look_up("event", features.event, manifest, ("event",), ("categorical",)),
        event_dense=_look_up("event_dense", features.event_dense, manifest, ("event",), ("dense",)),
        codes=_look_up("codes", features.codes, manifest, ("item",), ("categorical",)),
        content=_look_up("content", features.content, manifest, ("item",), ("vector",)),
    )


def _look_up(
    place: str, names: list[str], manifest: Manifest, scopes: tuple[str, ...], kinds: tuple[Kind, ...]
) -> tuple[Feature, ...]:
    known: dict[str, tuple[str, ColumnInfo]] = {
        f"{scope}.{name}": (scope, info)
        for scope, columns in manifest.columns.items()
        for name, info in columns.items()
    }
    known["item"] = ("item", ColumnInfo(kind="categorical", size=manifest.id_rows("item")))
    known["user"] = ("user", ColumnInfo(kind="categorical", size=manifest.id_rows("user")))
    found: list[Feature] = []
    for i, name in enumerate(names):
        allowed = sorted(n for n, (scope, info) in known.items() if scope in scopes and info.kind in kinds)
        if name not in allowed:
            hint = did_you_mean(name, allowed)
            reason = f"is {known[name][1].kind} of scope {known[name][0]}" if name in known else "is not in the dataset"
            choice = ", ".join(allowed) or "nothing in this dataset"
            raise FeatureError(f"features.{place}[{i}]: {name!r} {reason}{hint} Allowed here: {choice}")
        if name in names[:i]:
            raise FeatureError(f"features.{place}[{i}]: {name!r} is named twice; remove one")
        scope, info = known[name]
        size = manifest.items if info.kind == "vector" else info.size
        found.append(Feature(name, scope, info.kind, size, info.dim))
    return tuple(found)
