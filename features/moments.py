"""Mean and standard deviation of dense features over some splits, streamed partition by partition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from features.dataset import Dataset
from features.schema import Split
from features.selection import Feature
from features.views import Array, Partition, item_file


@dataclass(frozen=True)
class _Moments:
    """Of some numbers: `squares` is the sum of squared differences from the mean."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_values(self, values: Array) -> _Moments:
        """Merged with more numbers. Sums of squares would cancel where the mean is large; this does not (Chan et al.,
        Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979, eq. 2.1)."""
        if not values.size:
            return self
        mean = float(values.mean(dtype=np.float64))
        squares = float(np.square(values - np.float64(mean)).sum())
        count, delta = self.count + values.size, mean - self.mean
        return _Moments(
            count,
            self.mean + delta * values.size / count,
            self.squares + squares + delta * delta * self.count * values.size / count,
        )

    @property
    def deviation(self) -> float:
        """Of the population; 1 where it is nothing but rounding of the mean."""
        deviation = float(np.sqrt(self.squares / max(self.count, 1)))
        return deviation if deviation > 1e-12 * abs(self.mean) else 1.0


def dense_moments(
    dataset: Dataset, features: tuple[Feature, ...], splits: tuple[Split, ...]
) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation) by feature name; a constant feature has deviation 1.

    Item features count each item once, user and event features each history once, request and candidate features each
    row of `splits`.
    """
    moments = {f.name: _Moments() for f in features}
    items = item_file(dataset)
    for feature in features:
        if feature.scope == "item":
            moments[feature.name] = moments[feature.name].with_values(items.flat(feature.name)[1:])
    for index in range(len(dataset.manifest.partitions)):
        partition = Partition(dataset, index)
        ranges = [dataset.manifest.partitions[index].requests.get(split, (0, 0)) for split in splits]
        for feature in features:
            for values in _values(partition, feature, ranges):
                moments[feature.name] = moments[feature.name].with_values(values)
    return {name: (found.mean, found.deviation) for name, found in moments.items()}


def _values(partition: Partition, feature: Feature, ranges: list[tuple[int, int]]) -> Iterator[Array]:
    """The feature's values in a partition; `ranges` are the rows of requests that count."""
    match feature.scope:
        case "user":
            yield partition.histories.flat(feature.name)
        case "event":
            yield partition.event(feature.name)
        case "request":
            yield from (partition.requests.flat(feature.name)[begin:end] for begin, end in ranges)
        case "candidate":
            values, offsets = partition.requests.lists(feature.name)
            yield from (values[offsets[begin] : offsets[end]] for begin, end in ranges)
        case _:
            return
