"""Which users a build or a refresh is about, as of when, and on whose requests it is measured."""

from __future__ import annotations

from features.dataset import Dataset
from features.errors import UserError
from features.instants import instant_ms
from features.schema import Split
from features.selection import FeatureSpec, Selection
from features.users import AsOf, newest_time
from ranker.memory.config import MemoryConfig
from ranker.ranks import Ranks
from ranker.run import Run


def split_of(config: MemoryConfig, dataset: Dataset) -> Split:
    """The split whose coverage is measured.

    Raises:
        UserError: the dataset has no request in it.
    """
    filled = dataset.manifest.filled_splits()
    for key, split in (("coverage", config.coverage), ("before", config.before)):
        if split is not None and split not in filled:
            raise UserError(f"{key}: {dataset.root} has no requests in split {split}; it has {', '.join(filled)}")
    return config.coverage or filled[-1]


def selection_for(spec: FeatureSpec, run: Run) -> Selection:
    """What is read of users: the histories that the run's blocks read."""
    return Selection(spec, (), run.config.history_length)


def partitions_of(dataset: Dataset, ranks: Ranks) -> list[int]:
    """This rank's."""
    return list(range(ranks.rank, len(dataset.manifest.partitions), ranks.world))


def as_of_now(config: MemoryConfig, dataset: Dataset, ranks: Ranks) -> AsOf:
    """As the config has it, or just after all that the dataset holds."""
    if config.as_of is not None:
        return AsOf(instant_ms(config.as_of, "as_of"), config.before)
    return AsOf(1 + max(ranks.gathered(newest_time(dataset, partitions_of(dataset, ranks)))), config.before)
