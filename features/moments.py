"""Mean and standard deviation of dense features over some splits, streamed partition by partition."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from features.dataset import Dataset
from features.schema import Split
from features.selection import Feature


def dense_moments(dataset: Dataset, features: tuple[Feature, ...], splits: tuple[Split, ...]) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation) by feature name; a constant feature has deviation 1.

    Item features count each item once, user features each user once, request and candidate features each row of `splits`.
    """
    sums = {f.name: np.zeros(3) for f in features}
    for feature in features:
        if feature.scope == "item":
            sums[feature.name] += _sums(dataset.items().column(feature.name).slice(1))
    for index, info in enumerate(dataset.manifest.partitions):
        for feature in features:
            if feature.scope == "user":
                sums[feature.name] += _sums(dataset.histories(index).column(feature.name))
            elif feature.scope == "event":
                sums[feature.name] += _sums(dataset.histories(index).column(feature.name).flatten())
            elif feature.scope in ("request", "candidate"):
                column = dataset.requests(index).column(feature.name)
                for begin, end in (info.requests.get(s, (0, 0)) for s in splits):
                    rows = column.slice(begin, end - begin)
                    sums[feature.name] += _sums(rows.flatten() if pa.types.is_list(rows.type) else rows)
    moments: dict[str, tuple[float, float]] = {}
    for name, (count, total, squares) in sums.items():
        mean = total / max(count, 1)
        variance = squares / max(count, 1) - mean * mean
        moments[name] = (float(mean), float(np.sqrt(variance)) if variance > 1e-12 else 1.0)
    return moments


def _sums(values: pa.Array) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    x = values.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.array([x.size, x.sum(), np.square(x).sum()])
