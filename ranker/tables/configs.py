"""What TorchRec is told of each table: its name, its rows, its width, the features that read it."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType

from features.errors import UserError, did_you_mean
from features.selection import Feature, FeatureSpec
from ranker.config import BucketsConfig, TablesConfig

Features = tuple[Feature, ...]


class TableConfigs:
    """Of a model's features.

    Raises:
        UserError: `tables.dims` or `tables.buckets` name no such feature, or an impossible width.
    """

    def __init__(self, spec: FeatureSpec, config: TablesConfig) -> None:
        _check(spec, config)
        self._config = config
        self._start = partial(nn.init.uniform_, a=-config.init_scale, b=config.init_scale)

    def width(self, pooled: Feature) -> int:
        """Of a pooled feature's table."""
        return self._config.dims.get(pooled.name, self._config.dim)

    def managed(self, feature: Feature) -> bool:
        """Whether ids come to rows by being met."""
        return feature.name in self._config.managed_collision

    def hashes(self, features: Features) -> list[int]:
        """Rows that an id of each reads."""
        return [1 if smaller is None else smaller.hashes for smaller in map(self._buckets, features)]

    def rows_if_fewer(self, features: Features) -> list[int]:
        """Rows of each table, or ids where those are managed; empty where no table has fewer rows than ids."""
        if not any(map(self._buckets, features)):
            return []
        return [f.size if self.managed(f) else self._rows(f) for f in features]

    def bags(self, place: str, features: Features) -> list[EmbeddingBagConfig]:
        """Tables of pooled features, those that are managed left out."""
        return [
            EmbeddingBagConfig(
                name=_name(place, f),
                num_embeddings=self._rows(f),
                embedding_dim=self.width(f),
                feature_names=[f.name],
                pooling=PoolingType.MEAN if f.kind == "bag" else PoolingType.SUM,
                init_fn=self._start,
            )
            for f in features
            if not self.managed(f)
        ]

    def row(self, place: str, feature: Feature, keys: list[str], width: int) -> EmbeddingConfig:
        """A table whose rows are read one by one."""
        return EmbeddingConfig(
            name=_name(place, feature),
            num_embeddings=self._rows(feature),
            embedding_dim=width,
            feature_names=keys,
            init_fn=self._start,
        )

    def _rows(self, feature: Feature) -> int:
        if (asked := self._config.managed_of(feature.name)) is not None:
            return asked.rows
        smaller = self._buckets(feature)
        return feature.size if smaller is None else smaller.rows + 1

    def _buckets(self, feature: Feature) -> BucketsConfig | None:
        """What `buckets` says of a feature, if that is fewer than its ids."""
        found = None if feature.kind == "vector" else self._config.buckets_of(feature.name)
        return found if found is not None and found.rows + 1 < feature.size else None


def _name(place: str, feature: Feature) -> str:
    return f"{place}.{feature.name}".replace(".", "_")


def _check(spec: FeatureSpec, config: TablesConfig) -> None:
    pooled = [f.name for f in (*spec.request, *spec.candidate)]
    for name, dim in config.dims.items():
        if name not in pooled:
            raise UserError(f"tables.dims.{name}: not a pooled feature; this model has {', '.join(pooled) or 'none'}")
        if dim < 4 or dim % 4:
            raise UserError(f"tables.dims.{name}: {dim}; must be a multiple of 4, at least 4")
    learned = [f.name for f in (*spec.request, *spec.candidate, *spec.sequence, *spec.event)]
    for key, asked in (("buckets", config.buckets), ("managed_collision", config.managed_collision)):
        for name in asked:
            if name not in learned:
                raise UserError(
                    f"tables.{key}.{name}: not a feature with a table{did_you_mean(name, learned)} This model has "
                    f"{', '.join(sorted(set(learned)))}"
                )
