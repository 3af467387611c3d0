"""What one step of a rank looks up, estimated from the run's config and its dataset's manifest.

The planner weighs sharding by it: how many ids and vectors go between ranks, and what memory they take on the way.
Estimates are means: a user has all events of the logs, of which each block reads its latest ones; requests see somewhat
fewer, as they lie before the end of the logs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import NamedTuple

from features.dataset import Dataset, Manifest
from features.selection import Feature, FeatureSpec
from features.views import File, Partition, item_file
from ranker.config import TrainConfig


class Read(NamedTuple):
    """One feature of a rank's batch: so many lists, of so many ids each."""

    lists: int
    ids: float


Reads = Mapping[str, Read]
"""By the batch's key: ``user``, ``item.category``, ``history:item``, ``candidate:item``."""


class Step(NamedTuple):
    """A rank's batch on average: requests, distinct histories, events of a history, candidates of a request."""

    requests: int
    histories: float
    events: float
    candidates: float


def step_of(config: TrainConfig, manifest: Manifest, world: int) -> Step:
    """What a batch holds on each of `world` ranks."""
    splits = [manifest.splits[name] for name in config.training.splits if name in manifest.splits]
    requests = max(sum(split.requests for split in splits), 1)
    of_user = max(requests / max(sum(split.users for split in splits), 1), 1.0)
    shards = config.loader.shards or world
    of_batch = config.loader.requests * ceil(shards / world)
    together = of_user / ceil(of_user / config.loader.group)
    events = manifest.events / max(sum(partition.histories for partition in manifest.partitions), 1)
    longest = config.history_length or events
    return Step(
        requests=of_batch,
        histories=of_batch / together,
        events=min(events, longest),
        candidates=sum(split.impressions for split in splits) / requests,
    )


def reads_of(config: TrainConfig, dataset: Dataset, spec: FeatureSpec, world: int) -> dict[str, Read]:
    """What a rank's batch holds of each feature that a table is read by.

    Raises:
        DatasetError: a bag's column cannot be read.
    """
    step = step_of(config, dataset.manifest, world)
    candidates = max(round(step.requests * step.candidates), 1)
    reads = {f.name: Read(step.requests, _ids(f, dataset)) for f in spec.request}
    reads |= {f.name: Read(candidates, _ids(f, dataset)) for f in spec.candidate}
    # histories lie at the requests' stride, and requests of one user share one
    events = step.events * step.histories / step.requests
    reads |= {f"history:{f.name}": Read(step.requests, events) for f in (*spec.sequence, *spec.event, *spec.content)}
    reads |= {f"candidate:{f.name}": Read(step.requests, step.candidates) for f in spec.sequence}
    return {name: Read(read.lists, read.ids * _rows_of_an_id(name, config, spec)) for name, read in reads.items()}


def _rows_of_an_id(name: str, config: TrainConfig, spec: FeatureSpec) -> int:
    """How many rows of its table an id of a feature reads."""
    name = name.removeprefix("history:").removeprefix("candidate:")
    buckets = config.tables.buckets_of(name)
    sizes = {f.name: f.size for f in (*spec.request, *spec.candidate, *spec.sequence, *spec.event)}
    return buckets.hashes if buckets is not None and buckets.rows + 1 < sizes.get(name, 0) else 1


def _ids(feature: Feature, dataset: Dataset) -> float:
    """Mean ids of a list: 1, or of a bag what the first partition, or the item table, has."""
    if feature.kind != "bag" or not dataset.manifest.partitions:
        return 1.0
    return _mean_length(_file(feature, dataset), feature.name)


def _file(feature: Feature, dataset: Dataset) -> File:
    if feature.scope == "item":
        return item_file(dataset)
    partition = Partition(dataset, 0)
    return partition.histories if feature.scope == "user" else partition.requests


def _mean_length(file: File, name: str) -> float:
    if not file.is_list(name):
        return 1.0
    lists = file.lists(name)
    return lists.values.size / max(lists.offsets.size - 1, 1)
