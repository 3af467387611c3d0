"""The sparse part: every id table of the ranker, as TorchRec modules that the planner shards.

Pooled features go through EmbeddingBagCollections, at request stride and at candidate stride; ids that are read one by
one go through one EmbeddingCollection, whose tables history and candidates share, in one look-up.

A table may have fewer rows than ids (`tables.buckets`): ids become rows here, in the forward pass, so that training,
evaluation and the exported model do it alike, and history and candidates too.

A table may have rows for those ids alone that training met last, or most (`tables.managed_collision`): in training
it is a :class:`ranker.tables.managed_collision.ManagedRows`, and afterwards, held, a
:class:`ranker.tables.held_rows.HeldRows`.

Items' frozen content vectors are tables too, sharded like the others, so that a batch brings 8 bytes an event and not a
vector, and a checkpoint and an export hold each item's once. They are filled from the dataset's column and looked up
without gradients, so that their backward pass, in which the fused optimizer would step, never runs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from features.batch import names
from features.dataset import Dataset
from features.selection import Feature, FeatureSpec
from features.views import item_file
from ranker.config import TablesConfig
from ranker.tables.buckets import bucketed, summed
from ranker.tables.configs import TableConfigs
from ranker.tables.held_rows import HeldRows
from ranker.tables.managed_collision import ManagedRows


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
    ``content_NAME``, dots as underscores.

    Args:
        held: managed tables are as training left them, and any device has them.
    """

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
    _request_own: list[str]
    _request_managed: list[str]
    _request_means: list[bool]
    _candidate_own: list[str]
    _candidate_managed: list[str]
    _candidate_means: list[bool]
    _sequence_own: list[str]
    _sequence_managed: list[list[str]]
    _event_own: list[str]
    _event_managed: list[str]

    def __init__(
        self, spec: FeatureSpec, config: TablesConfig, device: torch.device | None = None, held: bool = False
    ) -> None:
        super().__init__()
        of = TableConfigs(spec, config)

        def bags(place: str, features: tuple[Feature, ...]) -> tuple[EmbeddingBagCollection | None, nn.ModuleList]:
            configs = of.bags(place, features)
            own = EmbeddingBagCollection(tables=configs, device=device) if configs else None
            return own, managed([(f, of.row(place, f, [f.name], of.width(f))) for f in features if of.managed(f)])

        def one_by_one(
            features: tuple[Feature, ...], keys: Callable[[str], list[str]], width: int
        ) -> tuple[EmbeddingCollection | None, nn.ModuleList]:
            configs = [(f, of.row("sequence", f, keys(f.name), width)) for f in features]
            tables = [table for f, table in configs if not of.managed(f)]
            own = EmbeddingCollection(tables=tables, device=device) if tables else None
            return own, managed([(f, table) for f, table in configs if of.managed(f)])

        def managed(tables: list[tuple[Feature, EmbeddingConfig]]) -> nn.ModuleList:
            if held:
                return nn.ModuleList([HeldRows(table, f.size, device) for f, table in tables])
            asked = [(f, table, config.managed_of(f.name)) for f, table in tables]
            return nn.ModuleList([ManagedRows(table, f.size, how, device) for f, table, how in asked if how])

        self.dim = config.dim * len(spec.sequence)
        self.shared = [f.name for f in spec.sequence]
        self.request_width = sum(map(of.width, spec.request))
        self.candidate_width = sum(map(of.width, spec.candidate))
        self.request, self.managed_request = bags("request", spec.request)
        self.candidate, self.managed_candidate = bags("candidate", spec.candidate)
        self.sequence, self.managed_sequence = one_by_one(spec.sequence, _both, config.dim)
        # an EmbeddingCollection holds tables of one width
        self.events, self.managed_events = one_by_one(spec.event, _of_history, self.dim)
        self.content = nn.ModuleList([_content_table(f, device) for f in spec.content])
        sequence = (*spec.sequence, *spec.event, *spec.content, *spec.sequence)
        self._request_rows, self._request_hashes = of.rows_if_fewer(spec.request), of.hashes(spec.request)
        self._candidate_rows, self._candidate_hashes = of.rows_if_fewer(spec.candidate), of.hashes(spec.candidate)
        self._sequence_rows, self._sequence_hashes = of.rows_if_fewer(sequence), of.hashes(sequence)
        self._shared_hashes, self._event_hashes = of.hashes(spec.sequence), of.hashes(spec.event)
        self._request_keys, self._candidate_keys = names(spec.request), names(spec.candidate)
        self._history_keys = [f"history:{f.name}" for f in spec.sequence]
        self._target_keys = [f"candidate:{f.name}" for f in spec.sequence]
        self._event_keys = [f"history:{f.name}" for f in spec.event]
        self._content_keys = [f"history:{f.name}" for f in spec.content]
        self._content_dims = [f.dim for f in spec.content]
        # keys that the collections look up; of managed tables, each has its own
        self._request_own = [f.name for f in spec.request if not of.managed(f)]
        self._request_managed = [f.name for f in spec.request if of.managed(f)]
        self._request_means = [f.kind == "bag" for f in spec.request if of.managed(f)]
        self._candidate_own = [f.name for f in spec.candidate if not of.managed(f)]
        self._candidate_managed = [f.name for f in spec.candidate if of.managed(f)]
        self._candidate_means = [f.kind == "bag" for f in spec.candidate if of.managed(f)]
        self._sequence_own = [key for f in spec.sequence if not of.managed(f) for key in _both(f.name)]
        self._sequence_managed = [_both(f.name) for f in spec.sequence if of.managed(f)]
        self._event_own = [key for f in spec.event if not of.managed(f) for key in _of_history(f.name)]
        self._event_managed = [key for f in spec.event if of.managed(f) for key in _of_history(f.name)]

    def forward(
        self, request: KeyedJaggedTensor, candidate: KeyedJaggedTensor, sequence: KeyedJaggedTensor
    ) -> Embedded:
        """Look everything up. See :class:`features.batch.RequestBatch` for strides."""
        request = bucketed(request, self._request_rows, self._request_hashes)
        candidate = bucketed(candidate, self._candidate_rows, self._candidate_hashes)
        sequence = self.rows(sequence)
        event, target = self.shared_of(sequence)
        added: dict[str, Tensor] = {}
        if self.events is not None:
            looked_up = self.events(sequence)
            for key in self._event_own:
                added[key] = looked_up[key].values()
        for i, table in enumerate(self.managed_events):
            key = self._event_managed[i]
            added[key] = table(sequence)[key].values()
        for i, key in enumerate(self._event_keys):
            event = event + summed(added[key], self._event_hashes[i])
        content = [torch.zeros([event.size(0), 0], device=event.device)]
        with torch.no_grad():
            for i, table in enumerate(self.content):
                vectors = table(sequence)[self._content_keys[i]].values()
                content.append(vectors[:, : self._content_dims[i]])
        # a keyed tensor without keys does not know its stride
        of_request = torch.zeros([sequence.stride(), 0], device=event.device)
        bags: dict[str, Tensor] = {}
        if self.request is not None:
            found = self.request(request)
            for key in self._request_own:
                bags[key] = found[key]
        for i, table in enumerate(self.managed_request):
            key = self._request_managed[i]
            bags[key] = pooled(table(with_an_empty_list(request))[key], self._request_means[i])
        if len(self._request_keys) > 0:
            # by key: side by side as they come, they are in the order of the sharding plan
            of_request = torch.cat([bags[key] for key in self._request_keys], 1)
        of_candidate = torch.zeros([target.size(0), 0], device=event.device)
        if self.candidate is not None:
            found = self.candidate(candidate)
            for key in self._candidate_own:
                bags[key] = found[key]
        for i, table in enumerate(self.managed_candidate):
            key = self._candidate_managed[i]
            bags[key] = pooled(table(with_an_empty_list(candidate))[key], self._candidate_means[i])
        if len(self._candidate_keys) > 0:
            of_candidate = torch.cat([bags[key] for key in self._candidate_keys], 1)
        return Embedded(of_request, of_candidate, event, target, torch.cat(content, 1))

    def rows(self, sequence: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Ids of history and candidates as rows of their tables."""
        return bucketed(sequence, self._sequence_rows, self._sequence_hashes)

    def shared_of(self, rows: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """Events and candidates from the tables that they share: `[T, d]`, `[N, d]`."""
        of_key: dict[str, Tensor] = {}
        if self.sequence is not None:
            looked_up = self.sequence(rows)
            for key in self._sequence_own:
                of_key[key] = looked_up[key].values()
        for i, table in enumerate(self.managed_sequence):
            found = table(rows)
            for key in self._sequence_managed[i]:
                of_key[key] = found[key].values()
        event: list[Tensor] = []
        target: list[Tensor] = []
        for i, hashes in enumerate(self._shared_hashes):
            event.append(summed(of_key[self._history_keys[i]], hashes))
            target.append(summed(of_key[self._target_keys[i]], hashes))
        return torch.cat(event, 1), torch.cat(target, 1)


def _both(name: str) -> list[str]:
    return [f"history:{name}", f"candidate:{name}"]


def _of_history(name: str) -> list[str]:
    return [f"history:{name}"]


@torch.fx.wrap
def with_an_empty_list(ids: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same ids, and of each key an empty list after its others: TorchRec's EmbeddingCollection does not take a
    stride of 0, as of a request without candidates."""
    lengths = ids.lengths().view(len(ids.keys()), -1)
    return KeyedJaggedTensor(ids.keys(), ids.values(), lengths=torch.nn.functional.pad(lengths, [0, 1]).flatten())


@torch.fx.wrap
def pooled(rows: JaggedTensor, mean: bool) -> Tensor:
    """The sum, or the mean, of each list's rows, the last list left out: `[stride, d]`, zero of none."""
    values, lengths = rows.values(), rows.lengths().long()
    lists = torch.arange(lengths.size(0), device=values.device)
    of = torch.repeat_interleave(lists, lengths, output_size=values.size(0))
    total = torch.zeros([lengths.size(0), values.size(1)], device=values.device, dtype=values.dtype)
    total = total.index_add(0, of, values)
    return (total / lengths.clamp(min=1).unsqueeze(1) if mean else total)[:-1]


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
