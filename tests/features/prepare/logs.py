"""Small logs for tests, written by code, and the least config that reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from features.dataset import Dataset
from features.prepare import prepare
from features.schema import PrepareConfig

DAY = 86_400_000
START = 1_700_000_000_000
Rows = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Request:
    """One request as read back from a dataset, ids and history in raw terms."""

    split: str
    user: Any
    time: int
    history: list[tuple[Any, int]]
    items: list[Any]
    columns: dict[str, Any]


def events(count: int = 40, users: int = 5, items: int = 7) -> dict[str, list[Any]]:
    """Events of a few users, one an hour."""
    numbers = range(count)
    return {
        "user": [n % users for n in numbers],
        "item": [100 + (n * 3) % items for n in numbers],
        "time": [START + n * 3_600_000 for n in numbers],
    }


def impressions(count: int = 30, users: int = 5, items: int = 7) -> dict[str, list[Any]]:
    """Requests of two candidates; the first two thirds train, then a few validate, then a few test."""
    numbers = range(count)
    return {
        "user": [(n // 2) % users for n in numbers],
        "item": [100 + n % items for n in numbers],
        "time": [START + (n // 2) * 7_200_000 + 1_800_000 for n in numbers],
        "request": [n // 2 for n in numbers],
        "click": [int(n % 3 == 0) for n in numbers],
        "split": ["train" if n < count * 2 // 3 else "valid" if n < count * 5 // 6 else "test" for n in numbers],
    }


def write(folder: Path, **tables: Rows | pa.Table) -> dict[str, Any]:
    """Write tables as NAME.parquet; returns the source of a config."""
    folder.mkdir(parents=True, exist_ok=True)
    source: dict[str, Any] = {"type": "logs"}
    for name, rows in tables.items():
        path = folder / f"{name}.parquet"
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.table(dict(rows)), path)
        source[name] = {"path": str(path)}
    return source


def config(source: Mapping[str, Any], **changes: Any) -> PrepareConfig:
    """A config over `source`; two partitions keep tests quick."""
    base: dict[str, Any] = {"name": "tiny", "source": source, "partitions": 2, "memory_limit_gb": 0.5}
    return PrepareConfig.model_validate(base | changes)


def small(folder: Path, **changes: Any) -> PrepareConfig:
    """A config over the default events and impressions."""
    return config(write(folder, events=events(), impressions=impressions()), **changes)


def prepared(prepare_config: PrepareConfig, out: Path) -> Dataset:
    """Prepare and open."""
    prepare(prepare_config, out)
    return Dataset(out)


def ids(dataset: Dataset, kind: str) -> dict[int, Any]:
    """Raw id by dense index."""
    from features.dataset import read_arrow

    batch = read_arrow(dataset.root / "vocabularies" / f"{kind}.arrow")
    return dict(zip(batch["index"].to_pylist(), batch["value"].to_pylist(), strict=True))


def histories(dataset: Dataset) -> dict[Any, dict[str, Any]]:
    """Every user's row, by raw id."""
    users, items = ids(dataset, "user"), ids(dataset, "item")
    found: dict[Any, dict[str, Any]] = {}
    for number in range(len(dataset.manifest.partitions)):
        for row in dataset.histories(number).to_pylist():
            found[users[row["user"]]] = row | {"item": [items[i] for i in row["item"]]}
    return found


def requests(dataset: Dataset) -> list[Request]:
    """Every request, in the order of the files."""
    users, items = ids(dataset, "user"), ids(dataset, "item")
    found: list[Request] = []
    for number, partition in enumerate(dataset.manifest.partitions):
        logs = dataset.histories(number).to_pylist()
        rows = dataset.requests(number).to_pylist()
        for split, (low, high) in partition.requests.items():
            for row in rows[low:high]:
                log, end = logs[row["row"]], row["history_end"]
                history = [(items[i], t) for i, t in zip(log["item"][:end], log["time"][:end], strict=True)]
                shown = [items[i] for i in row["items"]]
                found.append(Request(split, users[log["user"]], row["time"], history, shown, row))
    return found
