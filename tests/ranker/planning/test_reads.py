"""What the planner is told of a step is what the loader's batches hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from features.dataset import Dataset
from features.loader import Loader
from features.selection import resolve
from ranker.config import TrainConfig
from ranker.evaluation.predict import selection_of
from ranker.planning.reads import reads_of

ConfigOf = Callable[..., TrainConfig]


@pytest.mark.parametrize(("group", "shards", "world"), [(1, None, 1), (4, None, 2), (2, 4, 2)])
def test_lists_and_ids_are_those_of_batches(
    config_of: ConfigOf, coded: Path, group: int, shards: int | None, world: int
):
    """Of full batches. Histories are estimated from whole logs, of which requests see what lies before them."""
    config = config_of(
        f"dataset={coded}",
        f"loader={{requests: 16, workers: 0, group: {group}, shards: {shards or 'null'}, drop_item: 0, drop_user: 0}}",
        "features.candidate=[item, item.sid_path]",
        "model.long=[{type: mean, length: 30}]",
    )
    dataset = Dataset(coded)
    spec = resolve(config.features, dataset.manifest)
    loader = Loader(dataset, ("train",), selection_of(config, dataset, spec), config.loader, 0, True, 0, world)
    requests = 16 * (2 if shards else 1)
    batches = [batch for batch in loader.batches(0, 0) if batch.requests == requests]
    reads = reads_of(config, dataset, spec, world)
    for part, keys in (("request", ["user", "user.device"]), ("candidate", ["item", "item.sid_path"])):
        for key in keys:
            lists = sum(getattr(batch, part).stride() for batch in batches) / len(batches)
            ids = sum(getattr(batch, part)[key].values().numel() for batch in batches) / len(batches)
            assert reads[key].lists == pytest.approx(lists, rel=0.05)
            assert reads[key].lists * reads[key].ids == pytest.approx(ids, rel=0.05)
    for key, most in (("candidate:item", 1.05), ("history:item", 2.0), ("history:event.action", 2.0)):
        ids = sum(batch.sequence[key].values().numel() for batch in batches) / len(batches)
        assert reads[key].lists == requests
        assert 0.9 * ids <= reads[key].lists * reads[key].ids <= most * ids
