"""Small datasets whose content is known, made through `prepare`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from features.dataset import Dataset
from features.semantic_ids.content.protocol import Floats, Read
from tests.features.prepare import logs
from tests.features.prepare.logs import START

HOUR = 3_600_000
Log = list[tuple[Any, Any, int]]
"""Events: user, item, time."""


def histories(of: Mapping[Any, Sequence[Any]]) -> Log:
    """Events of each user's items, a minute apart."""
    return [(user, item, START + n * 60_000) for user, items in of.items() for n, item in enumerate(items)]


def dataset(
    folder: Path,
    events: Log,
    requests: Mapping[str, Sequence[Any]] | None = None,
    items: Mapping[str, Any] | pa.Table | None = None,
    **changes: Any,
) -> Dataset:
    """A dataset of these events and requests of one candidate.

    Args:
        requests: columns user, item, time, split; by default one of each user, which trains, long after all events.
        items: table of the items, with a column `item`.
    """
    if requests is None:
        users = list(dict.fromkeys(user for user, _, _ in events))
        late = max(time for _, _, time in events) + HOUR
        requests = {
            "user": users,
            "item": [events[0][1] for _ in users],
            "time": [late for _ in users],
            "split": ["train" for _ in users],
        }
    tables: dict[str, Any] = {
        "events": dict(zip(("user", "item", "time"), map(list, zip(*events, strict=True)), strict=True)),
        "impressions": {**requests, "click": [0 for _ in requests["user"]]},
    }
    if items is not None:
        tables["items"] = items
    return logs.prepared(logs.config(logs.write(folder / "in", **tables), **changes), folder / "out")


def everything(read: Read, of: Dataset) -> Floats:
    """The vectors of all rows."""
    return read(np.arange(of.manifest.items))


def by_id(read: Read, of: Dataset) -> dict[Any, Floats]:
    """Vectors by raw id; the reserved row's under None."""
    return dict(zip(of.items()["id"].to_pylist(), everything(read, of), strict=True))


def silent(line: str) -> None:
    """A log that nobody reads."""


class Lines(list[str]):
    """A log that is kept."""

    def __call__(self, line: str) -> None:
        self.append(line)


def pair_counts(of: Mapping[Any, Sequence[Any]], window: int) -> dict[tuple[Any, Any], int]:
    """Literally: ordered pairs of two different items at most `window` events apart in one history."""
    counts: dict[tuple[Any, Any], int] = defaultdict(int)
    for items in of.values():
        for i, one in enumerate(items):
            for j, other in enumerate(items):
                if i != j and abs(i - j) <= window and one != other:
                    counts[one, other] += 1
    return counts
