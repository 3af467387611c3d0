"""The sparse part: every id table of the ranker, as TorchRec modules that the planner shards.

Pooled features go through EmbeddingBagCollections, at request stride and at candidate stride; ids that are read one by
one go through one EmbeddingCollection, whose tables history and candidates share, in one look-up.

A table may have fewer rows than ids (`tables.buckets`): ids become rows here, in the forward pass, so that training,
evaluation and the exported model do it alike, and history and candidates too.

Items' frozen content vectors are tables too, sharded like the others, so that a batch brings 8 bytes an event and not a
vector, and a checkpoint and an export hold each item's once. They are filled from the dataset's column and looked up
without gradients, so that their backward pass, in which the fused optimizer would step, never runs.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from features.batch import names
from features.dataset import Dataset
from features.errors import UserError, did_you_mean
from features.selection import Feature, FeatureSpec
from features.views import item_file
from ranker.buckets import bucketed, summed
from ranker.config import BucketsConfig, TablesConfig


class Embedded(NamedTuple):
    """request `[R, ·]` and candidate `[N, ·]`: pooled features side by side. event `[T, d]`, target `[N, d]`: d = the
    shared sequence features side by side; an event has its event-only ids added. content `[T, ·]`: the events' items'
    frozen vectors side by side."""

    request: Tensor
    candidate: Tensor
    event: Tensor
    target: Tensor
    content: Tensor


class Tables(nn.Module):
    """All embedding tables. Table names are ``request_NAME``, ``candidate_NAME``, ``sequence_NAME`` and
    ``content_NAME``, dots as underscores."""

    # lists may be empty, and then do not tell their type to TorchScript
    _request_rows: list[int]
    _request_hashes: list[int]
    _candidate_rows: list[int]
    _candidate_hashes: list[int]
    _sequence_rows: list[int]
    _event_hashes: list[int]
    _request_keys: list[str]
    _candidate_keys: list[str]
    _event_keys: list[str]
    _content_keys: list[str]
    _content_dims: list[int]

    def __init__(self, spec: FeatureSpec, config: TablesConfig, device: torch.device | None = None) -> None:
        super().__init__()
        pooled = [f.name for f in (*spec.request, *spec.candidate)]
        for name, dim in config.dims.items():
            if name not in pooled:
                raise UserError(
                    f"tables.dims.{name}: not a pooled feature; this model has {', '.join(pooled) or 'none'}"
                )
            if dim < 4 or dim % 4:
                raise UserError(f"tables.dims.{name}: {dim}; must be a multiple of 4, at least 4")
        learned = [f.name for f in (*spec.request, *spec.candidate, *spec.sequence, *spec.event)]
        for name in config.buckets:
            if name not in learned:
                raise UserError(
                    f"tables.buckets.{name}: not a feature with a table{did_you_mean(name, learned)} This model has "
                    f"{', '.join(sorted(set(learned)))}"
                )

        def asked(feature: Feature) -> BucketsConfig | None:
            found = None if feature.kind == "vector" else config.buckets_of(feature.name)
            return found if found is not None and found.rows + 1 < feature.size else None

        def rows(feature: Feature) -> int:
            smaller = asked(feature)
            return feature.size if smaller is None else smaller.rows + 1

        def hashes(features: tuple[Feature, ...]) -> list[int]:
            return [1 if smaller is None else smaller.hashes for smaller in map(asked, features)]

        def rows_if_fewer(features: tuple[Feature, ...]) -> list[int]:
            return [rows(f) for f in features] if any(map(asked, features)) else []

        start = partial(nn.init.uniform_, a=-config.init_scale, b=config.init_scale)
        width = {f.name: config.dims.get(f.name, config.dim) for f in (*spec.request, *spec.candidate)}
        self.dim = config.dim * len(spec.sequence)
        self.request_width = sum(width[f.name] for f in spec.request)
        self.candidate_width = sum(width[f.name] for f in spec.candidate)
        self.shared = [f.name for f in spec.sequence]
        self.added = [f.name for f in spec.event]

        def bags(place: str, features: tuple[Feature, ...]) -> EmbeddingBagCollection | None:
            tables = [
                EmbeddingBagConfig(
                    name=f"{place}.{f.name}".replace(".", "_"),
                    num_embeddings=rows(f),
                    embedding_dim=width[f.name],
                    feature_names=[f.name],
                    pooling=PoolingType.MEAN if f.kind == "bag" else PoolingType.SUM,
                    init_fn=start,
                )
                for f in features
            ]
            return EmbeddingBagCollection(tables=tables, device=device) if tables else None

        self.request = bags("request", spec.request)
        self.candidate = bags("candidate", spec.candidate)
        shared = [
            EmbeddingConfig(
                name=f"sequence.{f.name}".replace(".", "_"),
                num_embeddings=rows(f),
                embedding_dim=config.dim,
                feature_names=[f"history:{f.name}", f"candidate:{f.name}"],
                init_fn=start,
            )
            for f in spec.sequence
        ]
        added = [
            EmbeddingConfig(
                name=f"sequence.{f.name}".replace(".", "_"),
                num_embeddings=rows(f),
                embedding_dim=self.dim,
                feature_names=[f"history:{f.name}"],
                init_fn=start,
            )
            for f in spec.event
        ]
        self.sequence = EmbeddingCollection(tables=shared, device=device)
        # an EmbeddingCollection holds tables of one width
        self.events = EmbeddingCollection(tables=added, device=device) if added else None
        self.content = nn.ModuleList([_content_table(f, device) for f in spec.content])
        sequence = (*spec.sequence, *spec.event, *spec.content, *spec.sequence)
        self._request_rows, self._request_hashes = rows_if_fewer(spec.request), hashes(spec.request)
        self._candidate_rows, self._candidate_hashes = rows_if_fewer(spec.candidate), hashes(spec.candidate)
        self._sequence_rows, self._sequence_hashes = rows_if_fewer(sequence), hashes(sequence)
        self._shared_hashes, self._event_hashes = hashes(spec.sequence), hashes(spec.event)
        self._request_keys, self._candidate_keys = names(spec.request), names(spec.candidate)
        self._history_keys = [f"history:{name}" for name in self.shared]
        self._target_keys = [f"candidate:{name}" for name in self.shared]
        self._event_keys = [f"history:{name}" for name in self.added]
        self._content_keys = [f"history:{f.name}" for f in spec.content]
        self._content_dims = [f.dim for f in spec.content]

    def forward(
        self, request: KeyedJaggedTensor, candidate: KeyedJaggedTensor, sequence: KeyedJaggedTensor
    ) -> Embedded:
        """Look everything up. See :class:`features.batch.RequestBatch` for strides."""
        request = bucketed(request, self._request_rows, self._request_hashes)
        candidate = bucketed(candidate, self._candidate_rows, self._candidate_hashes)
        sequence = self.rows(sequence)
        event, target = self.shared_of(sequence)
        if self.events is not None:
            added = self.events(sequence)
            for i, key in enumerate(self._event_keys):
                event = event + summed(added[key].values(), self._event_hashes[i])
        content = [torch.zeros([event.size(0), 0], device=event.device)]
        with torch.no_grad():
            for i, table in enumerate(self.content):
                vectors = table(sequence)[self._content_keys[i]].values()
                content.append(vectors[:, : self._content_dims[i]])
        # a keyed tensor without keys does not know its stride
        of_request = torch.zeros([sequence.stride(), 0], device=event.device)
        if self.request is not None:
            pooled = self.request(request)
            # by key: side by side as they come, they are in the order of the sharding plan
            of_request = torch.cat([pooled[key] for key in self._request_keys], 1)
        of_candidate = torch.zeros([target.size(0), 0], device=event.device)
        if self.candidate is not None:
            pooled = self.candidate(candidate)
            of_candidate = torch.cat([pooled[key] for key in self._candidate_keys], 1)
        return Embedded(of_request, of_candidate, event, target, torch.cat(content, 1))

    def rows(self, sequence: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Ids of history and candidates as rows of their tables."""
        return bucketed(sequence, self._sequence_rows, self._sequence_hashes)

    def shared_of(self, rows: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Events and candidates from the tables that they share: `[T, d]`, `[N, d]`."""
        looked_up = self.sequence(rows)
        event: list[Tensor] = []
        target: list[Tensor] = []
        for i, hashes in enumerate(self._shared_hashes):
            event.append(summed(looked_up[self._history_keys[i]].values(), hashes))
            target.append(summed(looked_up[self._target_keys[i]].values(), hashes))
        return torch.cat(event, 1), torch.cat(target, 1)


def _content_table(feature: Feature, device: torch.device | None) -> EmbeddingCollection:
    """A table of every item's vector, zeros until :func:`load_content`; FBGEMM's rows are multiples of 4 wide."""
    table = EmbeddingConfig(
        name=f"content.{feature.name}".replace(".", "_"),
        num_embeddings=feature.size,
        embedding_dim=-(-feature.dim // 4) * 4,
        feature_names=[f"history:{feature.name}"],
        init_fn=nn.init.zeros_,
    )
    return EmbeddingCollection(tables=[table], device=device)


def load_content(model: nn.Module, spec: FeatureSpec, dataset: Dataset) -> None:
    """Fill a ranker's content tables, whole or this rank's shards of them, from the dataset's columns."""
    state = model.state_dict()
    items = item_file(dataset) if spec.content else None
    for i, feature in enumerate(spec.content):
        assert items is not None
        vectors = items.vectors(feature.name, feature.dim)
        weight = state[f"tables.content.{i}.embeddings.{f'content.{feature.name}'.replace('.', '_')}.weight"]
        if isinstance(weight, ShardedTensor):
            parts = [(s.tensor, s.metadata.shard_offsets) for s in weight.local_shards()]
        else:
            parts = [(weight, [0, 0])]
        for part, (row, column) in parts:
            rows = torch.from_numpy(vectors[row : row + part.size(0), column : column + part.size(1)].copy())
            with torch.no_grad():
                part[:, : rows.size(1)].copy_(rows)
